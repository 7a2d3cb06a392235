// The tables of a layout, computed by each block that receives, from all ranks' ids as they come. It
// keeps where each of this rank's rows goes, and writes its share of the tables to memory: what
// cuda/direct/layout.cu writes, to the bit. layout_and_dispatch.cuh states the protocol.
//
// In calls of a few microseconds each instruction runs once, and has to be fetched first: so loops
// are not unrolled where few loads wait for each other, and what only some calls need is called.
#ifndef JAX_EP_CUDA_SLOTS_TABLES_CUH_
#define JAX_EP_CUDA_SLOTS_TABLES_CUH_

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/slots/table_steps.h"
#include "cuda/slots/teams.cuh"
#include "cuda/slots/units.h"
#include "cuda/sync/notice.cuh"
#include "cuda/sync/slots.cuh"

namespace jax_ep::gpu::slots {

struct TablesShared {
  int32_t warp_rows[kNumWarps];      // that the experts of each warp's threads occupy
  int32_t warp_here[kNumWarps];      // ids of each warp that are of this rank's experts
  int32_t num_invalid;               // of this rank's ids
  int32_t num_received, num_routed;  // of all experts of this rank
};

// What a block knows of a row of its rank's experts that there is no room for; kNoRow is what is none.
inline constexpr int32_t kDroppedRow = -2;
static_assert(kDroppedRow != kNoRow);

// Far: of OneNode or AcrossNodes.
template <typename Far>
class BlockTables : Far {
  static constexpr int kIdsAtOnce = 4;  // of a lane, on their way
  static constexpr int kExpertsPerThread = kMaxExperts / kNumThreads;
  static_assert(kExpertsPerThread == 2);
  // What is kept of a routed id: the expert, and its place among the warp's ids of that expert.
  static constexpr int kExpertBits = 10;
  static_assert(kMaxExperts <= 1 << kExpertBits);
  static_assert(kMaxSlotGroupIds < 1 << (31 - kExpertBits));

 public:
  // For block `block` of `num_blocks` that have a share of what is written.
  __device__ BlockTables(const GroupView& g, const Far& far, const LayoutAndDispatchArguments& a,
                         const TableSteps& steps, SlotAreas& areas, int32_t* memory,
                         TablesShared& shared, int32_t block, int32_t num_blocks)
      : Far(far),
        g_(g),
        a_(a),
        steps_(steps),
        areas_(areas),
        shared_(shared),
        num_experts_(static_cast<int32_t>(a.num_experts)),
        first_local_(far.rank(g) * steps.experts_per_rank.divisor()),
        num_ids_(steps.ids_per_rank.divisor() * far.num_ranks(g)),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        block_(block),
        num_blocks_(num_blocks),
        begin_(min(num_ids_, warp_ * steps.ids_per_warp)),
        end_(min(num_ids_, begin_ + steps.ids_per_warp)),
        row_(memory),
        weight_(reinterpret_cast<float*>(memory + num_ids_)),
        total_(memory + 2 * num_ids_),
        scan_(total_ + num_experts_),
        warp_count_(scan_ + num_experts_) {}

  // Needs no id; before the block's next barrier.
  __device__ void clear() {
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < steps_.num_warps * num_experts_;
         i += kNumThreads) {
      warp_count_[i] = 0;
    }
    if (threadIdx.x == 0) shared_.num_invalid = 0;
  }

  // By all threads of the block. False if the group is broken; the same on all threads. Then all of
  // the block know where rows go.
  __device__ bool make(SlotWait& wait) {
    if constexpr (Far::kExists) {
      const bool has_told = this->await_told(warp_, kNumWarps);  // [T2]
      if (__syncthreads_and(has_told) == 0) return false;
    }
    bool ok = get_ids(wait);
    if (block_ == 0 && warp_ == kNumWarps - 1) {
      ok &= receive_slot_flags(g_, OpKind::kLayoutAndDispatch, areas_, wait);  // [W2]
    }
    __syncwarp();
    count_ids();
    if (__syncthreads_and(ok) == 0) return false;
    place_experts();
    place_rows();
    __syncthreads();
    return true;
  }

  // The rows here of (source rank, token, k), by flat number; kNoRow: none; of another node's rank
  // also kDroppedRow.
  __device__ int32_t row(int32_t flat) const { return row_[flat]; }

  // Where the rows of this rank's experts end, padding included.
  __device__ int32_t num_used() const {
    const int32_t last = first_local_ + num_local() - 1;
    return min(offset_of(last) + group_size(last), capacity());
  }
  __device__ bool has_padding() const {
    return a_.room.expert_alignment != 1 || a_.room.expert_capacity != 0;
  }
  __device__ int32_t first_local() const { return first_local_; }
  __device__ int32_t num_local() const { return steps_.experts_per_rank.divisor(); }
  // Of an expert of this rank: the rows that are padding.
  struct Padding {
    int32_t begin, end;
  };
  __device__ Padding padding_of(int32_t e) const {
    const int32_t offset = offset_of(e);
    return {offset + room().rows_kept(offset, total_[e]), offset + group_size(e)};
  }

  // What holds no row, but for padding, and all numbers of rows: the block's share.
  __device__ void fill_rest() const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    const int32_t first = block_ * kNumThreads + thread;
#pragma unroll 1
    for (int32_t i = num_used() + first; i < capacity(); i += num_blocks_ * kNumThreads) {
      a_.recv_src[i] = kNoSource;
    }
#pragma unroll 1
    for (int32_t i = shared_.num_received + first; i < capacity(); i += num_blocks_ * kNumThreads) {
      a_.recv_order[i] = kNoSource;
    }
    if (block_ != num_blocks_ - 1) return;
#pragma unroll 1
    for (int32_t e = thread; e < num_experts_; e += kNumThreads) {
      const int32_t total = total_[e], local = e - first_local_;
      a_.expert_load[e] = total;
      if (local < 0 || local >= num_local()) continue;
      a_.group_sizes[local] = group_size(e);
      a_.expert_counts[local] = total;
    }
    if (thread != 0) return;
    a_.recv_offsets[Far::num_ranks(g_) * a_.num_tokens] = shared_.num_received;
    a_.counters[0] = shared_.num_received;
    a_.counters[1] = shared_.num_routed - shared_.num_received;
    a_.counters[2] = shared_.num_invalid;
    tell_of_invalid_ids(g_, Far::rank(g_), num_experts_, shared_.num_invalid);
  }

 private:
  __device__ int32_t capacity() const { return static_cast<int32_t>(a_.room.capacity); }
  __device__ RoomOf<int32_t, const Divider&> room() const {
    return {capacity(), steps_.expert_alignment, static_cast<int32_t>(a_.room.expert_capacity)};
  }
  // Where an expert begins on its rank.
  __device__ int32_t offset_of(int32_t e) const {
    const int32_t first = steps_.experts_per_rank.quotient(e) * num_local();
    const auto own = static_cast<int32_t>(a_.room.expert_capacity);
    return own > 0 ? (e - first) * own : scan_[e] - scan_[first];
  }
  // Padding included.
  __device__ int32_t group_size(int32_t e) const {
    return room().group_size(offset_of(e), total_[e]);
  }

  // By a warp, its ids: this rank's own, and what peers have sent, for which it waits. False on a
  // lane that finds the group broken.
  __device__ bool get_ids(SlotWait& wait) {
#pragma unroll 1
    for (int32_t step = begin_; step < end_; step += 32 * kIdsAtOnce) {
      const SlotEntry* entry[kIdsAtOnce];
      int32_t src[kIdsAtOnce];
      uint32_t missing = 0;
#pragma unroll
      for (int j = 0; j < kIdsAtOnce; ++j) {
        const int32_t flat = step + 32 * j + lane_;
        if (flat >= end_) continue;
        src[j] = steps_.ids_per_rank.quotient(flat);
        const int32_t i = flat - src[j] * steps_.ids_per_rank.divisor();
        if (src[j] == Far::rank(g_)) {
          row_[flat] = a_.topk_idx[i];
          weight_[flat] = a_.weights != nullptr ? a_.topk_weights[i] : 0.0f;
        } else if (Far::is_far(src[j])) {
          if constexpr (Far::kExists) {
            const auto told = this->entry(src[j], i);
            row_[flat] = told.id;
            weight_[flat] = told.weight;
          }
        } else {
          src[j] = Far::index(src[j]);
          entry[j] = entries_of(areas_.here[src[j]]) + i;
          missing |= 1u << j;
        }
      }
      uint32_t looks_at = missing;  // all blocks look: at as little as will do
      for (uint32_t n = 1; missing != 0;) {
        uint64_t value[kIdsAtOnce], epoch[kIdsAtOnce];
#pragma unroll
        for (int j = 0; j < kIdsAtOnce; ++j) {
          if ((looks_at >> j & 1) != 0) ld_relaxed_sys_b128(entry[j], value[j], epoch[j]);
        }
        int32_t late = -1;  // a rank whose id is missing
        const uint32_t before = missing;
#pragma unroll
        for (int j = 0; j < kIdsAtOnce; ++j) {
          if ((looks_at >> j & 1) == 0) continue;
          if (epoch[j] == areas_.epoch[src[j]]) {  // [I2]
            const int32_t flat = step + 32 * j + lane_;
            row_[flat] = static_cast<int32_t>(value[j]);
            weight_[flat] = __uint_as_float(static_cast<uint32_t>(value[j] >> 32));
            missing &= ~(1u << j);
          } else {
            late = src[j];
          }
        }
        looks_at = missing != before ? missing : missing & (0u - missing);
        if (late >= 0 && !wait.may_go_on(n++, late, areas_.epoch[late])) return false;
      }
    }
    return true;
  }

  // Likewise; nobody else looks at its counts until they are summed.
  __device__ void count_ids() {
    int32_t* const count = warp_count_ + warp_ * num_experts_;
    int32_t num_invalid = 0, num_here = 0;
#pragma unroll 1
    for (int32_t step = begin_; step < end_; step += 32) {
      const int32_t flat = step + lane_;
      const int32_t id = flat < end_ ? row_[flat] : kNotRouted;
      const bool routed = is_routed(id, num_experts_);
      if (!routed && id != kNotRouted && is_own(flat)) ++num_invalid;
      num_here += is_here(id);
      // The lanes with the same expert, bit by bit.
      uint32_t same = __ballot_sync(0xffffffffu, routed);
#pragma unroll
      for (int b = 0; b < kExpertBits; ++b) {
        const bool bit = (id >> b & 1) != 0;
        const uint32_t set = __ballot_sync(0xffffffffu, bit);
        same &= bit ? set : ~set;
      }
      const uint32_t lower = same & ((1u << lane_) - 1);
      const int32_t before = routed ? count[id] : 0;
      __syncwarp();
      if (routed && lower == 0) count[id] = before + __popc(same);
      __syncwarp();
      if (flat < end_) row_[flat] = routed ? id | (before + __popc(lower)) << kExpertBits : -1;
    }
    num_here = __reduce_add_sync(0xffffffffu, num_here);
    if (lane_ == 0) shared_.warp_here[warp_] = num_here;
    if (num_invalid != 0) atomicAdd(&shared_.num_invalid, num_invalid);
  }

  // By thread, for two experts: total, what warp_count has become (the counts of the warps before),
  // and where they would begin if all were on one rank.
  __device__ void place_experts() {
    const int32_t first = kExpertsPerThread * static_cast<int32_t>(threadIdx.x);
    int32_t rows[kExpertsPerThread] = {};
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i) {
      if (first + i < num_experts_) rows[i] = sum_warps(first + i);
    }
    int32_t before = rows[0] + rows[1];  // becomes that of the lanes up to this one
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int32_t other = __shfl_up_sync(0xffffffffu, before, d);
      if (lane_ >= d) before += other;
    }
    if (lane_ == 31) shared_.warp_rows[warp_] = before;
    before -= rows[0] + rows[1];
    __syncthreads();
    before += __reduce_add_sync(0xffffffffu, lane_ < warp_ ? shared_.warp_rows[lane_] : 0);
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i) {
      if (first + i < num_experts_) scan_[first + i] = before;
      before += rows[i];
    }
    __syncthreads();
  }
  // Of an expert; the rows that it occupies where experts share the capacity.
  __device__ int32_t sum_warps(int32_t e) {
    constexpr int kAtOnce = 4;
    int32_t sum = 0;
#pragma unroll 1
    for (int32_t w = 0; w < steps_.num_warps; w += kAtOnce) {
      int32_t* const count = warp_count_ + w * num_experts_ + e;
      int32_t of_warp[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        of_warp[i] = w + i < steps_.num_warps ? count[i * num_experts_] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (w + i < steps_.num_warps) count[i * num_experts_] = sum;
        sum += of_warp[i];
      }
    }
    total_[e] = sum;
    return round_up(sum, room().expert_alignment);
  }

  // By a warp: kept rows of this rank's experts that come before the warp's ids. The last warp also
  // counts all of them.
  __device__ int32_t rows_before() {
    const int32_t last = first_local_ + num_local() - 1;
    int32_t before = 0, received = 0, routed = 0;
    if (a_.room.expert_capacity == 0 && offset_of(last) + total_[last] <= capacity()) {
      const int32_t here = lane_ < kNumWarps ? shared_.warp_here[lane_] : 0;  // all are kept
      before = lane_ < warp_ ? here : 0;
      received = routed = here;
    } else {  // the rows of an expert are contiguous
#pragma unroll 1
      for (int32_t e = first_local_ + lane_; e <= last; e += 32) {
        const int32_t most = room().most_rows(offset_of(e));
        if (begin_ < end_) before += min(warp_count_[warp_ * num_experts_ + e], most);
        received += min(total_[e], most);
        routed += total_[e];
      }
    }
    if (warp_ == kNumWarps - 1) {
      received = __reduce_add_sync(0xffffffffu, received);
      routed = __reduce_add_sync(0xffffffffu, routed);
      if (lane_ == 0) {
        shared_.num_received = received;
        shared_.num_routed = routed;
      }
    }
    return __reduce_add_sync(0xffffffffu, before);
  }

  // By a warp, its ids in order. The blocks share the steps of 32 among them.
  __device__ void place_rows() {
    int32_t next = rows_before();
    if (begin_ >= end_) return;
    int32_t owner = begin_ / 32 % num_blocks_;
#pragma unroll 1
    for (int32_t step = begin_; step < end_; step += 32) {
      const int32_t flat = step + lane_;
      const int32_t kept_of_id = flat < end_ ? row_[flat] : -1;
      int32_t row = kNoRow;
      bool here = false;
      if (kept_of_id >= 0) {
        const int32_t id = kept_of_id & ((1 << kExpertBits) - 1);
        const int32_t i = warp_count_[warp_ * num_experts_ + id] + (kept_of_id >> kExpertBits);
        const int32_t offset = offset_of(id);
        if (i < room().most_rows(offset)) row = offset + i;
        here = row != kNoRow && is_here(id);
      }
      const uint32_t kept = __ballot_sync(0xffffffffu, here);
      if (owner == block_ && flat < end_) {
        write_step(flat, row, here, next + __popc(kept & ((1u << lane_) - 1)));
      }
      const bool is_dropped = Far::kExists && kept_of_id >= 0 && !here &&
                              is_here(kept_of_id & ((1 << kExpertBits) - 1));
      if (flat < end_) row_[flat] = here ? row : is_dropped ? kDroppedRow : kNoRow;
      next += __popc(kept);
      if (++owner == num_blocks_) owner = 0;
    }
  }

  // Of this rank's experts.
  __device__ bool is_here(int32_t id) const {
    return static_cast<uint32_t>(id - first_local_) < static_cast<uint32_t>(num_local());
  }
  // Of this rank's tokens.
  __device__ int32_t own_of(int32_t flat) const {
    return flat - Far::rank(g_) * steps_.ids_per_rank.divisor();
  }
  __device__ bool is_own(int32_t flat) const {
    return static_cast<uint32_t>(own_of(flat)) <
           static_cast<uint32_t>(steps_.ids_per_rank.divisor());
  }

  __device__ void write_step(int32_t flat, int32_t row, bool here, int32_t place) const {
    if (is_own(flat)) a_.send_row[own_of(flat)] = row;
    if (here) {
      a_.recv_src[row] = flat;
      a_.recv_order[place] = row;
      if (a_.weights != nullptr) a_.weights[row] = weight_[flat];
    }
    const int32_t token = steps_.top_k.quotient(flat);
    if (flat == token * steps_.top_k.divisor()) a_.recv_offsets[token] = place;
  }

  const GroupView& g_;
  const LayoutAndDispatchArguments& a_;
  const TableSteps& steps_;
  SlotAreas& areas_;
  TablesShared& shared_;
  const int32_t num_experts_, first_local_, num_ids_, warp_, lane_, block_, num_blocks_;
  const int32_t begin_, end_;  // the warp's ids
  // In shared memory.
  int32_t* const row_;         // [R * T * K], first the ids, then what is kept of them
  float* const weight_;        // [R * T * K]
  int32_t* const total_;       // [E], ids of all ranks
  int32_t* const scan_;        // [E], where the expert would begin if there were one rank
  int32_t* const warp_count_;  // [num_warps][E]: the warp's ids; then those of the warps before
};

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_TABLES_CUH_
