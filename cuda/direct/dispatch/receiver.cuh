// The ring that receives. dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_DISPATCH_RECEIVER_CUH_
#define JAX_EP_CUDA_DIRECT_DISPATCH_RECEIVER_CUH_

#include "cuda/core/placement.h"
#include "cuda/direct/dispatch/ring.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::dispatch {

// Spreads what peers have written to the rows of their tokens.
template <typename Rows>
class Receiver : Ring<Rows> {
  using Base = Ring<Rows>;
  using Base::a_, Base::g_, Base::lane_, Base::shared_;

 public:
  __device__ Receiver(const GroupView& g, const DispatchArguments& a, const Plan& plan,
                      Shared<Rows>& shared, int32_t index, int32_t first_unit, char* memory)
      : Base(g, a, plan, shared, index, plan.num_receivers, plan.num_senders + index, first_unit,
             memory),
        num_peers_(g.num_ranks - 1),
        num_received_(this->num_units_ * num_peers_),
        fewest_rows_(is_first_row_final() ? 2 : 1) {}

  // False if the group is broken.
  __device__ bool run() {
    find_next();
    while (left_ != 0 || !this->is_empty()) {
      while (left_ != 0 && this->has_stage() && has_arrived()) {
        load_next();
        if (this->is_loaded()) break;
      }
      if (!this->is_empty()) {
        this->store_next();
        timeline::mark(Role::kReceiver, Event::kStore);
        continue;
      }
      num_arrived_ = wait_until_arrived(shared_.box, next_unit());  // [P2]
      timeline::mark(Role::kReceiver, Event::kP2);
      if (num_arrived_ == kBroken) break;
    }
    this->dismiss_helpers();
    bulk_wait_group<0>();
    timeline::mark(Role::kReceiver, Event::kEnd);
    return num_arrived_ != kBroken;
  }

 private:
  // The ring's i-th received unit: (unit, peer), unit by unit, each beginning with another peer.
  __device__ int32_t next() const { return begin_ + __ffs(static_cast<int>(left_)) - 1; }
  __device__ int32_t src_of(int32_t i) const {
    const int32_t r = g_.rank + 1 + (num_peers_ == 1 ? 0 : i % num_peers_);
    return r < g_.num_ranks ? r : r - g_.num_ranks;
  }
  // The next one's unit, by its place in the block.
  __device__ int32_t next_unit() const { return this->index_ + next() / num_peers_ * this->count_; }
  __device__ bool has_arrived() {
    if (next_unit() >= num_arrived_) num_arrived_ = units_arrived(shared_.box);  // [P2]
    return num_arrived_ != kBroken && next_unit() < num_arrived_;
  }

  // Whether what has crossed is the first of a token's rows, as tokens hold it.
  __device__ bool is_first_row_final() const {
    return Rows::kFormat.is_stored_as_it_crosses && a_.landing == nullptr;
  }

  // Moves on to the next unit that has something to store. Lanes look at 32 at a time.
  __device__ void find_next() {
    left_ &= left_ - 1;
    while (left_ == 0 && num_fetched_ < num_received_) {
      begin_ = num_fetched_;
      num_fetched_ += 32;
      const int32_t i = begin_ + lane_;
      num_rows_ = 0;
      if (i < num_received_) {
        const int64_t flat_token =
            src_of(i) * a_.num_tokens + this->token_of(this->unit_of(i / num_peers_));
        first_ = a_.recv_offsets[flat_token];
        num_rows_ = a_.recv_offsets[flat_token + 1] - first_;
        if (!a_.expand) {
          first_ = static_cast<int32_t>(flat_token);
          num_rows_ = min(num_rows_, 1);
        }
      }
      left_ = __ballot_sync(0xffffffffu, num_rows_ >= fewest_rows_);
    }
    if (left_ == 0) return;
    const int32_t from = __ffs(static_cast<int>(left_)) - 1;
    const int32_t first = __shfl_sync(0xffffffffu, first_, from);
    const int32_t num_rows = __shfl_sync(0xffffffffu, num_rows_, from);
    row_ = kNoRow;
    if (lane_ < num_rows) row_ = a_.expand ? a_.recv_order[first + lane_] : first;
  }

  __device__ void load_next() {
    const int32_t unit = this->unit_of(next() / num_peers_);
    const int64_t t = this->token_of(unit), at = this->offset_of(unit);
    const int32_t first_row = __shfl_sync(0xffffffffu, row_, 0);
    const bool is_in_landing = a_.landing != nullptr;
    const auto tokens = reinterpret_cast<uint64_t>(a_.tokens);
    uint64_t source = this->tokens_at(tokens, first_row, at), to = 0;
    if (is_in_landing) {
      source = this->landing_at(reinterpret_cast<uint64_t>(a_.landing), src_of(next()), t, at);
    }
    const bool is_final = is_first_row_final() && lane_ == 0;
    typename Rows::Extra extra{};
    if (row_ != kNoRow && !is_final) {
      to = this->tokens_at(tokens, row_, at);
      extra = this->rows_.extra_of(reinterpret_cast<uint64_t>(a_.scales), row_);
    }
    const uint32_t bytes = this->bytes_at(at);
    this->describe_stage(to, extra, false, false, bytes, 0);
    this->rows_.fetch_stage({source, first_row, is_in_landing}, bytes, this->load_stage(),
                            &shared_.full[this->load_slot()]);  // [L]
    timeline::mark(Role::kReceiver, Event::kLoad);
    this->leave_load_stage();
    find_next();
  }

  const int32_t num_peers_, num_received_, fewest_rows_;
  int32_t num_fetched_ = 0, begin_ = 0;
  uint32_t left_ = 0;                 // of [begin, begin + 32): those to come, a bit each
  int32_t first_ = 0, num_rows_ = 0;  // in recv_order, of this lane's; not expanded, its row
  int32_t row_ = kNoRow;              // of the next one, lane by lane
  int32_t num_arrived_ = 0;           // units that all peers have written, as far as is known
};

}  // namespace jax_ep::gpu::dispatch

#endif  // JAX_EP_CUDA_DIRECT_DISPATCH_RECEIVER_CUH_
