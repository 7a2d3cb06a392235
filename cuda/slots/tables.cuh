// The tables of a layout, computed by each block for itself from all ranks' ids as they come. It
// keeps where each of this rank's rows goes, and writes its share of the tables to memory: what
// cuda/direct/layout.cu writes, to the bit. layout_and_dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_SLOTS_TABLES_CUH_
#define JAX_EP_CUDA_SLOTS_TABLES_CUH_

#include <cub/block/block_scan.cuh>

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/slots/units.h"
#include "cuda/sync/slots.cuh"

namespace jax_ep::gpu::slots {

inline constexpr int kExpertsPerThread = kMaxExperts / kNumThreads;
using BlockScan = cub::BlockScan<int32_t, kNumThreads, cub::BLOCK_SCAN_WARP_SCANS>;

struct TablesShared {
  typename BlockScan::TempStorage scan;
  int32_t num_invalid;               // of this rank's ids
  int32_t num_received, num_routed;  // of all experts of this rank
};

// Of R * T * K ids: each warp has a run of them, whole steps of 32.
JAX_EP_HOST_DEVICE constexpr int32_t ids_per_warp(int64_t num_ids) {
  return static_cast<int32_t>((num_ids + kNumThreads - 1) / kNumThreads * 32);
}
JAX_EP_HOST_DEVICE constexpr int32_t num_counting_warps(int64_t num_ids) {
  return static_cast<int32_t>((num_ids + ids_per_warp(num_ids) - 1) / ids_per_warp(num_ids));
}
// Of shared memory.
constexpr int64_t tables_bytes(int64_t num_ids, int64_t num_experts) {
  return (2 * num_ids + (num_counting_warps(num_ids) + 4) * num_experts) * int64_t{4};
}

class BlockTables {
  static constexpr int kIdsAtOnce = 8;  // of a lane, on their way
  // What is kept of a routed id: the expert, and its place among the warp's ids of that expert.
  static constexpr int kExpertBits = 10;
  static_assert(kMaxExperts <= 1 << kExpertBits);
  static_assert(kMaxSlotGroupIds < 1 << (31 - kExpertBits));

 public:
  __device__ BlockTables(const GroupView& g, const LayoutAndDispatchArguments& a,
                         const SlotAreas& areas, int32_t* memory, TablesShared& shared)
      : g_(g),
        a_(a),
        areas_(areas),
        shared_(shared),
        num_experts_(static_cast<int32_t>(a.num_experts)),
        num_local_(num_experts_ / g.num_ranks),
        first_local_(g.rank * num_local_),
        ids_per_rank_(static_cast<int32_t>(a.num_tokens * a.top_k)),
        num_ids_(ids_per_rank_ * g.num_ranks),
        num_warps_(num_counting_warps(num_ids_)),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        begin_(min(num_ids_, warp_ * ids_per_warp(num_ids_))),
        end_(min(num_ids_, begin_ + ids_per_warp(num_ids_))),
        row_(memory),
        weight_(reinterpret_cast<float*>(memory + num_ids_)),
        warp_count_(memory + 2 * num_ids_),
        total_(warp_count_ + num_warps_ * num_experts_),
        scan_(total_ + num_experts_),
        offset_(scan_ + num_experts_),
        most_(offset_ + num_experts_) {}

  // Needs no id; before the block's next barrier.
  __device__ void clear() {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < num_warps_ * num_experts_;
         i += kNumThreads) {
      warp_count_[i] = 0;
    }
    if (threadIdx.x == 0) shared_.num_invalid = shared_.num_received = shared_.num_routed = 0;
  }

  // By all threads of the block. False if the group is broken; the same on all threads. Then all of
  // the block know where rows go.
  __device__ bool make() {
    if (__syncthreads_and(count_ids()) == 0) return false;
    sum_warps();
    place_experts();
    place_rows();
    __syncthreads();
    return true;
  }

  // The row here of (source rank, token, k) by flat number; kNoRow: none.
  __device__ int32_t row(int32_t flat) const { return row_[flat]; }
  // Likewise, from there on.
  __device__ const int32_t* rows(int32_t flat) const { return row_ + flat; }
  // Where the rows of this rank's experts end, padding included.
  __device__ int32_t num_used() const {
    const int32_t last = first_local_ + num_local_ - 1;
    return min(offset_[last] + group_size(last), capacity());
  }

  // Calls zero(row), by a warp, for the block's share of the rows of a kind that hold none: padding
  // of the experts, and the tail.
  template <typename Zero>
  __device__ void for_each_empty_row(bool is_tail_too, const Zero& zero) const {
    const auto stride = static_cast<int32_t>(gridDim.x);
    const auto from = [&](int32_t row) {
      return row + (static_cast<int32_t>(blockIdx.x) + stride - row % stride) % stride;
    };
    for (int32_t e = first_local_ + warp_; e < first_local_ + num_local_; e += kNumWarps) {
      const int32_t begin = offset_[e] + rows_kept(e), end = offset_[e] + group_size(e);
      if (begin >= end) continue;
      for (int32_t i = from(begin); i < end; i += stride) zero(i);
    }
    if (!is_tail_too || num_used() >= capacity()) return;
    for (int32_t i = from(num_used()) + warp_ * stride; i < capacity(); i += kNumWarps * stride) {
      zero(i);
    }
  }

  // What holds no row, and all numbers of rows.
  __device__ void fill_rest() const {
    const auto block = static_cast<int32_t>(blockIdx.x), stride = static_cast<int32_t>(gridDim.x);
    const auto thread = static_cast<int32_t>(threadIdx.x);
    for (int32_t e = first_local_ + thread; e < first_local_ + num_local_; e += kNumThreads) {
      const int32_t size = group_size(e);
      if (block == stride - 1) {
        a_.group_sizes[e - first_local_] = size;
        a_.expert_counts[e - first_local_] = total_[e];
      }
    }
    // The warps of all blocks share the padding.
    for (int32_t e = first_local_ + block * kNumWarps + warp_; e < first_local_ + num_local_;
         e += stride * kNumWarps) {
      const int32_t end = offset_[e] + group_size(e);
      for (int32_t i = offset_[e] + rows_kept(e) + lane_; i < end; i += 32) {
        a_.recv_src[i] = kNoSource;
      }
    }
    const int32_t first = block * kNumThreads + thread;
    for (int32_t i = num_used() + first; i < capacity(); i += stride * kNumThreads) {
      a_.recv_src[i] = kNoSource;
    }
    for (int32_t i = shared_.num_received + first; i < capacity(); i += stride * kNumThreads) {
      a_.recv_order[i] = kNoSource;
    }
    if (block != stride - 1) return;
    for (int32_t e = thread; e < num_experts_; e += kNumThreads) a_.expert_load[e] = total_[e];
    if (thread != 0) return;
    a_.recv_offsets[g_.num_ranks * a_.num_tokens] = shared_.num_received;
    a_.counters[0] = shared_.num_received;
    a_.counters[1] = shared_.num_routed - shared_.num_received;
    a_.counters[2] = shared_.num_invalid;
  }

 private:
  __device__ int32_t capacity() const { return static_cast<int32_t>(a_.room.capacity); }
  // Of an expert, padding included.
  __device__ int32_t group_size(int32_t e) const {
    return static_cast<int32_t>(a_.room.group_size(offset_[e], total_[e]));
  }
  __device__ int32_t rows_kept(int32_t e) const { return min(total_[e], most_[e]); }

  // By a warp, its ids, which nobody else looks at until the counts are summed. False if the group
  // is broken.
  __device__ bool count_ids() {
    bool ok = true;
    for (int32_t step = begin_; step < end_ && ok; step += 32 * kIdsAtOnce) {
      int32_t id[kIdsAtOnce];
      float weight[kIdsAtOnce];
      ok = __all_sync(0xffffffffu, get_ids(step + lane_, id, weight)) != 0;
#pragma unroll
      for (int j = 0; j < kIdsAtOnce; ++j) {
        if (step + 32 * j < end_) count_step(step + 32 * j + lane_, id[j], weight[j]);
      }
    }
    return ok;
  }

  // The lane's ids: this rank's own, and what peers have sent, for which it waits.
  __device__ bool get_ids(int32_t first, int32_t (&id)[kIdsAtOnce], float (&weight)[kIdsAtOnce]) {
    const SlotEntry* entry[kIdsAtOnce];
    int32_t src[kIdsAtOnce];
    uint32_t missing = 0;
#pragma unroll
    for (int j = 0; j < kIdsAtOnce; ++j) {
      const int32_t flat = first + 32 * j;
      src[j] = flat / ids_per_rank_;
      const int32_t i = flat - src[j] * ids_per_rank_;
      id[j] = kNotRouted;
      weight[j] = 0.0f;
      entry[j] = nullptr;
      if (flat >= end_) continue;
      if (src[j] != g_.rank) {
        entry[j] = entries_of(areas_.here[src[j]]) + i;
        missing |= 1u << j;
      } else {
        id[j] = a_.topk_idx[i];
        if (a_.weights != nullptr) weight[j] = a_.topk_weights[i];
      }
    }
    SlotWait wait(g_, OpKind::kLayoutAndDispatch);
    for (uint32_t n = 1; missing != 0; ++n) {
      bool asks = (n & 255u) == 0;  // for the first that is missing: the wait has one clock
      uint64_t value[kIdsAtOnce], epoch[kIdsAtOnce];
#pragma unroll
      for (int j = 0; j < kIdsAtOnce; ++j) {
        if ((missing >> j & 1) != 0) ld_relaxed_sys_b128(entry[j], value[j], epoch[j]);
      }
#pragma unroll
      for (int j = 0; j < kIdsAtOnce; ++j) {
        if ((missing >> j & 1) == 0) continue;
        const uint64_t expected = areas_.epoch[src[j]];
        if (epoch[j] == expected) {  // [I2]
          id[j] = static_cast<int32_t>(value[j]);
          weight[j] = __uint_as_float(static_cast<uint32_t>(value[j] >> 32));
          missing &= ~(1u << j);
        } else if (asks) {
          asks = false;
          if (!wait.may_go_on(src[j], expected, epoch[j])) return false;
        }
      }
    }
    return true;
  }

  __device__ void count_step(int32_t flat, int32_t id, float weight) {
    const bool routed = is_routed(id, num_experts_);
    const bool is_own = static_cast<uint32_t>(flat - g_.rank * ids_per_rank_) <
                        static_cast<uint32_t>(ids_per_rank_);
    const bool invalid = flat < end_ && is_own && is_invalid(id, num_experts_);
    const uint32_t all_invalid = __ballot_sync(0xffffffffu, invalid);
    const uint32_t same = __match_any_sync(0xffffffffu, routed ? id : -1);
    const uint32_t lower = same & ((1u << lane_) - 1);
    int32_t* count = &warp_count_[warp_ * num_experts_ + (routed ? id : 0)];
    const int32_t before = *count;
    __syncwarp();
    if (routed && lower == 0) *count = before + __popc(same);
    __syncwarp();
    if (lane_ == 0 && all_invalid != 0) atomicAdd(&shared_.num_invalid, __popc(all_invalid));
    if (flat >= end_) return;
    row_[flat] = routed ? id | (before + __popc(lower)) << kExpertBits : -1;
    weight_[flat] = weight;
  }

  // By expert: total, and what warp_count has become: the counts of the warps before.
  __device__ void sum_warps() {
    for (int32_t e = static_cast<int32_t>(threadIdx.x); e < num_experts_; e += kNumThreads) {
      int32_t sum = 0;
#pragma unroll 8
      for (int32_t w = 0; w < num_warps_; ++w) {
        const int32_t count = warp_count_[w * num_experts_ + e];
        warp_count_[w * num_experts_ + e] = sum;
        sum += count;
      }
      total_[e] = sum;
    }
    __syncthreads();
  }

  // Where each expert begins on its rank, and how many rows it may keep.
  __device__ void place_experts() {
    int32_t occupied[kExpertsPerThread];
    const int32_t first = static_cast<int32_t>(threadIdx.x) * kExpertsPerThread;
    if (a_.room.expert_capacity == 0) {  // else a scan over all ranks' experts could leave int32
#pragma unroll
      for (int i = 0; i < kExpertsPerThread; ++i) {
        occupied[i] = first + i < num_experts_
                          ? static_cast<int32_t>(a_.room.occupied_rows(total_[first + i]))
                          : 0;
      }
      BlockScan(shared_.scan).ExclusiveSum(occupied, occupied);
#pragma unroll
      for (int i = 0; i < kExpertsPerThread; ++i) {
        if (first + i < num_experts_) scan_[first + i] = occupied[i];
      }
    }
    __syncthreads();
    int32_t received = 0, routed = 0;
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i) {
      const int32_t e = first + i;
      if (e >= num_experts_) break;
      const int32_t first_of_rank = e / num_local_ * num_local_;
      offset_[e] = a_.room.expert_capacity > 0
                       ? (e - first_of_rank) * static_cast<int32_t>(a_.room.expert_capacity)
                       : occupied[i] - scan_[first_of_rank];
      most_[e] = static_cast<int32_t>(a_.room.most_rows(offset_[e]));
      if (e < first_local_ || e >= first_local_ + num_local_) continue;
      received += rows_kept(e);
      routed += total_[e];
    }
    if (routed != 0) {
      atomicAdd(&shared_.num_received, received);
      atomicAdd(&shared_.num_routed, routed);
    }
    __syncthreads();
  }

  // Kept rows of this rank's experts that come before the warp's ids. The kept rows of an expert
  // are contiguous, so they are counted without looking at ids.
  __device__ int32_t first_in_order() const {
    int32_t before = 0;
    for (int32_t e = first_local_ + lane_; e < first_local_ + num_local_; e += 32) {
      before += min(warp_count_[warp_ * num_experts_ + e], most_[e]);
    }
    return __reduce_add_sync(0xffffffffu, before);
  }

  // By a warp, its ids in order. The blocks share the steps of 32 among them.
  __device__ void place_rows() {
    if (begin_ >= end_) return;
    int32_t next = first_in_order();
    auto owner = static_cast<uint32_t>(begin_ / 32) % gridDim.x;
    for (int32_t step = begin_; step < end_; step += 32) {
      const int32_t flat = step + lane_;
      const int32_t kept_of_id = flat < end_ ? row_[flat] : -1;
      const int32_t id = kept_of_id < 0 ? kNotRouted : kept_of_id & ((1 << kExpertBits) - 1);
      int32_t row = kNoRow;
      if (id != kNotRouted) {
        const int32_t i = warp_count_[warp_ * num_experts_ + id] + (kept_of_id >> kExpertBits);
        if (i < most_[id]) row = offset_[id] + i;
      }
      const bool here = row != kNoRow && id >= first_local_ && id < first_local_ + num_local_;
      const uint32_t kept = __ballot_sync(0xffffffffu, here);
      if (owner == blockIdx.x && flat < end_) {
        write_step(flat, row, here, next + __popc(kept & ((1u << lane_) - 1)));
      }
      if (flat < end_) row_[flat] = here ? row : kNoRow;
      next += __popc(kept);
      if (++owner == gridDim.x) owner = 0;
    }
  }

  __device__ void write_step(int32_t flat, int32_t row, bool here, int32_t place) const {
    const auto top_k = static_cast<int32_t>(a_.top_k);
    const int32_t own = flat - g_.rank * ids_per_rank_;
    if (own >= 0 && own < ids_per_rank_) a_.send_row[own] = row;
    if (here) {
      a_.recv_src[row] = flat;
      a_.recv_order[place] = row;
      if (a_.weights != nullptr) a_.weights[row] = weight_[flat];
    }
    const int32_t token = flat / top_k;
    if (flat == token * top_k) a_.recv_offsets[token] = place;
  }

  const GroupView& g_;
  const LayoutAndDispatchArguments& a_;
  const SlotAreas& areas_;
  TablesShared& shared_;
  const int32_t num_experts_, num_local_, first_local_, ids_per_rank_, num_ids_, num_warps_, warp_,
      lane_;
  const int32_t begin_, end_;  // the warp's ids
  // In shared memory.
  int32_t* const row_;         // [R * T * K], first what is kept of an id
  float* const weight_;        // [R * T * K]
  int32_t* const warp_count_;  // [num_warps][E]: the warp's ids; then those of the warps before
  int32_t* const total_;       // [E], ids of all ranks
  int32_t* const scan_;        // [E], where the expert would begin if there were one rank
  int32_t* const offset_;      // [E], where it begins on its rank
  int32_t* const most_;        // [E], rows that it may keep
};

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_TABLES_CUH_
