// The ring that sends. dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_DISPATCH_SENDER_CUH_
#define JAX_EP_CUDA_DIRECT_DISPATCH_SENDER_CUH_

#include "cuda/core/placement.h"
#include "cuda/direct/dispatch/ring.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::dispatch {

// SMs differ in how fast they store, so that blocks with equal units differ too. Of every so many
// units, if blocks have enough, one is shared: its rows that stay here are stored by any sender that
// is through with its own units. That costs another load of the row.
constexpr int kShared = 3;
constexpr int kEnoughUnits = 64;
constexpr int kTakenAtOnce = 2;  // shared units

// Units whose rows that stay here all blocks share. Not of rows that have to be computed for it.
template <typename Rows>
__device__ int32_t num_shared_units(int64_t num_units) {
  if (Rows::kFormat.is_computed || num_units < int64_t{kEnoughUnits} * gridDim.x) return 0;
  return static_cast<int32_t>((num_units + kShared - 1) / kShared);
}

// Stores this rank's tokens to all ranks.
template <typename Rows>
class Sender : Ring<Rows> {
  using Base = Ring<Rows>;
  using Base::a_, Base::plan_, Base::g_, Base::lane_, Base::num_units_, Base::shared_;

 public:
  __device__ Sender(const GroupView& g, const DispatchArguments& a, const Plan& plan,
                    Shared<Rows>& shared, int32_t index, int32_t first_unit, char* memory)
      : Base(g, a, plan, shared, index, plan.num_senders, index, first_unit, memory),
        top_k_(static_cast<int32_t>(a.top_k)),
        most_in_batch_(32 / top_k_),
        lane_unit_(lane_ / top_k_),
        // Enough are under way to hide how long a store takes; no more, so that peers hear soon.
        num_unpublished_(num_units_ >= 96   ? 12
                         : num_units_ >= 64 ? 8
                         : num_units_ >= 40 ? 2
                                            : 0),
        num_shared_(num_shared_units<Rows>(a.num_tokens * plan.num_pieces)) {}

  __device__ void run() {
    fetch();
    while (true) {
      while (has_next() && this->has_stage()) {
        load_next();
        if (this->is_loaded()) break;
      }
      if (this->is_empty()) {
        if (!has_next()) break;
        continue;
      }
      const Unit unit = this->store_next();
      timeline::mark(Role::kSender, Event::kStore);
      publish(wait_written(unit));
    }
    publish_all();
    this->dismiss_helpers();
    bulk_wait_group<0>();
    timeline::mark(Role::kSender, Event::kEnd);
  }

 private:
  // All own units, where no stored one has done so: the last may have no rows.
  __device__ void publish_all() {
    if (num_published_ == num_units_) return;
    bulk_wait_group<0>();
    publish(num_units_);
  }

  // Units that are handled together: a lane has one (token, k) of one of them.
  struct Batch {
    int32_t size = 0;        // 0: no more units
    bool is_shared = false;  // of the units that all blocks share, not of the ring's own
    int32_t unit = 0, row = kNoRow, expert = 0;
  };

  __device__ bool has_next() const { return next_in_batch_ < batch_.size || fetched_.size > 0; }

  // Metadata of the next batch: of the ring's own units, and after those of shared ones.
  __device__ void fetch() {
    fetched_ = {};
    int32_t first = num_fetched_;
    if (first < num_units_) {
      fetched_.size = min(most_in_batch_, num_units_ - first);
      num_fetched_ += fetched_.size;
    } else if (num_shared_ > 0) {
      const int32_t most = min(kTakenAtOnce, most_in_batch_);
      uint32_t taken = 0;
      if (lane_ == 0) {
        taken = atomicAdd(&g_.control->local.num_taken, static_cast<uint32_t>(most));
      }
      first = static_cast<int32_t>(__shfl_sync(0xffffffffu, taken, 0));
      fetched_.size = max(0, min(most, num_shared_ - first));
      fetched_.is_shared = true;
    }
    if (lane_unit_ >= fetched_.size) return;
    const int32_t i = first + lane_unit_;
    fetched_.unit = fetched_.is_shared ? i * kShared : this->unit_of(i);
    const int64_t flat = this->token_of(fetched_.unit) * top_k_ + (lane_ - lane_unit_ * top_k_);
    fetched_.row = a_.send_row[flat];
    fetched_.expert = a_.topk_idx[flat];
  }

  // Decides where the lanes' rows go, and fetches the next batch.
  __device__ void begin_batch() {
    batch_ = fetched_;
    next_in_batch_ = 0;
    const bool has_row = batch_.row != kNoRow;
    const int32_t rank = has_row ? batch_.expert / static_cast<int32_t>(a_.num_local_experts) : 0;
    const uint32_t same = __match_any_sync(0xffffffffu, has_row ? lane_unit_ << 8 | rank : -1);
    const bool is_first = (same & ((1u << lane_) - 1)) == 0;  // of the token's rows at the rank
    const bool is_shared = num_shared_ > 0 && batch_.unit % kShared == 0;
    const bool stays =
        has_row && rank == g_.rank && is_shared == batch_.is_shared && (a_.expand || is_first);
    crosses_ = has_row && rank != g_.rank && !batch_.is_shared && is_first;
    to_ = 0;
    verbatim_ = false;
    if (stays || crosses_) {
      const uint64_t* address = shared_.address[rank];
      const int64_t t = this->token_of(batch_.unit), at = this->offset_of(batch_.unit);
      const bool to_landing = crosses_ && address[kLanding] != 0;
      if (to_landing) {
        to_ = this->landing_at(address[kLanding], g_.rank, t, at);
      } else {
        const int32_t row = a_.expand ? batch_.row : this->row_of_token(g_.rank, t);
        to_ = this->tokens_at(address[kTokens], row, at);
        extra_ = this->rows_.extra_of(address[kScales], row);
      }
      // Without a landing area the receiver finds what has crossed where the row will be.
      verbatim_ = to_landing || (crosses_ && !Rows::kFormat.is_stored_as_it_crosses);
    }
    fetch();
  }

  // Begins to load a unit, if this ring stores it anywhere.
  __device__ void load_next() {
    if (num_issued_ == num_units_ && this->is_empty()) publish_all();
    if (next_in_batch_ == batch_.size) begin_batch();
    const int32_t in_batch = next_in_batch_++;
    if (!batch_.is_shared) ++num_issued_;
    const bool mine = lane_unit_ == in_batch && to_ != 0;
    if (__any_sync(0xffffffffu, mine) == 0) return;
    const int32_t unit = __shfl_sync(0xffffffffu, batch_.unit, in_batch * top_k_);
    const int64_t at = this->offset_of(unit);
    const uint32_t bytes = this->bytes_at(at);
    this->describe_stage(mine ? to_ : 0, extra_, mine && crosses_, mine && verbatim_, bytes,
                         num_issued_);
    this->rows_.fill_stage(this->token_of(unit), at, bytes, this->load_stage(),
                           &shared_.full[this->load_slot()]);  // [L]
    timeline::mark(Role::kSender, Event::kLoad);
    this->leave_load_stage();
  }

  // Waits until all but the newest units are written at the peers, after the last of the ring's own
  // ones for all of them; returns how many of those there are up to the last written one. What a
  // lane has stored here may take longer.
  __device__ int32_t wait_written(const Unit& unit) {
    crossed_ = crossed_ << 1 | (unit.crosses >> lane_ & 1);  // bit i: in the unit i before
    if (num_unpublished_ == 0 || unit.num_own == num_units_) {
      if (crossed_ != 0) bulk_wait_group<0>();
      crossed_ = 0;
      return unit.num_own;
    }
    if ((crossed_ >> num_unpublished_ & 1) != 0) {
      if (num_unpublished_ == 2) {
        bulk_wait_group<2>();
      } else if (num_unpublished_ == 8) {
        bulk_wait_group<8>();
      } else {
        bulk_wait_group<12>();
      }
    }
    // Of the newest units, the newest last: a lane keeps each.
    const int32_t written = __shfl_sync(0xffffffffu, num_own_up_to_, 32 - num_unpublished_);
    const int32_t before = __shfl_down_sync(0xffffffffu, num_own_up_to_, 1);
    num_own_up_to_ = lane_ == 31 ? unit.num_own : before;
    return written;
  }

  // For the messenger, [P1].
  __device__ void publish(int32_t num_own) {
    __syncwarp();
    if (num_own == num_published_) return;
    num_published_ = num_own;
    if (lane_ == 0) st_release_cta_shared(&shared_.box.written[this->index_], num_own);
  }

  const int32_t top_k_;
  const int32_t most_in_batch_, lane_unit_;  // units of a batch, and this lane's
  const int32_t num_unpublished_;
  const int32_t num_shared_;                                      // of all blocks' units
  int32_t num_fetched_ = 0, num_issued_ = 0, num_published_ = 0;  // of the ring's own units
  uint32_t crossed_ = 0;       // by this lane, in the newest stored units
  int32_t num_own_up_to_ = 0;  // own units up to the stored unit 31 - lane before the newest
  Batch fetched_, batch_;      // the next one, and the one that is being issued
  int32_t next_in_batch_ = 0;
  uint64_t to_ = 0;  // of the batch, by lane, as are
  typename Rows::Extra extra_{};
  bool crosses_ = false, verbatim_ = false;
};

}  // namespace jax_ep::gpu::dispatch

#endif  // JAX_EP_CUDA_DIRECT_DISPATCH_SENDER_CUH_
