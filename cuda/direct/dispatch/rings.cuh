// The rings of dispatch's senders and receivers. dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_DISPATCH_RINGS_CUH_
#define JAX_EP_CUDA_DIRECT_DISPATCH_RINGS_CUH_

#include <cuda_fp8.h>

#include "cuda/core/placement.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/fp8_rows.cuh"
#include "cuda/rows/row_types.cuh"
#include "cuda/rows/weighted_rows.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/progress.cuh"

namespace jax_ep::gpu::dispatch {

using Mode = DispatchMode;

constexpr int kFewUnits = 64;  // of a block: two rings do; with more, four
// SMs differ in how fast they store, so that blocks with equal units differ too. Of every so many
// units, if blocks have enough, one is shared: its rows that stay here are stored by any sender that
// is through with its own units. That costs another load of the row.
constexpr int kShared = 3;
constexpr int kEnoughUnits = 64;
constexpr int kTakenAtOnce = 2;  // shared units
constexpr int kMaxStages = 32;   // of a block
constexpr int kMinStages = 2;    // of a ring
constexpr int64_t kMaxPieceBytes = 16384;
constexpr int64_t kRingBytes = 204 * 1024;  // of shared memory, for all rings
constexpr int kNumBuffers = 2;              // of a ring, for products
constexpr int32_t kBufferBytes = 4096;
static_assert(kRingBytes / 2 - kNumBuffers * kBufferBytes >=
              kMinStages * WireRowBytes(kMaxFp8Channels));

// Whether tokens are rows as they cross.
template <Mode kMode>
constexpr bool kIsCopied = kMode == Mode::kCopy || kMode == Mode::kQuantize;
template <Mode kMode>
constexpr bool kIsQuantized = kMode == Mode::kQuantize || kMode == Mode::kDequantize;

// Each is run by a warp. To quantise takes more of them.
template <Mode kMode>
constexpr int kMaxRings = kIsQuantized<kMode>        ? 10
                          : kMode == Mode::kWeighted ? 2
                                                     : 4;
// Further warps of a ring, which multiply.
template <Mode kMode>
constexpr int kNumHelpers = kMode == Mode::kWeighted ? 7 : 0;
template <Mode kMode>
constexpr int kDotsBytes = kNumHelpers<kMode> * 32 * int{sizeof(float)};  // of a stage
// Rows of y are fetched into the L2 cache ahead of the helpers on so many SMs at most, for what they
// wait for there is latency (on more it is memory, and this made it worse); and if that much stays
// in the cache until it is used.
constexpr int kMaxFetchingSms = 64;
constexpr int64_t kMaxFetchedBytes = 48 << 20;
template <Mode kMode>
constexpr int kWeigher = kMaxRings<kMode> * (1 + kNumHelpers<kMode>);
template <Mode kMode>
constexpr int kMessenger = kWeigher<kMode> + 1;
template <Mode kMode>
constexpr int kNumThreads = (kMessenger<kMode> + 1) * 32;
static_assert(kRingBytes / 2 >= kMinStages * (kMaxWeightedRowBytes + kDotsBytes<Mode::kWeighted>));
static_assert(kMaxRings<Mode::kQuantize> <= kMaxMovers && kMaxRings<Mode::kCopy> <= kMaxMovers);

// How rows are cut, the rings of a block, and the stages of a ring.
struct Cut {
  int32_t num_pieces;
  int32_t stage_bytes;
  int32_t num_senders, num_receivers;
  int32_t num_stages;
  bool fetches_ahead;  // with kWeighted, rows of y
};

// What a stage is for.
struct Unit {
  int32_t bytes;     // to store; 0: nothing more comes
  int32_t num_own;   // the ring's units up to this one
  uint32_t crosses;  // lanes that store the row to a peer
  uint32_t lands;    // those that store it as it crosses, not as tokens are
};

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  // By stage, the rings' one after the other.
  uint64_t full[kMaxStages];  // [L]
  Unit unit[kMaxStages];
  uint64_t to[kMaxStages][kMaxTopK];         // where each lane stores the row; 0: nowhere
  uint64_t scales_to[kMaxStages][kMaxTopK];  // and its scales; with kWeighted, the row's number
  uint64_t multiplied[kMaxStages];           // [M], with kWeighted
  uint32_t num_batches;                      // of rows that have been looked at for zeroing
  Mailbox box;
};

template <Mode kMode>
__device__ int64_t tokens_row_bytes(const DispatchArguments& a) {
  return kMode == Mode::kQuantize ? a.num_channels : a.row_bytes;
}

// Units whose rows that stay here all blocks share. Not of rows that have to be quantised for it.
template <Mode kMode>
__device__ int32_t num_shared_units(const DispatchArguments& a, const Cut& cut) {
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  if (kIsQuantized<kMode> || num_units < int64_t{kEnoughUnits} * gridDim.x) return 0;
  return static_cast<int32_t>((num_units + kShared - 1) / kShared);
}

template <Mode kMode>
constexpr OpKind kOpKind = kMode == Mode::kWeighted ? OpKind::kCombineGradient : OpKind::kDispatch;

// A ring: what senders and receivers have in common, and what their helpers do.
template <Mode kMode>
class Ring {
 public:
  // `index` of `count` of its kind; `slot` of all rings of the block.
  __device__ Ring(const GroupView& g, const DispatchArguments& a, const Cut& cut, Shared& shared,
                  int32_t index, int32_t count, int32_t slot, int32_t first_unit, char* memory)
      : g_(g),
        a_(a),
        cut_(cut),
        shared_(shared),
        index_(index),
        count_(count),
        first_slot_(slot * cut.num_stages),
        first_unit_(first_unit),
        num_units_(num_steps(shared.box.num_units, index, count_)),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        num_scales_(kMode == Mode::kCopy ? 0 : static_cast<int32_t>(a.num_channels / kScaleBlock)),
        stages_(memory),
        buffers_(memory + cut.num_stages * cut.stage_bytes) {}

  // By a helper: of each unit that holds rows, the products of a part of its channels with the
  // weights of the rows, and the part's dot products with the rows of y.
  __device__ void help(int32_t part) {
    while (true) {
      mbarrier_wait_parity(&shared_.full[store_slot()], parity_);  // [L]
      const Unit unit = shared_.unit[store_slot()];
      if (unit.bytes == 0) return;
      const uint64_t to = (unit.lands >> lane_ & 1) != 0 ? 0 : shared_.to[store_slot()][lane_];
      const auto row = static_cast<int32_t>(shared_.scales_to[store_slot()][lane_]);
      with_vector(a_.type, [&](auto vector) {
        dots(store_stage_)[part * 32 + lane_] = multiply_part<decltype(vector), kNumHelpers<kMode>>(
            a_, stage(store_stage_), to, row, part);
      });
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive(&shared_.multiplied[store_slot()]);  // [M]
      leave_store_stage();
    }
  }

 protected:
  // Of the ring's i-th unit: its number in the group.
  __device__ int32_t unit_of(int32_t i) const { return first_unit_ + index_ + i * count_; }
  __device__ int64_t token_of(int32_t unit) const {
    return cut_.num_pieces == 1 ? unit : unit / cut_.num_pieces;
  }
  // Where a unit's piece begins in the row.
  __device__ int64_t offset_of(int32_t unit) const {
    return cut_.num_pieces == 1 ? 0 : int64_t{unit % cut_.num_pieces} * cut_.stage_bytes;
  }
  // How many bytes of a row a unit is, as it crosses.
  __device__ uint32_t bytes_at(int64_t at) const {
    if (kIsQuantized<kMode>) return static_cast<uint32_t>(cut_.stage_bytes);
    return static_cast<uint32_t>(min(int64_t{cut_.stage_bytes}, a_.row_bytes - at));
  }
  __device__ uint64_t tokens_at(uint64_t tokens, int64_t row, int64_t at) const {
    return tokens + row * tokens_row_bytes<kMode>(a_) + at;
  }
  __device__ uint64_t scales_at(uint64_t scales, int64_t row) const {
    return scales + row * num_scales_ * 4;
  }
  __device__ uint64_t landing_at(uint64_t landing, int64_t src, int64_t t, int64_t at) const {
    const int64_t bytes = kIsQuantized<kMode> ? cut_.stage_bytes : a_.row_bytes;
    return landing + (src * a_.num_tokens + t) * bytes + at;
  }

  __device__ bool has_stage() const { return num_loaded_ - num_stored_ < cut_.num_stages - 1; }
  __device__ bool is_empty() const { return num_loaded_ == num_stored_; }
  // Whether the oldest unit's load has come; does not wait.
  __device__ bool is_loaded() const {
    return !is_empty() && __all_sync(0xffffffffu, mbarrier_test_wait_parity(
                                                      &shared_.full[store_slot()], parity_)) != 0;
  }
  __device__ int32_t load_slot() const { return first_slot_ + load_stage_; }
  __device__ int32_t store_slot() const { return first_slot_ + store_stage_; }
  __device__ char* stage(int32_t i) const { return stages_ + i * cut_.stage_bytes; }
  __device__ char* load_stage() const { return stage(load_stage_); }
  // Behind a stage's row: by helper and lane.
  __device__ float* dots(int32_t i) const {
    return reinterpret_cast<float*>(stage(i) + cut_.stage_bytes - kDotsBytes<kMode>);
  }

  // Writes down what the next stage is for.
  __device__ void note(uint64_t to, uint64_t scales_to, bool crosses, bool lands, uint32_t bytes,
                       int32_t num_own) {
    shared_.to[load_slot()][lane_] = to;
    if (kMode == Mode::kQuantize || kMode == Mode::kWeighted) {
      shared_.scales_to[load_slot()][lane_] = scales_to;
    }
    if (kMode == Mode::kWeighted && cut_.fetches_ahead && to != 0 && !lands) {
      const char* y = static_cast<const char*>(a_.y);
      bulk_prefetch_l2(y + static_cast<int64_t>(scales_to) * a_.row_bytes, bytes);
    }
    const uint32_t all_cross = __ballot_sync(0xffffffffu, crosses);
    const uint32_t all_land = __ballot_sync(0xffffffffu, lands);
    if (lane_ == 0) {
      shared_.unit[load_slot()] = {static_cast<int32_t>(bytes), num_own, all_cross, all_land};
    }
    __syncwarp();  // before the load, which shows it to others
  }
  // By lane 0.
  __device__ void load(const void* source, uint32_t bytes) {
    uint64_t* full = &shared_.full[load_slot()];
    mbarrier_arrive_expect_tx(full, bytes);
    bulk_load(load_stage(), source, bytes, full);  // [L]
  }
  __device__ void leave_load_stage() {
    ++num_loaded_;
    if (++load_stage_ == cut_.num_stages) load_stage_ = 0;
  }

  // Stores the oldest unit, and returns it.
  __device__ Unit store_next() {
    mbarrier_wait_parity(&shared_.full[store_slot()], parity_);  // [L]
    __syncwarp();                                                // what the lanes noted
    const Unit unit = shared_.unit[store_slot()];
    const uint64_t to = shared_.to[store_slot()][lane_];
    const char* stage = this->stage(store_stage_);
    const bool lands = (unit.lands >> lane_ & 1) != 0;
    if (to != 0 && (kIsCopied<kMode> || lands)) {
      const bool is_whole = kMode != Mode::kQuantize || lands;
      const int64_t bytes = is_whole ? unit.bytes : a_.num_channels;
      bulk_store(reinterpret_cast<void*>(to), stage, static_cast<uint32_t>(bytes));
    }
    if (kMode == Mode::kQuantize) store_scales(stage);
    bulk_commit_group();
    if (kMode == Mode::kDequantize) {
      with_vector(a_.type,
                  [&](auto vector) { store_dequantized<decltype(vector)>(stage, lands ? 0 : to); });
    }
    settle();
    leave_store_stage();
    bulk_wait_group_read<1>();  // [F] of the unit before
    __syncwarp();
    return unit;
  }

  // Stores a quantised row's scales where the lanes want them.
  __device__ void store_scales(const char* stage) {
    const uint64_t to = shared_.scales_to[store_slot()][lane_];
    const char* scales = stage + a_.num_channels;
    if (num_scales_ % 4 == 0) {
      if (to != 0) {
        bulk_store(reinterpret_cast<void*>(to), scales, static_cast<uint32_t>(num_scales_ * 4));
      }
      return;
    }
    // Not for the copy engine.
    for (uint32_t left = __ballot_sync(0xffffffffu, to != 0); left != 0; left &= left - 1) {
      auto* at =
          reinterpret_cast<float*>(__shfl_sync(0xffffffffu, to, __ffs(static_cast<int>(left)) - 1));
      for (int32_t s = lane_; s < num_scales_; s += 32) {
        at[s] = reinterpret_cast<const float*>(scales)[s];
      }
    }
  }

  // Stores a quantised row's products with its scales where the lanes want it.
  template <typename Vector>
  __device__ void store_dequantized(const char* quantized, uint64_t to) {
    if (__any_sync(0xffffffffu, to != 0) == 0) return;
    const auto* scales = reinterpret_cast<const float*>(quantized + a_.num_channels);
    constexpr int kPiece = kBufferBytes / 16;  // vectors
    const auto num_vectors = static_cast<int32_t>(a_.num_channels / Vector::kCount);
    for (int32_t begin = 0; begin < num_vectors; begin += kPiece) {
      char* buffer = buffers_ + num_buffered_++ % kNumBuffers * kBufferBytes;
      bulk_wait_group_read<kNumBuffers - 1>();  // each lane of its own stores
      __syncwarp();
      const int32_t size = min(kPiece, num_vectors - begin);
#pragma unroll 4
      for (int32_t i = lane_; i < size; i += 32) {
        const int32_t channel = (begin + i) * Vector::kCount;
        const float scale = scales[channel / kScaleBlock];
        float value[Vector::kCount];
#pragma unroll
        for (int c = 0; c < Vector::kCount; c += 4) {
          const auto f = static_cast<float4>(
              *reinterpret_cast<const __nv_fp8x4_e4m3*>(quantized + channel + c));
          value[c] = __fmul_rn(f.x, scale);
          value[c + 1] = __fmul_rn(f.y, scale);
          value[c + 2] = __fmul_rn(f.z, scale);
          value[c + 3] = __fmul_rn(f.w, scale);
        }
        reinterpret_cast<uint4*>(buffer)[i] = Vector::store(value);
      }
      fence_proxy_async_shared();  // the copy engine reads what was written
      __syncwarp();
      if (to != 0) {
        bulk_store(reinterpret_cast<void*>(to + begin * 16), buffer,
                   static_cast<uint32_t>(size * 16));
      }
      bulk_commit_group();
    }
  }

  __device__ void leave_store_stage() {
    if (++store_stage_ == cut_.num_stages) {
      store_stage_ = 0;
      parity_ ^= 1;
    }
    ++num_stored_;
  }

  // Waits until the helpers are through with the unit before the oldest one, and adds up what they
  // have left.
  __device__ void settle() {
    if (kNumHelpers<kMode> == 0 || num_stored_ == 0) return;
    const int32_t i = store_stage_ == 0 ? cut_.num_stages - 1 : store_stage_ - 1;
    const uint32_t parity = store_stage_ == 0 ? parity_ ^ 1 : parity_;
    mbarrier_wait_parity(&shared_.multiplied[first_slot_ + i], parity);  // [M]
    const bool lands = (shared_.unit[first_slot_ + i].lands >> lane_ & 1) != 0;
    if (lands || shared_.to[first_slot_ + i][lane_] == 0) return;
    float dot = 0.0f;
    for (int p = 0; p < kNumHelpers<kMode>; ++p) dot += dots(i)[p * 32 + lane_];
    a_.dots[shared_.scales_to[first_slot_ + i][lane_]] = dot;
  }
  // When the ring is empty: its helpers end.
  __device__ void dismiss_helpers() {
    if (kNumHelpers<kMode> == 0) return;
    settle();
    if (lane_ == 0) {
      shared_.unit[load_slot()].bytes = 0;
      mbarrier_arrive(&shared_.full[load_slot()]);
    }
  }

  const GroupView& g_;
  const DispatchArguments& a_;
  const Cut& cut_;
  Shared& shared_;
  const int32_t index_, count_, first_slot_;
  const int32_t first_unit_;  // of the block
  const int32_t num_units_;   // of the ring
  const int32_t lane_, num_scales_;

 private:
  char* const stages_;   // [num_stages][stage_bytes]
  char* const buffers_;  // [kNumBuffers][kBufferBytes]
  // Units loaded and stored, the stages of the next ones, the phase to wait for.
  int32_t num_loaded_ = 0, num_stored_ = 0, load_stage_ = 0, store_stage_ = 0;
  uint32_t parity_ = 0;
  uint32_t num_buffered_ = 0;
};

// Stores this rank's tokens to all ranks.
template <Mode kMode>
class Sender : Ring<kMode> {
  using Base = Ring<kMode>;
  using Base::a_, Base::cut_, Base::g_, Base::lane_, Base::num_units_, Base::shared_;

 public:
  __device__ Sender(const GroupView& g, const DispatchArguments& a, const Cut& cut, Shared& shared,
                    int32_t index, int32_t first_unit, char* memory)
      : Base(g, a, cut, shared, index, cut.num_senders, index, first_unit, memory),
        top_k_(static_cast<int32_t>(a.top_k)),
        most_in_batch_(32 / top_k_),
        lane_unit_(lane_ / top_k_),
        // Enough are under way to hide how long a store takes; no more, so that peers hear soon.
        num_untold_(num_units_ >= 96   ? 12
                    : num_units_ >= 64 ? 8
                    : num_units_ >= 40 ? 2
                                       : 0),
        num_shared_(num_shared_units<kMode>(a, cut)) {}

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
      tell(wait_written(this->store_next()));
    }
    tell_all();
    this->dismiss_helpers();
    bulk_wait_group<0>();
  }

 private:
  // Tells of all own units, where no stored one has done so: the last may have no rows.
  __device__ void tell_all() {
    if (num_told_ == num_units_) return;
    bulk_wait_group<0>();
    tell(num_units_);
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
    const bool is_shared = num_shared_ > 0 && batch_.unit % kShared == 0;
    const bool stays = has_row && rank == g_.rank && is_shared == batch_.is_shared;
    crosses_ = has_row && rank != g_.rank && !batch_.is_shared && (same & ((1u << lane_) - 1)) == 0;
    to_ = scales_to_ = 0;
    lands_ = false;
    if (stays || crosses_) {
      const uint64_t* address = shared_.address[rank];
      const int64_t t = this->token_of(batch_.unit), at = this->offset_of(batch_.unit);
      lands_ = crosses_ && address[3] != 0;
      if (lands_) {
        to_ = this->landing_at(address[3], g_.rank, t, at);
      } else {
        to_ = this->tokens_at(address[0], batch_.row, at);
        if (kMode == Mode::kQuantize) scales_to_ = this->scales_at(address[2], batch_.row);
        if (kMode == Mode::kWeighted) scales_to_ = static_cast<uint64_t>(batch_.row);
        // The receiver finds what has crossed where its products will be.
        lands_ = crosses_ && !kIsCopied<kMode>;
      }
    }
    fetch();
  }

  // Begins to load a unit, if this ring stores it anywhere.
  __device__ void load_next() {
    if (num_issued_ == num_units_ && this->is_empty()) tell_all();
    if (next_in_batch_ == batch_.size) begin_batch();
    const int32_t in_batch = next_in_batch_++;
    if (!batch_.is_shared) ++num_issued_;
    const bool mine = lane_unit_ == in_batch && to_ != 0;
    if (__any_sync(0xffffffffu, mine) == 0) return;
    const int32_t unit = __shfl_sync(0xffffffffu, batch_.unit, in_batch * top_k_);
    const int64_t at = this->offset_of(unit);
    this->note(mine ? to_ : 0, mine ? scales_to_ : 0, mine && crosses_, mine && lands_,
               this->bytes_at(at), num_issued_);
    const char* x = static_cast<const char*>(a_.x) + this->token_of(unit) * a_.row_bytes + at;
    if (!kIsQuantized<kMode>) {
      if (lane_ == 0) this->load(x, this->bytes_at(at));
    } else {
      char* stage = this->load_stage();
      with_vector(a_.type, [&](auto vector) { quantize_row<decltype(vector)>(a_, x, stage); });
      fence_proxy_async_shared();  // the copy engine reads what was written
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive(&shared_.full[this->load_slot()]);  // [L]
    }
    this->leave_load_stage();
  }

  // Waits until all but the newest units are written at the peers, after the last of the ring's own
  // ones for all of them; returns how many of those there are up to the last written one. What a
  // lane has stored here may take longer.
  __device__ int32_t wait_written(const Unit& unit) {
    crossed_ = crossed_ << 1 | (unit.crosses >> lane_ & 1);  // bit i: in the unit i before
    if (num_untold_ == 0 || unit.num_own == num_units_) {
      if (crossed_ != 0) bulk_wait_group<0>();
      crossed_ = 0;
      return unit.num_own;
    }
    if ((crossed_ >> num_untold_ & 1) != 0) {
      if (num_untold_ == 2) {
        bulk_wait_group<2>();
      } else if (num_untold_ == 8) {
        bulk_wait_group<8>();
      } else {
        bulk_wait_group<12>();
      }
    }
    // Of the newest units, the newest last: a lane keeps each.
    const int32_t written = __shfl_sync(0xffffffffu, num_own_up_to_, 32 - num_untold_);
    const int32_t before = __shfl_down_sync(0xffffffffu, num_own_up_to_, 1);
    num_own_up_to_ = lane_ == 31 ? unit.num_own : before;
    return written;
  }

  // For the messenger, [P1].
  __device__ void tell(int32_t num_own) {
    __syncwarp();
    if (num_own == num_told_) return;
    num_told_ = num_own;
    if (lane_ == 0) st_release_cta_shared(&shared_.box.written[this->index_], num_own);
  }

  const int32_t top_k_;
  const int32_t most_in_batch_, lane_unit_;  // units of a batch, and this lane's
  const int32_t num_untold_;
  const int32_t num_shared_;                                 // of all blocks' units
  int32_t num_fetched_ = 0, num_issued_ = 0, num_told_ = 0;  // of the ring's own units
  uint32_t crossed_ = 0;       // by this lane, in the newest stored units
  int32_t num_own_up_to_ = 0;  // own units up to the stored unit 31 - lane before the newest
  Batch fetched_, batch_;      // the next one, and the one that is being issued
  int32_t next_in_batch_ = 0;
  uint64_t to_ = 0, scales_to_ = 0;  // of the batch
  bool crosses_ = false, lands_ = false;
};

// Spreads what peers have written to the rows of their tokens.
template <Mode kMode>
class Receiver : Ring<kMode> {
  using Base = Ring<kMode>;
  using Base::a_, Base::g_, Base::lane_, Base::num_scales_, Base::shared_;

 public:
  __device__ Receiver(const GroupView& g, const DispatchArguments& a, const Cut& cut,
                      Shared& shared, int32_t index, int32_t first_unit, char* memory)
      : Base(g, a, cut, shared, index, cut.num_receivers, cut.num_senders + index, first_unit,
             memory),
        num_peers_(g.num_ranks - 1),
        num_received_(this->num_units_ * num_peers_),
        fewest_rows_(a.landing != nullptr || !kIsCopied<kMode> ? 1 : 2) {}

  // False if the group is broken.
  __device__ bool run() {
    find_next();
    while (left_ != 0 || !this->is_empty()) {
      while (left_ != 0 && this->has_stage() && is_there()) {
        load_next();
        if (this->is_loaded()) break;
      }
      if (!this->is_empty()) {
        this->store_next();
        continue;
      }
      there_ = wait_until_arrived(shared_.box, next_unit());  // [P2]
      if (there_ == kBroken) break;
    }
    this->dismiss_helpers();
    bulk_wait_group<0>();
    return there_ != kBroken;
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
  __device__ bool is_there() {
    if (next_unit() >= there_) there_ = units_arrived(shared_.box);  // [P2]
    return there_ != kBroken && next_unit() < there_;
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
      }
      left_ = __ballot_sync(0xffffffffu, num_rows_ >= fewest_rows_);
    }
    if (left_ == 0) return;
    const int32_t from = __ffs(static_cast<int>(left_)) - 1;
    const int32_t first = __shfl_sync(0xffffffffu, first_, from);
    row_ =
        lane_ < __shfl_sync(0xffffffffu, num_rows_, from) ? a_.recv_order[first + lane_] : kNoRow;
  }

  __device__ void load_next() {
    const int32_t unit = this->unit_of(next() / num_peers_);
    const int64_t t = this->token_of(unit), at = this->offset_of(unit);
    const int32_t first_row = __shfl_sync(0xffffffffu, row_, 0);
    const bool landed = a_.landing != nullptr;
    const auto tokens = reinterpret_cast<uint64_t>(a_.tokens);
    uint64_t source = this->tokens_at(tokens, first_row, at), to = 0, scales_to = 0;
    uint32_t bytes = this->bytes_at(at);
    if (landed) {
      source = this->landing_at(reinterpret_cast<uint64_t>(a_.landing), src_of(next()), t, at);
    } else if (kMode == Mode::kQuantize) {
      bytes = static_cast<uint32_t>(a_.num_channels);
    }
    const bool is_final = kIsCopied<kMode> && !landed && lane_ == 0;
    if (row_ != kNoRow && !is_final) {
      to = this->tokens_at(tokens, row_, at);
      if (kMode == Mode::kQuantize) {
        scales_to = this->scales_at(reinterpret_cast<uint64_t>(a_.scales), row_);
      }
      if (kMode == Mode::kWeighted) scales_to = static_cast<uint64_t>(row_);
    }
    this->note(to, scales_to, false, false, bytes, 0);
    if (kMode == Mode::kQuantize && !landed) {
      const float* from = a_.scales + int64_t{first_row} * num_scales_;
      auto* scales = reinterpret_cast<float*>(this->load_stage() + a_.num_channels);
      for (int32_t s = lane_; s < num_scales_; s += 32) scales[s] = __ldcg(from + s);
      fence_proxy_async_shared();  // the copy engine reads what was written
    }
    if (lane_ == 0) this->load(reinterpret_cast<const void*>(source), bytes);
    this->leave_load_stage();
    find_next();
  }

  const int32_t num_peers_, num_received_, fewest_rows_;
  int32_t num_fetched_ = 0, begin_ = 0;
  uint32_t left_ = 0;                 // of [begin, begin + 32): those to come, a bit each
  int32_t first_ = 0, num_rows_ = 0;  // in recv_order, of this lane's
  int32_t row_ = kNoRow;              // of the next one, lane by lane
  int32_t there_ = 0;                 // units that all peers have written, as far as is known
};

}  // namespace jax_ep::gpu::dispatch

#endif  // JAX_EP_CUDA_DIRECT_DISPATCH_RINGS_CUH_
