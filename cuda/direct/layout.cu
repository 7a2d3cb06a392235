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
//           row per expert, and how many more the expert keeps.
//           5. Warps walk their ids in order; equal ids in a step of 32 are ranked by match_any.
//           6. Block 0 waits for [E2], which has come long ago. If blocks had to read ids again, the
//           last block sends [E1] only now, and waits.
// Reuse:    layout_counts is rewritten before [B] of the next call, whose [S2] follows [E2] of
//           this.
// Progress: the grid is at most one block an SM; waits are for peers ([S1] waits for nothing) and
//           for resident blocks.
// Failure:  a timeout fills the tables with -1 and the counts with 0; see give_up.cuh.
// Limits:   E <= 1024, R * T * K + E * A and C <= kMaxRows, num_blocks <= kMaxLayoutBlocks.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/start_end.cuh"
#include "cuda/sync/timeline.cuh"

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

// What the threads of a block share, beside what they keep by expert.
struct Shared {
  typename BlockScan::TempStorage scan;
  int32_t num_invalid;                         // of the block's ids that are this rank's
  int32_t num_used, num_received, num_routed;  // of all experts of this rank
  uint64_t address[kMaxPeers][kNumAddresses];
};

// Steps 2 to 5, by a block.
class TableBuilder {
 public:
  __device__ TableBuilder(const GroupView& g, const LayoutArguments& a, int32_t ids_per_block,
                          int32_t num_cached, int32_t* memory, Shared& shared)
      : g_(g),
        a_(a),
        shared_(shared),
        num_experts_(static_cast<int32_t>(a.num_experts)),
        num_local_(num_experts_ / g.num_ranks),
        first_local_(g.rank * num_local_),
        ids_per_rank_(static_cast<int32_t>(a.num_tokens * a.top_k)),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        num_cached_(num_cached),
        are_cached_(ids_per_block <= num_cached),
        block_begin_(blockIdx.x * ids_per_block),
        warp_count_(memory),
        first_row_(memory + kNumWarps * num_experts_),
        left_(first_row_ + num_experts_),
        size_(left_ + num_experts_),
        total_(size_ + num_experts_),
        offset_(total_ + num_experts_),
        cached_(offset_ + num_experts_) {
    const int32_t num_ids = ids_per_rank_ * g.num_ranks;
    const int32_t block_end = min(num_ids, block_begin_ + ids_per_block);
    const int32_t ids_per_warp = (ids_per_block / kNumWarps + 31) / 32 * 32;
    begin_ = min(block_end, block_begin_ + warp_ * ids_per_warp);
    end_ = warp_ == kNumWarps - 1 ? block_end : min(block_end, begin_ + ids_per_warp);
  }

  // False if the group is broken.
  __device__ bool make() {
    count_ids();
    write_line();
    if (!grid_barrier(g_, OpKind::kLayout)) return false;  // [B]
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
    if (blockIdx.x == 0 && are_cached_) {
      send_end(g_);  // [E1]
      timeline::mark(Role::kBlock, Event::kE1);
    }
    sum_lines();
    place_experts();
    place_rows();
    fill_rest();
    return true;
  }

 private:
  // Of all ranks, by flat number.
  __device__ int32_t id_at(int32_t flat) const {
    const int32_t src = flat / ids_per_rank_;
    const auto* ids = reinterpret_cast<const int32_t*>(shared_.address[src][0]);
    return ld_relaxed_sys_i32(ids + (flat - src * ids_per_rank_));
  }

  // 2. Fills warp_count, cached and num_invalid.
  __device__ void count_ids() {
    for (int32_t i = threadIdx.x; i < kNumWarps * num_experts_; i += kNumThreads) {
      warp_count_[i] = 0;
    }
    for (int32_t e = threadIdx.x; e < num_experts_; e += kNumThreads) first_row_[e] = total_[e] = 0;
    if (threadIdx.x == 0) {
      shared_.num_invalid = shared_.num_used = shared_.num_received = shared_.num_routed = 0;
    }
    __syncthreads();
    int32_t num_invalid = 0;
#pragma unroll 4
    for (int32_t flat = begin_ + lane_; flat < end_; flat += 32) {
      const int32_t id = id_at(flat);
      if (flat - block_begin_ < num_cached_) cached_[flat - block_begin_] = id;
      if (is_routed(id, num_experts_)) atomicAdd(&warp_count_[warp_ * num_experts_ + id], 1);
      num_invalid += flat / ids_per_rank_ == g_.rank && is_invalid(id, num_experts_);
    }
    num_invalid = __reduce_add_sync(0xffffffffu, num_invalid);
    if (lane_ == 0) atomicAdd(&shared_.num_invalid, num_invalid);
    __syncthreads();
  }

  // The block's line of layout_counts; warp_count becomes the counts of the warps before.
  __device__ void write_line() {
    int32_t* line = g_.control->layout_counts[blockIdx.x];
    for (int32_t e = threadIdx.x; e < num_experts_; e += kNumThreads) {
      int32_t sum = 0;
      for (int32_t w = 0; w < kNumWarps; ++w) {
        const int32_t count = warp_count_[w * num_experts_ + e];
        warp_count_[w * num_experts_ + e] = sum;
        sum += count;
      }
      line[e] = sum;
    }
    if (threadIdx.x == 0) line[kMaxExperts] = shared_.num_invalid;
  }

  // 4. By expert: total, and in first_row the rows of the blocks before. A thread sums four experts
  // of every n-th line.
  __device__ void sum_lines() {
    const int32_t num_quads = (num_experts_ + 3) / 4;
    const int32_t num_parts = kNumThreads / num_quads, part = threadIdx.x / num_quads;
    if (part < num_parts) {
      const int32_t quad = threadIdx.x % num_quads;
      int32_t before[4] = {}, sum[4] = {};
#pragma unroll 16
      for (auto b = static_cast<uint32_t>(part); b < gridDim.x; b += num_parts) {
        const int4 four =
            __ldcg(reinterpret_cast<const int4*>(g_.control->layout_counts[b]) + quad);
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
        if (e >= num_experts_) break;
        atomicAdd(&total_[e], sum[i]);
        atomicAdd(&first_row_[e], before[i]);
      }
    }
    __syncthreads();
  }

  // 4. Where each expert begins on its rank, how large its group is, the row of its first id in the
  // block, and how many of the block's ids it keeps at most: with none, first_row is the end of its
  // room.
  __device__ void place_experts() {
    if (a_.room.expert_capacity == 0) {
      scan_occupied_rows();
    } else {  // a scan over the experts of all ranks could leave int32
      for (int32_t e = threadIdx.x; e < num_experts_; e += kNumThreads) {
        size_[e] = static_cast<int32_t>(a_.room.expert_capacity);
        offset_[e] = e % num_local_ * size_[e];
      }
    }
    for (int32_t e = threadIdx.x; e < num_experts_; e += kNumThreads) {
      const auto most = static_cast<int32_t>(a_.room.most_rows(offset_[e]));
      size_[e] = min(size_[e], most);
      const int32_t before = min(first_row_[e], most);
      first_row_[e] = offset_[e] + before;
      left_[e] = most - before;
    }
    __syncthreads();
  }

  // size, what experts occupy, and offset from it. A thread has written the offsets that it reads
  // afterwards.
  __device__ void scan_occupied_rows() {
    int32_t occupied[kExpertsPerThread];
    for (int32_t i = 0; i < kExpertsPerThread; ++i) {
      const int32_t e = threadIdx.x * kExpertsPerThread + i;
      occupied[i] = e < num_experts_ ? static_cast<int32_t>(a_.room.occupied_rows(total_[e])) : 0;
      if (e < num_experts_) size_[e] = occupied[i];
    }
    BlockScan(shared_.scan).ExclusiveSum(occupied, occupied);
    for (int32_t i = 0; i < kExpertsPerThread; ++i) {
      const int32_t e = threadIdx.x * kExpertsPerThread + i;
      if (e < num_experts_) offset_[e] = occupied[i];
    }
    __syncthreads();
    int32_t rank_offset[kExpertsPerThread];  // where each expert's rank begins in the scan
    for (int32_t i = 0; i < kExpertsPerThread; ++i) {
      const int32_t e = threadIdx.x + i * kNumThreads;
      rank_offset[i] = e < num_experts_ ? offset_[e / num_local_ * num_local_] : 0;
    }
    __syncthreads();
    for (int32_t i = 0; i < kExpertsPerThread; ++i) {
      const int32_t e = threadIdx.x + i * kNumThreads;
      if (e < num_experts_) offset_[e] -= rank_offset[i];
    }
  }

  // Slots of recv_order: kept rows of this rank's experts that come before the warp's ids. The kept
  // rows of an expert are contiguous, so they are counted without looking at ids.
  __device__ int32_t first_slot() const {
    int32_t slot = 0;
    for (int32_t e = first_local_ + lane_; e < first_local_ + num_local_; e += 32) {
      slot += first_row_[e] - offset_[e];  // of the blocks before
      slot += min(warp_count_[warp_ * num_experts_ + e], left_[e]);
    }
    return __reduce_add_sync(0xffffffffu, slot);
  }

  // 5. By a warp, its ids in order.
  __device__ void place_rows() {
    const auto top_k = static_cast<int32_t>(a_.top_k);
    int32_t next_slot = first_slot();
    for (int32_t step = begin_; step < end_; step += 32) {
      const int32_t flat = step + lane_;
      int32_t id = kNotRouted;
      if (flat < end_) {
        id = flat - block_begin_ < num_cached_ ? cached_[flat - block_begin_] : id_at(flat);
      }
      const bool routed = is_routed(id, num_experts_);
      const uint32_t same = __match_any_sync(0xffffffffu, routed ? id : -1);
      const uint32_t lower = (1u << lane_) - 1;
      int32_t row = kNoRow;
      if (routed) {
        const int32_t i = warp_count_[warp_ * num_experts_ + id] + __popc(same & lower);
        if (i < left_[id]) row = first_row_[id] + i;
      }
      __syncwarp();
      if (routed && (same & lower) == 0) warp_count_[warp_ * num_experts_ + id] += __popc(same);
      __syncwarp();
      if (flat < end_ && flat / ids_per_rank_ == g_.rank) {
        a_.send_row[flat - g_.rank * ids_per_rank_] = row;
      }
      const bool here = row != kNoRow && id / num_local_ == g_.rank;
      const uint32_t kept = __ballot_sync(0xffffffffu, here);
      if (here) {
        a_.recv_src[row] = flat;
        a_.recv_order[next_slot + __popc(kept & lower)] = row;
      }
      if (flat < end_ && flat % top_k == 0) {
        a_.recv_offsets[flat / top_k] = next_slot + __popc(kept & lower);
      }
      next_slot += __popc(kept);
    }
  }

  // What holds no row: alignment padding, the tail, the end of recv_order. And all numbers of rows.
  __device__ void fill_rest() {
    int32_t used = 0, received = 0, routed = 0;
    for (int32_t e = first_local_ + threadIdx.x; e < first_local_ + num_local_; e += kNumThreads) {
      const int32_t size = size_[e];
      used += size;
      received += min(total_[e], size);
      routed += total_[e];
      if (blockIdx.x == 0) {
        a_.group_sizes[e - first_local_] = size;
        a_.expert_counts[e - first_local_] = total_[e];
      }
    }
    used = __reduce_add_sync(0xffffffffu, used);
    received = __reduce_add_sync(0xffffffffu, received);
    routed = __reduce_add_sync(0xffffffffu, routed);
    if (lane_ == 0 && (used | routed) != 0) {
      atomicAdd(&shared_.num_used, used);
      atomicAdd(&shared_.num_received, received);
      atomicAdd(&shared_.num_routed, routed);
    }
    fill_padding();
    __syncthreads();
    fill(a_.recv_src, shared_.num_used, a_.room.capacity, kNoSource);
    fill(a_.recv_order, shared_.num_received, a_.room.capacity, kNoSource);
    if (blockIdx.x == 0) write_counters();
  }

  // The warps of all blocks share the experts: several an expert, where there are enough.
  __device__ void fill_padding() const {
    if (a_.room.expert_alignment == 1 && a_.room.expert_capacity == 0) return;  // there is none
    const int32_t num_warps = static_cast<int32_t>(gridDim.x) * kNumWarps;
    const int32_t num_parts = max(1, num_warps / num_local_);
    const int32_t first = static_cast<int32_t>(blockIdx.x) * kNumWarps + warp_;
    for (int32_t item = first; item < num_local_ * num_parts; item += num_warps) {
      const int32_t e = first_local_ + item % num_local_, part = item / num_local_;
      const int32_t size = size_[e], begin = min(total_[e], size) + part * 32 + lane_;
      for (int32_t i = begin; i < size; i += num_parts * 32) {
        a_.recv_src[offset_[e] + i] = kNoSource;
      }
    }
  }

  __device__ void write_counters() {
    for (int32_t e = threadIdx.x; e < num_experts_; e += kNumThreads) a_.expert_load[e] = total_[e];
    if (threadIdx.x != 0) return;
    int32_t invalid = 0;
    for (uint32_t b = 0; b < gridDim.x; ++b) {
      invalid += __ldcg(&g_.control->layout_counts[b][kMaxExperts]);
    }
    a_.recv_offsets[g_.num_ranks * a_.num_tokens] = shared_.num_received;
    a_.counters[0] = shared_.num_received;
    a_.counters[1] = shared_.num_routed - shared_.num_received;
    a_.counters[2] = invalid;
  }

  const GroupView& g_;
  const LayoutArguments& a_;
  Shared& shared_;
  const int32_t num_experts_, num_local_, first_local_, ids_per_rank_, warp_, lane_, num_cached_;
  const bool are_cached_;  // all of the block's ids
  const int32_t block_begin_;
  int32_t begin_, end_;  // the warp's ids
  // In shared memory.
  int32_t* const warp_count_;  // [kNumWarps][E]: the warp's ids; then those of the warps before
  int32_t* const first_row_;   // [E], of the block's ids, once experts are placed
  int32_t* const left_;        // [E], rows from first_row on that the expert may keep
  int32_t* const size_;        // [E], of the expert's group, padding included
  int32_t* const total_;       // [E], ids of all ranks
  int32_t* const offset_;      // [E], where the expert begins on its rank
  int32_t* const cached_;      // [num_cached], the block's first ids
};

__global__ __launch_bounds__(kNumThreads,
                             1) void layout_kernel(const __grid_constant__ GroupView g,
                                                   const __grid_constant__ LayoutArguments a,
                                                   int32_t ids_per_block, int32_t num_cached) {
  extern __shared__ int32_t memory[];
  __shared__ Shared shared;
  timeline::begin();
  const bool is_claimed = claim_call(g, OpKind::kLayout);
  const bool are_cached = ids_per_block <= num_cached;
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.topk_idx)};
  if (blockIdx.x == 0) {
    send_start(g, OpKind::kLayout, is_claimed, own);  // [S1]
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
  }
  bool ok = receive_start(g, OpKind::kLayout, is_claimed, own, shared.address);  // [S2]
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS2);
  ok = ok && TableBuilder(g, a, ids_per_block, num_cached, memory, shared).make();
  if (blockIdx.x == 0 && are_cached) {
    ok = receive_end(g, OpKind::kLayout) && ok;  // [E2]
    timeline::mark(Role::kBlock, Event::kE2);
  }
  timeline::end(g, OpKind::kLayout);
  Finish finish = finish_block(g, OpKind::kLayout, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd && !are_cached) {
    send_end(g);                                           // [E1]
    const bool is_good = receive_end(g, OpKind::kLayout);  // [E2]
    if (__syncthreads_and(is_good) == 0) finish = Finish::kFail;
  }
  if (finish == Finish::kEnd) return end_call(g);
  const auto num_units = [](uint32_t) { return 1; };  // peers tell of none
  fill_without_rows(a, g.num_ranks, fail_call(g, finish, num_units));
}

int64_t SharedBytes(int64_t num_experts, int64_t num_cached) {
  return ((kNumWarps + 5) * num_experts + num_cached) * int64_t{sizeof(int32_t)};
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
