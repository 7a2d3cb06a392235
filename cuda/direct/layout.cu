// layout: every rank reads all ranks' expert ids and computes its own tables from them.
// After:    send_row, recv_src, recv_order, recv_offsets, group_sizes, expert_counts, expert_load
//           and counters are as jax_ep/reference.py defines them, for this rank. Of ids without an
//           expert the host is told (notice.cuh).
// Roles:    num_blocks blocks of 512 threads, all resident. Block b owns the flat ids
//           [b * ids_per_block, ..), flat = (src * T + t) * K + k; its warp w owns a run of those.
//           Few ids have one block, which needs neither layout_counts nor [B].
// Buffers:  name          | lives on       | written by           | read by
//           topk_idx      | XLA, each rank | before the call      | all ranks, [S2]..[E1]
//           layout_counts | control block  | each block its line  | all own blocks, after [B]
//           tables        | XLA, own       | own blocks           | later kernels
// Protocol: 1. [S1] show topk_idx, [S2] wait for all.
//           2. Count own ids per expert into the block's line of layout_counts.
//           3. [B] grid barrier: no block reads peers' ids any more, if all keep theirs in shared
//           memory. Then block 0 sends [E1]; one block alone does as soon as it has them.
//           4. Each block sums all lines: totals give offsets, lines before its own give its first
//           row per expert, and how many more the expert keeps. A warp places a rank's experts.
//           5. Warps walk their ids in order; equal ids in a step of 32 are ranked by ballots on
//           their bits, which together take less than match_any.
//           6. Block 0 waits for [E2], which has come long ago. If blocks had to read ids again, the
//           last block sends [E1] only now, and waits.
// Reuse:    layout_counts is rewritten before [B] of the next call, whose [S2] follows [E2] of
//           this.
// Progress: the grid is at most one block an SM, and two would fit, as ranks under MPS can be given
//           the same SMs; waits are for peers ([S1] waits for nothing) and for resident blocks.
// Failure:  a timeout fills the tables with -1 and the counts with 0; see give_up.cuh.
// Speed:    a call of few ids runs its code once, and each line of it may have to be fetched. So
//           loops are unrolled only for what is to be under way at once, and what few calls need
//           stands in functions of its own.
// Limits:   E <= 1024, R * T * K + E * A and C <= kMaxRows, num_blocks <= kMaxLayoutBlocks.
#include <algorithm>

#include "cuda/core/divider.h"
#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/notice.cuh"
#include "cuda/sync/start_end.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumThreads = 512;
constexpr int kNumWarps = kNumThreads / 32;
constexpr uint32_t kAllLanes = 0xffffffff;
// Dynamic shared memory of one of several blocks, at most: two of them fit an SM.
constexpr int64_t kMostSharedBytes = 112'000;
constexpr int kExpertBits = 10;  // of an id
static_assert(kMaxExperts <= 1 << kExpertBits);
// Of a thread, on their way at once.
constexpr int kIdsAtOnce = 4;
constexpr int kLinesAtOnce = 8;
constexpr int kExpertsAtOnce = 4;  // neighbours

// The same on all ranks, like the sizes that it follows from.
struct Plan {
  Plan(const LayoutArguments& a, int64_t num_ranks, int64_t most_blocks);

  int32_t num_blocks, num_ids, ids_per_block, ids_per_warp;
  int32_t num_cached;  // of a block's ids, the first ones
  int32_t num_experts, num_local;
  int32_t capacity, expert_capacity;  // rows; expert_capacity: 0 where experts share
  int32_t log2_quads;                 // of four experts, rounded up to a power of two
  Divider ids_per_rank, top_k, expert_alignment;

  __device__ bool are_cached() const { return ids_per_block <= num_cached; }
  __device__ RoomOf<int32_t, const Divider&> room() const {
    return {capacity, expert_alignment, expert_capacity};
  }
};

// What the threads of a block share, beside what they keep by expert.
struct Shared {
  int32_t num_invalid;  // of the block's ids that are this rank's
  // Rows of all experts of this rank. Those before the block's ids have a slot in recv_order each.
  int32_t num_used, num_received, num_routed, num_before;
  uint64_t address[kMaxPeers][kNumAddresses];
};

// Of the experts of one rank, in shared memory.
struct LocalExperts {
  const int32_t *size, *total, *offset;
};

// By all blocks.
__device__ void fill_end(int32_t* table, int32_t begin, int32_t end) {
  const auto stride = static_cast<int32_t>(gridDim.x * kNumThreads);
#pragma unroll 1
  for (auto i = static_cast<int32_t>(begin + blockIdx.x * kNumThreads + threadIdx.x); i < end;
       i += stride) {
    table[i] = kNoSource;
  }
}

// The warps of all blocks share the experts: several an expert, where there are enough.
__device__ __noinline__ void fill_padding(int32_t* recv_src, int32_t num_local,
                                          const LocalExperts& experts) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t num_warps = static_cast<int32_t>(gridDim.x) * kNumWarps;
  const int32_t num_parts = max(1, num_warps / num_local);
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kNumWarps + warp;
#pragma unroll 1
  for (int32_t item = first; item < num_local * num_parts; item += num_warps) {
    const int32_t e = item % num_local, part = item / num_local;
    const int32_t size = experts.size[e];
    const int32_t begin = min(experts.total[e], size) + part * 32 + lane;
#pragma unroll 1
    for (int32_t i = begin; i < size; i += num_parts * 32) {
      recv_src[experts.offset[e] + i] = kNoSource;
    }
  }
}

// Steps 2 to 5, by a block.
class TableBuilder {
 public:
  __device__ TableBuilder(const GroupView& g, const LayoutArguments& a, const Plan& plan,
                          int32_t* memory, Shared& shared)
      : g_(g),
        a_(a),
        plan_(plan),
        shared_(shared),
        first_local_(g.rank * plan.num_local),
        first_own_(g.rank * plan.ids_per_rank.divisor()),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        block_begin_(static_cast<int32_t>(blockIdx.x) * plan.ids_per_block),
        warp_count_(memory),
        first_row_(memory + kNumWarps * plan.num_experts),
        left_(first_row_ + plan.num_experts),
        size_(left_ + plan.num_experts),
        total_(size_ + plan.num_experts),
        offset_(total_ + plan.num_experts),
        cached_(offset_ + plan.num_experts) {
    const int32_t block_end = min(plan.num_ids, block_begin_ + plan.ids_per_block);
    begin_ = min(block_end, block_begin_ + warp_ * plan.ids_per_warp);
    end_ = warp_ == kNumWarps - 1 ? block_end : min(block_end, begin_ + plan.ids_per_warp);
  }

  // Needs no id; before the block's next barrier.
  __device__ void clear() {
    auto* quads = reinterpret_cast<int4*>(warp_count_);
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < kNumWarps / 4 * plan_.num_experts; i += kNumThreads) {
      quads[i] = {0, 0, 0, 0};
    }
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      first_row_[e] = total_[e] = 0;
    }
    if (threadIdx.x == 0) shared_.num_invalid = 0;
  }

  // After the block's next barrier. False if the group is broken.
  __device__ bool make() {
    const uint64_t epoch = end_epoch(g_);
    count_ids();
    __syncthreads();
    if (gridDim.x == 1) leave_peers(epoch);
    sum_warps();
    if (!grid_barrier(g_, OpKind::kLayout)) return false;  // [B]
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kBarrier);
    if (gridDim.x > 1) {
      if (blockIdx.x == 0) leave_peers(epoch);
      sum_lines();
    }
    place_experts();
    __syncthreads();
    place_rows();
    fill_rest();
    return true;
  }

 private:
  // When all blocks have what they need, if they need not look again.
  __device__ void leave_peers(uint64_t epoch) const {
    if (!plan_.are_cached()) return;
    send_end(g_, epoch);  // [E1]
    timeline::mark(Role::kBlock, Event::kE1);
  }

  // Of all ranks, by flat number.
  __device__ int32_t id_at(int32_t flat) const {
    const int32_t src = plan_.ids_per_rank.quotient(flat);
    const auto* ids = reinterpret_cast<const int32_t*>(shared_.address[src][0]);
    return ld_relaxed_sys_i32(ids + (flat - src * plan_.ids_per_rank.divisor()));
  }

  __device__ bool is_own(int32_t flat) const {
    return static_cast<uint32_t>(flat - first_own_) <
           static_cast<uint32_t>(plan_.ids_per_rank.divisor());
  }
  __device__ bool is_local(int32_t e) const {
    return static_cast<uint32_t>(e - first_local_) < static_cast<uint32_t>(plan_.num_local);
  }

  // 2. Fills warp_count, cached and num_invalid.
  __device__ void count_ids() {
    int32_t* const count = warp_count_ + warp_ * plan_.num_experts;
    int32_t num_invalid = 0;
#pragma unroll 1
    for (int32_t first = begin_ + lane_; first < end_; first += 32 * kIdsAtOnce) {
      int32_t id[kIdsAtOnce];
#pragma unroll
      for (int j = 0; j < kIdsAtOnce; ++j) {
        id[j] = kNotRouted;
        if (first + 32 * j < end_) id[j] = id_at(first + 32 * j);
      }
#pragma unroll
      for (int j = 0; j < kIdsAtOnce; ++j) {
        const int32_t flat = first + 32 * j, i = flat - block_begin_;
        if (is_routed(id[j], plan_.num_experts)) {
          atomicAdd(&count[id[j]], 1);
        } else if (id[j] != kNotRouted && is_own(flat)) {
          ++num_invalid;
        }
        if (flat < end_ && i < plan_.num_cached) cached_[i] = id[j];
      }
    }
    if (num_invalid != 0) atomicAdd(&shared_.num_invalid, num_invalid);
  }

  // By expert: the block's line of layout_counts, or, with one block, total; warp_count becomes the
  // counts of the warps before.
  __device__ void sum_warps() {
    int32_t* line = g_.control->layout_counts[blockIdx.x];
    if (threadIdx.x == 0 && gridDim.x > 1) line[kMaxExperts] = shared_.num_invalid;
    if (gridDim.x == 1) line = total_;
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      int32_t count[kNumWarps], sum = 0;
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) count[w] = warp_count_[w * plan_.num_experts + e];
#pragma unroll
      for (int w = 0; w < kNumWarps; ++w) {
        warp_count_[w * plan_.num_experts + e] = sum;
        sum += count[w];
      }
      line[e] = sum;
    }
  }

  // 4. By expert: total, and in first_row the rows of the blocks before. A thread sums four experts
  // of every n-th line.
  __device__ void sum_lines() {
    const int32_t quad = threadIdx.x & ((1 << plan_.log2_quads) - 1);
    const uint32_t num_parts = kNumThreads >> plan_.log2_quads;
    if (4 * quad < plan_.num_experts) {
      int32_t before[4] = {}, sum[4] = {};
#pragma unroll 1
      for (uint32_t b = threadIdx.x >> plan_.log2_quads; b < gridDim.x;
           b += kLinesAtOnce * num_parts) {
        int4 line[kLinesAtOnce];
#pragma unroll
        for (int j = 0; j < kLinesAtOnce; ++j) {
          line[j] = {0, 0, 0, 0};
          if (b + j * num_parts >= gridDim.x) continue;
          const int32_t* counts = g_.control->layout_counts[b + j * num_parts];
          line[j] = __ldcg(reinterpret_cast<const int4*>(counts) + quad);
        }
#pragma unroll
        for (int j = 0; j < kLinesAtOnce; ++j) {
          const int32_t count[4] = {line[j].x, line[j].y, line[j].z, line[j].w};
          const bool is_before = b + j * num_parts < blockIdx.x;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sum[i] += count[i];
            before[i] += is_before ? count[i] : 0;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t e = 4 * quad + i;
        if (e >= plan_.num_experts) break;
        atomicAdd(&total_[e], sum[i]);
        atomicAdd(&first_row_[e], before[i]);
      }
    }
    __syncthreads();
  }

  // 4. Where each expert begins on its rank, how large its group is, the row of its first id in the
  // block, and how many of the block's ids it keeps at most: with none, first_row is the end of its
  // room. And all numbers of rows of this rank.
  __device__ void place_experts() {
#pragma unroll 1
    for (int32_t rank = warp_; rank < g_.num_ranks; rank += kNumWarps) {
      int32_t begin = 0;  // of the step's experts
      int32_t used = 0, received = 0, routed = 0, all_before = 0;
#pragma unroll 1
      for (int32_t step = 0; step < plan_.num_local; step += 32 * kExpertsAtOnce) {
        const int32_t first = step + lane_ * kExpertsAtOnce;
        int32_t total[kExpertsAtOnce], occupied[kExpertsAtOnce], sum = 0;
#pragma unroll
        for (int i = 0; i < kExpertsAtOnce; ++i) {
          total[i] = occupied[i] = 0;
          if (first + i >= plan_.num_local) continue;
          total[i] = total_[rank * plan_.num_local + first + i];
          occupied[i] = plan_.room().occupied_rows(total[i]);
          sum += occupied[i];
        }
        int32_t end = sum;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
          const int32_t lower = __shfl_up_sync(kAllLanes, end, distance);
          if (lane_ >= distance) end += lower;
        }
        int32_t offset = begin + end - sum;
        begin += __shfl_sync(kAllLanes, end, 31);
#pragma unroll
        for (int i = 0; i < kExpertsAtOnce; ++i) {
          if (first + i >= plan_.num_local) continue;
          const int32_t e = rank * plan_.num_local + first + i;
          const int32_t most = plan_.room().most_rows(offset);
          const int32_t size = min(occupied[i], most), before = min(first_row_[e], most);
          offset_[e] = offset;
          size_[e] = size;
          first_row_[e] = offset + before;
          left_[e] = most - before;
          offset += occupied[i];
          used += size;
          received += min(total[i], size);
          routed += total[i];
          all_before += before;
        }
      }
      if (rank != g_.rank) continue;
      used = __reduce_add_sync(kAllLanes, used);
      received = __reduce_add_sync(kAllLanes, received);
      routed = __reduce_add_sync(kAllLanes, routed);
      all_before = __reduce_add_sync(kAllLanes, all_before);
      if (lane_ != 0) continue;
      shared_.num_used = used;
      shared_.num_received = received;
      shared_.num_routed = routed;
      shared_.num_before = all_before;
    }
  }

  // Slots of recv_order: kept rows of this rank's experts that come before the warp's ids. The kept
  // rows of an expert are contiguous, so they are counted without looking at ids.
  __device__ int32_t first_slot() const {
    const int32_t* const count = warp_count_ + warp_ * plan_.num_experts + first_local_;
    int32_t num_rows = 0;
#pragma unroll 4
    for (int32_t l = lane_; l < plan_.num_local; l += 32) {
      num_rows += min(count[l], left_[first_local_ + l]);
    }
    return shared_.num_before + __reduce_add_sync(kAllLanes, num_rows);
  }

  // 5. By a warp, its ids in order.
  __device__ void place_rows() {
    if (begin_ >= end_) return;
    int32_t* const count = warp_count_ + warp_ * plan_.num_experts;
    const uint32_t lower = (1u << lane_) - 1;
    int32_t next_slot = first_slot();
#pragma unroll 1
    for (int32_t step = begin_; step < end_; step += 32) {
      const int32_t flat = step + lane_, in_block = flat - block_begin_;
      int32_t id = kNotRouted;
      if (flat < end_) id = in_block < plan_.num_cached ? cached_[in_block] : id_at(flat);
      const bool routed = is_routed(id, plan_.num_experts);
      uint32_t same = __ballot_sync(kAllLanes, routed);  // the lanes with the same expert
#pragma unroll
      for (int b = 0; b < kExpertBits; ++b) {
        const bool bit = (id >> b & 1) != 0;
        const uint32_t set = __ballot_sync(kAllLanes, bit);
        same &= bit ? set : ~set;
      }
      int32_t row = kNoRow;
      if (routed) {
        const int32_t i = count[id] + __popc(same & lower);
        if (i < left_[id]) row = first_row_[id] + i;
      }
      __syncwarp();
      if (routed && (same & lower) == 0) count[id] += __popc(same);
      __syncwarp();
      const bool here = row != kNoRow && is_local(id);
      const uint32_t kept = __ballot_sync(kAllLanes, here);
      const int32_t slot = next_slot + __popc(kept & lower);
      next_slot += __popc(kept);
      if (flat >= end_) continue;
      if (is_own(flat)) a_.send_row[flat - first_own_] = row;
      if (here) {
        a_.recv_src[row] = flat;
        a_.recv_order[slot] = row;
      }
      const int32_t token = plan_.top_k.quotient(flat);
      if (token * plan_.top_k.divisor() == flat) a_.recv_offsets[token] = slot;
    }
  }

  // What holds no row: alignment padding, the tail, the end of recv_order. And all numbers of rows.
  __device__ void fill_rest() {
    if (plan_.expert_alignment.divisor() > 1 || plan_.expert_capacity > 0) {
      fill_padding(a_.recv_src, plan_.num_local,
                   {size_ + first_local_, total_ + first_local_, offset_ + first_local_});
    }
    fill_end(a_.recv_src, shared_.num_used, plan_.capacity);
    fill_end(a_.recv_order, shared_.num_received, plan_.capacity);
    if (blockIdx.x == 0) write_counters();
  }

  __device__ void write_counters() {
#pragma unroll 1
    for (int32_t e = threadIdx.x; e < plan_.num_experts; e += kNumThreads) {
      a_.expert_load[e] = total_[e];
      if (!is_local(e)) continue;
      a_.group_sizes[e - first_local_] = size_[e];
      a_.expert_counts[e - first_local_] = total_[e];
    }
    if (warp_ != 0) return;
    int32_t num_invalid = shared_.num_invalid;
    if (gridDim.x > 1) {
      num_invalid = 0;
#pragma unroll 1
      for (uint32_t b = lane_; b < gridDim.x; b += 32) {
        num_invalid += __ldcg(&g_.control->layout_counts[b][kMaxExperts]);
      }
      num_invalid = __reduce_add_sync(kAllLanes, num_invalid);
    }
    if (lane_ != 0) return;
    a_.recv_offsets[g_.num_ranks * a_.num_tokens] = shared_.num_received;
    a_.counters[0] = shared_.num_received;
    a_.counters[1] = shared_.num_routed - shared_.num_received;
    a_.counters[2] = num_invalid;
    tell_of_invalid_ids(g_, g_.rank, plan_.num_experts, num_invalid);
  }

  const GroupView& g_;
  const LayoutArguments& a_;
  const Plan& plan_;
  Shared& shared_;
  const int32_t first_local_;  // expert of this rank
  const int32_t first_own_;    // id of this rank, by flat number
  const int32_t warp_, lane_;
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

// Of several blocks two fit an SM: a rank that shares its GPU has not its SMs for itself alone, and a
// block that waits for [E2] on one of them must not keep out the block that it waits for.
template <bool kIsOneBlock>
__global__ __launch_bounds__(kNumThreads, kIsOneBlock ? 1 : 2) void layout_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ LayoutArguments a,
    const __grid_constant__ Plan plan) {
  extern __shared__ int4 memory[];
  __shared__ Shared shared;
  timeline::begin();
  const bool is_claimed = claim_call(g, OpKind::kLayout);
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.topk_idx)};
  if (blockIdx.x == 0) {
    send_start(g, OpKind::kLayout, is_claimed, own);  // [S1]
    if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS1);
  }
  TableBuilder tables(g, a, plan, reinterpret_cast<int32_t*>(memory), shared);
  tables.clear();
  bool ok = receive_start(g, OpKind::kLayout, is_claimed, own, shared.address);  // [S2]
  if (threadIdx.x == 0) timeline::mark(Role::kBlock, Event::kS2);
  ok = ok && tables.make();
  if (blockIdx.x == 0 && plan.are_cached()) {
    ok = receive_end(g, OpKind::kLayout) && ok;  // [E2]
    timeline::mark(Role::kBlock, Event::kE2);
  }
  timeline::end(g, OpKind::kLayout);
  Finish finish = finish_block(g, OpKind::kLayout, is_claimed, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kEnd && !plan.are_cached()) {
    send_end(g, end_epoch(g));                             // [E1]
    const bool is_good = receive_end(g, OpKind::kLayout);  // [E2]
    if (__syncthreads_and(is_good) == 0) finish = Finish::kFail;
  }
  if (finish == Finish::kEnd) return end_call(g);
  const auto num_units = [](uint32_t) { return 1; };  // peers tell of none
  fill_without_rows(a, g.num_ranks, fail_call(g, finish, num_units));
}

// One block for as many ids as its threads load at once: more blocks would meet, which takes longer.
// Beyond that more blocks have fewer ids each, but more lines to sum: as many as give each thread an
// id, up to kMany, then as many as give it two.
int64_t NumBlocks(int64_t num_ids, int64_t most) {
  constexpr int64_t kMany = 64;
  const int64_t with_one = (num_ids + kNumThreads - 1) / kNumThreads;
  if (with_one <= kIdsAtOnce) return 1;
  return std::min(most, std::max(std::min(with_one, kMany), with_one / 2));
}

constexpr int64_t SharedBytes(int64_t num_experts, int64_t num_cached) {
  return ((kNumWarps + 5) * num_experts + num_cached) * int64_t{sizeof(int32_t)};
}

// Ids of a block that are kept in shared memory, at most. One block alone has fewer, but on one SM.
constexpr int64_t MostCached(int64_t num_experts) {
  return (kMostSharedBytes - SharedBytes(num_experts, 0)) / int64_t{sizeof(int32_t)};
}
static_assert(MostCached(kMaxExperts) >= kIdsAtOnce * kNumThreads);

Plan::Plan(const LayoutArguments& a, int64_t num_ranks, int64_t most_blocks)
    : ids_per_rank(a.num_tokens * a.top_k),
      top_k(a.top_k),
      expert_alignment(a.room.expert_alignment) {
  const auto narrow = [](int64_t size) { return static_cast<int32_t>(size); };
  const int64_t all_ids = a.num_tokens * a.top_k * num_ranks;
  num_ids = narrow(all_ids);
  num_blocks = narrow(NumBlocks(all_ids, most_blocks));
  ids_per_block = narrow((all_ids + num_blocks - 1) / num_blocks);
  ids_per_warp = (ids_per_block / kNumWarps + 31) / 32 * 32;
  num_experts = narrow(a.num_experts);
  num_cached = narrow(std::min<int64_t>(ids_per_block, MostCached(a.num_experts)));
  num_local = narrow(a.num_experts / num_ranks);
  capacity = narrow(a.room.capacity);
  expert_capacity = narrow(a.room.expert_capacity);
  log2_quads = 0;
  while (4 << log2_quads < num_experts) ++log2_quads;
}

}  // namespace

cudaError_t LaunchLayout(const GroupView& group, const LayoutArguments& a, int num_sms,
                         cudaStream_t stream) {
  const Plan plan(a, group.num_ranks, std::min(num_sms, kMaxLayoutBlocks));
  const auto kernel = plan.num_blocks == 1 ? layout_kernel<true> : layout_kernel<false>;
  kernel<<<static_cast<unsigned>(plan.num_blocks), kNumThreads,
           SharedBytes(plan.num_experts, plan.num_cached), stream>>>(group, a, plan);
  return cudaGetLastError();
}

cudaError_t PrepareLayout() {
  for (const auto kernel : {layout_kernel<true>, layout_kernel<false>}) {
    if (cudaError_t e = PrepareKernel(kernel, kMostSharedBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu
