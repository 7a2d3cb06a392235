// layout: every rank reads all ranks' expert ids and computes its own tables from them.
// After:    send_row, recv_src, recv_order, recv_offsets, group_sizes, expert_counts, expert_load
//           and counters are as jax_ep/reference.py defines them, for this rank.
// Roles:    num_blocks blocks of 512 threads, all resident. Block b owns the flat ids
//           [b * ids_per_block, ..), flat = (src * T + t) * K + k; its warp w owns a run of those.
// Buffers:  name          | lives on       | written by           | read by
//           topk_idx      | XLA, each rank | before the call      | all ranks, [S2]..[E1]
//           layout_counts | control block  | each block its line  | all own blocks, after [B]
//           tables        | XLA, own       | own blocks           | later kernels
// Protocol: 1. [S1] show topk_idx, [S2] wait for all.
//           2. Count own ids per expert into the block's line of layout_counts.
//           3. [B] grid barrier: no block reads peers' ids any more, if all keep theirs in shared
//           memory. Then block 0 sends [E1].
//           4. Each block sums all lines: totals give offsets, lines before its own give its first
//           row per expert.
//           5. Warps walk their ids in order; equal ids in a step of 32 are ranked by match_any.
//           6. Block 0 waits for [E2], which has come long ago. If blocks had to read ids again, the
//           last block sends [E1] only now, and waits.
// Reuse:    layout_counts is rewritten before [B] of the next call, whose [S2] follows [E2] of
//           this.
// Progress: the grid is at most one block an SM; waits are for peers ([S1] waits for nothing) and
//           for resident blocks.
// Failure:  a timeout fills the tables with -1 and the counts with 0; see give_up.cuh.
// Limits:   E <= 1024, R * T * K < 2^31, num_blocks <= kMaxLayoutBlocks.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/start_end.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumThreads = 512;
constexpr int kNumWarps = kNumThreads / 32;
constexpr int32_t kMaxCached = 32768;  // ids of a block that are kept in shared memory
constexpr int kExpertsPerThread = kMaxExperts / kNumThreads;
using BlockScan = cub::BlockScan<int32_t, kNumThreads>;

// By all blocks.
__device__ void fill(int32_t* table, int64_t begin, int64_t end, int32_t value) {
  const int64_t stride = int64_t{gridDim.x} * kNumThreads;
  for (int64_t i = begin + int64_t{blockIdx.x} * kNumThreads + threadIdx.x; i < end; i += stride) {
    table[i] = value;
  }
}

// By one block: tables without rows.
__device__ void poison(const LayoutArguments& a, int num_ranks) {
  const auto fill_all = [](int32_t* table, int64_t size, int32_t value) {
    for (int64_t i = threadIdx.x; i < size; i += kNumThreads) table[i] = value;
  };
  fill_all(a.send_row, a.num_tokens * a.top_k, kNoRow);
  fill_all(a.recv_src, a.capacity, kNoSource);
  fill_all(a.recv_order, a.capacity, kNoSource);
  fill_all(a.recv_offsets, num_ranks * a.num_tokens + 1, 0);
  fill_all(a.group_sizes, a.num_experts / num_ranks, 0);
  fill_all(a.expert_counts, a.num_experts / num_ranks, 0);
  fill_all(a.expert_load, a.num_experts, 0);
  fill_all(a.counters, 3, 0);
}

// 2. to 5. False if the group is broken.
__device__ bool make_tables(const GroupView& g, const LayoutArguments& a, int32_t ids_per_block,
                            int32_t num_cached, int32_t* shared,
                            const uint64_t (*address)[kNumAddresses]) {
  const int32_t num_experts = static_cast<int32_t>(a.num_experts);
  int32_t* warp_count = shared;                           // [kNumWarps][E], then exclusive prefix
  int32_t* first_row = shared + kNumWarps * num_experts;  // [E]
  int32_t* total = first_row + num_experts;               // [E]
  int32_t* offset = total + num_experts;                  // [E]
  int32_t* cached = offset + num_experts;                 // [num_cached], the block's first ids
  __shared__ typename BlockScan::TempStorage scan;
  __shared__ int32_t invalid_here, num_used, num_received, num_routed;

  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t num_local = num_experts / g.num_ranks;
  const int32_t top_k = static_cast<int32_t>(a.top_k);
  const int32_t ids_per_rank = static_cast<int32_t>(a.num_tokens * a.top_k);
  const int32_t num_ids = ids_per_rank * g.num_ranks;
  const int32_t block_begin = blockIdx.x * ids_per_block;
  const int32_t block_end = min(num_ids, block_begin + ids_per_block);
  const int32_t ids_per_warp = (ids_per_block / kNumWarps + 31) / 32 * 32;
  const int32_t begin = min(block_end, block_begin + warp * ids_per_warp);
  const int32_t end = warp == kNumWarps - 1 ? block_end : min(block_end, begin + ids_per_warp);

  const auto id_at = [&](int32_t flat) {
    const int32_t src = flat / ids_per_rank;
    const auto* ids = reinterpret_cast<const int32_t*>(address[src][0]);
    return ld_relaxed_sys_i32(ids + (flat - src * ids_per_rank));
  };

  // 2. Counts per warp and expert.
  for (int32_t i = threadIdx.x; i < kNumWarps * num_experts; i += kNumThreads) warp_count[i] = 0;
  for (int32_t e = threadIdx.x; e < num_experts; e += kNumThreads) first_row[e] = total[e] = 0;
  if (threadIdx.x == 0) invalid_here = num_used = num_received = num_routed = 0;
  __syncthreads();
  int32_t num_invalid = 0;
#pragma unroll 4
  for (int32_t flat = begin + lane; flat < end; flat += 32) {
    const int32_t id = id_at(flat);
    if (flat - block_begin < num_cached) cached[flat - block_begin] = id;
    if (is_routed(id, num_experts)) atomicAdd(&warp_count[warp * num_experts + id], 1);
    num_invalid += flat / ids_per_rank == g.rank && is_invalid(id, num_experts);
  }
  num_invalid = __reduce_add_sync(0xffffffffu, num_invalid);
  if (lane == 0) atomicAdd(&invalid_here, num_invalid);
  __syncthreads();
  int32_t* line = g.control->layout_counts[blockIdx.x];
  for (int32_t e = threadIdx.x; e < num_experts; e += kNumThreads) {
    int32_t sum = 0;
    for (int32_t w = 0; w < kNumWarps; ++w) {
      const int32_t count = warp_count[w * num_experts + e];
      warp_count[w * num_experts + e] = sum;
      sum += count;
    }
    line[e] = sum;
  }
  if (threadIdx.x == 0) line[kMaxExperts] = invalid_here;

  // 3.
  if (!grid_barrier(g, OpKind::kLayout)) return false;              // [B]
  if (blockIdx.x == 0 && ids_per_block <= num_cached) send_end(g);  // [E1]

  // 4. Totals, offsets, first rows. A thread sums four experts of every n-th line.
  const int32_t num_quads = (num_experts + 3) / 4;
  const int32_t num_parts = kNumThreads / num_quads, part = threadIdx.x / num_quads;
  if (part < num_parts) {
    const int32_t quad = threadIdx.x % num_quads;
    int32_t before[4] = {}, sum[4] = {};
#pragma unroll 16
    for (auto b = static_cast<uint32_t>(part); b < gridDim.x; b += num_parts) {
      const int4 four = __ldcg(reinterpret_cast<const int4*>(g.control->layout_counts[b]) + quad);
      const int32_t count[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[i] += count[i];
        before[i] += b < blockIdx.x ? count[i] : 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int32_t e = 4 * quad + i;
      if (e >= num_experts) break;
      atomicAdd(&total[e], sum[i]);
      atomicAdd(&first_row[e], before[i]);
    }
  }
  __syncthreads();
  int32_t padded[kExpertsPerThread];
  for (int32_t i = 0; i < kExpertsPerThread; ++i) {
    const int32_t e = threadIdx.x * kExpertsPerThread + i;
    padded[i] =
        e < num_experts ? static_cast<int32_t>(padded_rows(total[e], a.expert_alignment)) : 0;
  }
  BlockScan(scan).ExclusiveSum(padded, padded);
  for (int32_t i = 0; i < kExpertsPerThread; ++i) {
    const int32_t e = threadIdx.x * kExpertsPerThread + i;
    if (e < num_experts) offset[e] = padded[i];
  }
  __syncthreads();
  int32_t rank_offset[kExpertsPerThread];  // where each expert's rank begins in the scan
  for (int32_t i = 0; i < kExpertsPerThread; ++i) {
    const int32_t e = threadIdx.x + i * kNumThreads;
    rank_offset[i] = e < num_experts ? offset[e / num_local * num_local] : 0;
  }
  __syncthreads();
  for (int32_t i = 0; i < kExpertsPerThread; ++i) {
    const int32_t e = threadIdx.x + i * kNumThreads;
    if (e < num_experts) {
      offset[e] -= rank_offset[i];
      first_row[e] += offset[e];
    }
  }
  __syncthreads();

  // Slots of recv_order: kept rows of this rank's experts that come before each warp's ids. The
  // rows of an expert are contiguous, so they are counted without looking at ids.
  const int32_t first_local = g.rank * num_local;
  const auto rows_before = [&](int32_t e, int32_t count) {
    return static_cast<int32_t>(rows_below(offset[e], count, a.capacity));
  };
  int32_t next_slot = 0;
  for (int32_t e = first_local + lane; e < first_local + num_local; e += 32) {
    next_slot += rows_before(e, first_row[e] - offset[e] + warp_count[warp * num_experts + e]);
  }
  next_slot = __reduce_add_sync(0xffffffffu, next_slot);

  // 5. Rows.
  for (int32_t step = begin; step < end; step += 32) {
    const int32_t flat = step + lane;
    int32_t id = kNotRouted;
    if (flat < end) id = flat - block_begin < num_cached ? cached[flat - block_begin] : id_at(flat);
    const bool routed = is_routed(id, num_experts);
    const uint32_t same = __match_any_sync(0xffffffffu, routed ? id : -1);
    const uint32_t lower = (1u << lane) - 1;
    int32_t row = kNoRow;
    if (routed) {
      int32_t* next = &warp_count[warp * num_experts + id];
      row = first_row[id] + *next + __popc(same & lower);
    }
    __syncwarp();
    if (routed && (same & lower) == 0) warp_count[warp * num_experts + id] += __popc(same);
    __syncwarp();
    if (row >= a.capacity) row = kNoRow;
    if (flat < end && flat / ids_per_rank == g.rank) a.send_row[flat - g.rank * ids_per_rank] = row;
    const bool here = row != kNoRow && id / num_local == g.rank;
    const uint32_t kept = __ballot_sync(0xffffffffu, here);
    if (here) {
      a.recv_src[row] = flat;
      a.recv_order[next_slot + __popc(kept & lower)] = row;
    }
    if (flat < end && flat % top_k == 0) {
      a.recv_offsets[flat / top_k] = next_slot + __popc(kept & lower);
    }
    next_slot += __popc(kept);
  }

  // What holds no row: alignment padding, the tail, the end of recv_order.
  int32_t used = 0, received = 0, routed_here = 0;
  for (int32_t e = first_local + threadIdx.x; e < first_local + num_local; e += kNumThreads) {
    const int64_t rows = padded_rows(total[e], a.expert_alignment);
    const auto size = static_cast<int32_t>(rows_below(offset[e], rows, a.capacity));
    used += size;
    received += rows_before(e, total[e]);
    routed_here += total[e];
    if (blockIdx.x == 0) {
      a.group_sizes[e - first_local] = size;
      a.expert_counts[e - first_local] = total[e];
    }
    if ((e - first_local) % gridDim.x == blockIdx.x) {
      for (int32_t i = offset[e] + total[e]; i < offset[e] + size; ++i) a.recv_src[i] = kNoSource;
    }
  }
  used = __reduce_add_sync(0xffffffffu, used);
  received = __reduce_add_sync(0xffffffffu, received);
  routed_here = __reduce_add_sync(0xffffffffu, routed_here);
  if (lane == 0 && routed_here != 0) {
    atomicAdd(&num_used, used);
    atomicAdd(&num_received, received);
    atomicAdd(&num_routed, routed_here);
  }
  __syncthreads();
  fill(a.recv_src, num_used, a.capacity, kNoSource);
  fill(a.recv_order, num_received, a.capacity, kNoSource);
  if (blockIdx.x == 0) {
    for (int32_t e = threadIdx.x; e < num_experts; e += kNumThreads) a.expert_load[e] = total[e];
    if (threadIdx.x == 0) {
      int32_t invalid = 0;
      for (uint32_t b = 0; b < gridDim.x; ++b) {
        invalid += __ldcg(&g.control->layout_counts[b][kMaxExperts]);
      }
      a.recv_offsets[g.num_ranks * a.num_tokens] = num_received;
      a.counters[0] = num_received;
      a.counters[1] = num_routed - num_received;
      a.counters[2] = invalid;
    }
  }
  return true;
}

__global__ __launch_bounds__(kNumThreads,
                             1) void layout_kernel(const __grid_constant__ GroupView g,
                                                   const __grid_constant__ LayoutArguments a,
                                                   int32_t ids_per_block, int32_t num_cached) {
  extern __shared__ int32_t shared[];
  __shared__ uint64_t address[kMaxPeers][kNumAddresses];
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.topk_idx)};
  if (blockIdx.x == 0) send_start(g, OpKind::kLayout, own);     // [S1]
  bool ok = receive_start(g, OpKind::kLayout, own, address) &&  // [S2]
            make_tables(g, a, ids_per_block, num_cached, shared, address);
  const bool are_cached = ids_per_block <= num_cached;
  if (blockIdx.x == 0 && are_cached) ok = receive_end(g, OpKind::kLayout) && ok;  // [E2]
  Finish finish = finish_block(g, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd && !are_cached) {
    send_end(g);                                           // [E1]
    const bool is_good = receive_end(g, OpKind::kLayout);  // [E2]
    if (__syncthreads_and(is_good) == 0) finish = Finish::kFail;
  }
  if (finish == Finish::kFail) poison(a, g.num_ranks);
  end_call(g);
}

int64_t SharedBytes(int64_t num_experts, int64_t num_cached) {
  return ((kNumWarps + 3) * num_experts + num_cached) * int64_t{sizeof(int32_t)};
}

}  // namespace

cudaError_t LaunchLayout(const GroupView& group, const LayoutArguments& a, int num_sms,
                         cudaStream_t stream) {
  const int64_t num_ids = a.num_tokens * a.top_k * group.num_ranks;
  // More blocks have fewer ids each, but more lines to sum: as many as give each thread an id, up to
  // kMany; beyond that as many as give it two.
  constexpr int64_t kMany = 64;
  const int64_t with_one = (num_ids + kNumThreads - 1) / kNumThreads;
  const int64_t most = std::min<int64_t>(num_sms, kMaxLayoutBlocks);
  const int64_t num_blocks = std::min(most, std::max(std::min(with_one, kMany), with_one / 2));
  const auto ids_per_block = static_cast<int32_t>((num_ids + num_blocks - 1) / num_blocks);
  const int32_t num_cached = ids_per_block < kMaxCached ? ids_per_block : kMaxCached;
  layout_kernel<<<static_cast<unsigned>(num_blocks), kNumThreads,
                  SharedBytes(a.num_experts, num_cached), stream>>>(group, a, ids_per_block,
                                                                    num_cached);
  return cudaGetLastError();
}

cudaError_t PrepareLayout() {
  return PrepareKernel(layout_kernel, SharedBytes(kMaxExperts, kMaxCached));
}

}  // namespace jax_ep::gpu
