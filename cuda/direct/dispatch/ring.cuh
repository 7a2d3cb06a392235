// A ring of stages, which a warp fills and empties: what senders and receivers have in common.
// dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_DISPATCH_RING_CUH_
#define JAX_EP_CUDA_DIRECT_DISPATCH_RING_CUH_

#include "cuda/direct/dispatch/plan.h"
#include "cuda/direct/dispatch/shared.cuh"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/bulk_copy.cuh"

namespace jax_ep::gpu::dispatch {

template <typename Rows>
class Ring {
  static constexpr int kNumHelpers = Rows::kFormat.num_helpers;

 public:
  // `index` of `count` of its kind; `slot` of all rings of the block.
  __device__ Ring(const GroupView& g, const DispatchArguments& a, const Plan& plan,
                  Shared<Rows>& shared, int32_t index, int32_t count, int32_t slot,
                  int32_t first_unit, char* memory)
      : g_(g),
        a_(a),
        plan_(plan),
        shared_(shared),
        index_(index),
        count_(count),
        first_slot_(slot * plan.num_stages),
        first_unit_(first_unit),
        num_units_(num_steps(shared.box.num_units, index, count_)),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        rows_(a, memory + plan.num_stages * stage_bytes()),
        stages_(memory) {}

  // By a helper: its part of all units.
  __device__ void help(int32_t part) {
    if constexpr (kNumHelpers > 0) {
      while (true) {
        mbarrier_wait_parity(&shared_.full[store_slot()], parity_);  // [L]
        const Unit unit = shared_.unit[store_slot()];
        if (unit.bytes == 0) return;
        const uint64_t to = is_verbatim(unit) ? 0 : shared_.to[store_slot()][lane_];
        rows_.help(stage(store_stage_), beside(store_stage_), to,
                   shared_.extra[store_slot()][lane_], part);
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(&shared_.computed[store_slot()]);  // [M]
        leave_store_stage();
      }
    }
  }

 protected:
  // Of the ring's i-th unit: its number in the group.
  __device__ int32_t unit_of(int32_t i) const { return first_unit_ + index_ + i * count_; }
  __device__ int64_t token_of(int32_t unit) const {
    return plan_.num_pieces == 1 ? unit : unit / plan_.num_pieces;
  }
  // Where a unit's piece begins in the row.
  __device__ int64_t offset_of(int32_t unit) const {
    return plan_.num_pieces == 1 ? 0 : int64_t{unit % plan_.num_pieces} * plan_.piece_bytes;
  }
  // Of a row as it crosses. One that is not cut is a piece.
  __device__ int64_t row_bytes() const {
    return Rows::kFormat.is_cut ? a_.row_bytes : plan_.piece_bytes;
  }
  // How many bytes of a row a unit is, as it crosses.
  __device__ uint32_t bytes_at(int64_t at) const {
    if (!Rows::kFormat.is_cut) return static_cast<uint32_t>(plan_.piece_bytes);
    return static_cast<uint32_t>(min(int64_t{plan_.piece_bytes}, a_.row_bytes - at));
  }
  __device__ uint64_t tokens_at(uint64_t tokens, int64_t row, int64_t at) const {
    return tokens + row * Rows::tokens_row_bytes(a_) + at;
  }
  // Of a token of rank src: its row where rows are not expanded.
  __device__ int32_t row_of_token(int64_t src, int64_t t) const {
    return static_cast<int32_t>(src * a_.num_tokens + t);
  }
  __device__ uint64_t landing_at(uint64_t landing, int64_t src, int64_t t, int64_t at) const {
    return landing + (src * a_.num_tokens + t) * row_bytes() + at;
  }

  __device__ bool has_stage() const { return num_loaded_ - num_stored_ < plan_.num_stages - 1; }
  __device__ bool is_empty() const { return num_loaded_ == num_stored_; }
  // Whether the oldest unit's load has come; does not wait.
  __device__ bool is_loaded() const {
    return !is_empty() && __all_sync(0xffffffffu, mbarrier_test_wait_parity(
                                                      &shared_.full[store_slot()], parity_)) != 0;
  }
  __device__ int32_t load_slot() const { return first_slot_ + load_stage_; }
  __device__ int32_t store_slot() const { return first_slot_ + store_stage_; }
  __device__ int32_t stage_bytes() const {
    return plan_.piece_bytes + Rows::kFormat.beside_row_bytes;
  }
  __device__ char* stage(int32_t i) const { return stages_ + i * stage_bytes(); }
  __device__ char* load_stage() const { return stage(load_stage_); }
  // What a stage holds behind its row.
  __device__ char* beside(int32_t i) const { return stage(i) + plan_.piece_bytes; }
  __device__ bool is_verbatim(const Unit& unit) const { return (unit.verbatim >> lane_ & 1) != 0; }

  // Writes down what the next stage is for, before it is filled, which shows that to others.
  __device__ void describe_stage(uint64_t to, const typename Rows::Extra& extra, bool crosses,
                                 bool verbatim, uint32_t bytes, int32_t num_own) {
    shared_.to[load_slot()][lane_] = to;
    shared_.extra[load_slot()][lane_] = extra;
    if constexpr (kNumHelpers > 0) {
      if (plan_.fetches_ahead && to != 0 && !verbatim) rows_.fetch_ahead(extra, bytes);
    }
    const uint32_t all_cross = __ballot_sync(0xffffffffu, crosses);
    const uint32_t all_verbatim = __ballot_sync(0xffffffffu, verbatim);
    if (lane_ == 0) {
      shared_.unit[load_slot()] = {static_cast<int32_t>(bytes), num_own, all_cross, all_verbatim};
    }
    __syncwarp();
  }
  __device__ void leave_load_stage() {
    ++num_loaded_;
    if (++load_stage_ == plan_.num_stages) load_stage_ = 0;
  }

  // Stores the oldest unit, and returns it.
  __device__ Unit store_next() {
    mbarrier_wait_parity(&shared_.full[store_slot()], parity_);  // [L]
    __syncwarp();                                                // what the lanes wrote down
    const Unit unit = shared_.unit[store_slot()];
    const uint64_t to = shared_.to[store_slot()][lane_];
    rows_.store(stage(store_stage_), static_cast<uint32_t>(unit.bytes), to, is_verbatim(unit),
                shared_.extra[store_slot()][lane_]);
    wait_for_helpers();
    leave_store_stage();
    bulk_wait_group_read<1>();  // [F] of the unit before
    __syncwarp();
    return unit;
  }
  __device__ void leave_store_stage() {
    if (++store_stage_ == plan_.num_stages) {
      store_stage_ = 0;
      parity_ ^= 1;
    }
    ++num_stored_;
  }

  // Until the helpers are through with the unit before the oldest one; finishes that.
  __device__ void wait_for_helpers() {
    if constexpr (kNumHelpers > 0) {
      if (num_stored_ == 0) return;
      const int32_t i = store_stage_ == 0 ? plan_.num_stages - 1 : store_stage_ - 1;
      const uint32_t parity = store_stage_ == 0 ? parity_ ^ 1 : parity_;
      const int32_t slot = first_slot_ + i;
      mbarrier_wait_parity(&shared_.computed[slot], parity);  // [M]
      if (is_verbatim(shared_.unit[slot])) return;
      rows_.finish(beside(i), shared_.to[slot][lane_], shared_.extra[slot][lane_]);
    }
  }
  // When the ring is empty: its helpers end.
  __device__ void dismiss_helpers() {
    if constexpr (kNumHelpers > 0) {
      wait_for_helpers();
      if (lane_ == 0) {
        shared_.unit[load_slot()].bytes = 0;
        mbarrier_arrive(&shared_.full[load_slot()]);
      }
    }
  }

  const GroupView& g_;
  const DispatchArguments& a_;
  const Plan& plan_;
  Shared<Rows>& shared_;
  const int32_t index_, count_, first_slot_;
  const int32_t first_unit_;  // of the block
  const int32_t num_units_;   // of the ring
  const int32_t lane_;
  Rows rows_;

 private:
  char* const stages_;  // [num_stages][stage_bytes()]
  // Units loaded and stored, the stages of the next ones, the phase to wait for.
  int32_t num_loaded_ = 0, num_stored_ = 0, load_stage_ = 0, store_stage_ = 0;
  uint32_t parity_ = 0;
};

}  // namespace jax_ep::gpu::dispatch

#endif  // JAX_EP_CUDA_DIRECT_DISPATCH_RING_CUH_
