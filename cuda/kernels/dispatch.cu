// dispatch: each rank writes its tokens' rows to where their experts live.
// After:    tokens[row] = x of rank src [t] for every kept row, (src, t, k) = recv_src[row];
//           padding is zero, the tail too if zero_tail; weights[row] = topk_weights of src [t, k],
//           else 0.
//           With fp8, x crosses as float8_e4m3fn with a scale per 128 channels, as
//           jax_ep/reference.py's quantize defines them: tokens and scales are those, or, with
//           kDequantize, tokens are their products in x's type.
// Roles:    one block an SM, 8 warps. The first ones run a ring of stages each. They load (or
//           quantise) each of the rank's own tokens once and store it to its rows here, and to one
//           row at each other rank that has any: the first of them, or a row of the landing area.
//           From there the rings of the receiver fetch it and store it to the token's other rows.
//           Warp 7, the messenger, talks to the peers. The warps between, and the others when they
//           are done, zero what holds no row. A unit is a piece of a token's row; ring m of n has
//           the units m, m + n, .. of its block. Block b has the same units on every rank, so it
//           only ever meets the blocks b of the peers.
// Buffers:  name            | lives on       | written by                     | read by
//           x, topk_weights | XLA, own       | before the call                | own rings
//           tokens, weights,| XLA, each rank | peers' rings, [S2]..[P1] (one  | own rings, [P2], the
//             scales        |                | row a token, weights, scales); | rows that peers wrote;
//                           |                | own rings and zeroing (rest)   | later kernels
//           landing         | each rank      | peers' rings, [S2]..[P1]       | own rings, [P2]
//           stages          | shared memory  | ring's loads                   | ring's stores
// Protocol: 1. [S1] show tokens, weights, scales, landing; [S2] wait for all.
//           2. Rings store their own units, in turn with such received units as are there.
//           3. [P1] when units are written at the peers, the block tells the peers' blocks how many;
//           [P2] a ring knows the count before it fetches a received unit. A block ends when it has
//           told all and knows all.
//           In a ring, unit n uses stage n % S: [L] its load completes the stage's barrier (phase
//           n / S), [F] its stores have read the stage before unit n + S - 1 is loaded.
// Reuse:    no memory outlives the call but the control block, whose progress only grows.
// Progress: own units wait only for [S2]; a ring waits for received units only when its own ones
//           are told. Blocks of a grid do not wait for each other, and begin in order, so fewer SMs
//           than blocks will do.
// Failure:  a timeout fills tokens, scales and weights with NaN, integers with 0; see
//           group_sync.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; longer ones than a stage go in
//           pieces; at most kMaxUnitsPerBlock units a block; with fp8 at most kMaxFp8Channels.
#include <cuda_fp8.h>

#include "cuda/kernels/kernels.cuh"
#include "cuda/kernels/row_types.cuh"
#include "cuda/layout/placement.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

using Mode = DispatchMode;

constexpr int kNumWarps = 8;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kMessenger = kNumWarps - 1;
constexpr int kMaxRings = 6;
#ifndef JAX_EP_RINGS
#define JAX_EP_RINGS 2
#endif
constexpr int kNumCopyRings = JAX_EP_RINGS;
constexpr int kMaxStages = 32;  // of a block
constexpr int kMinStages = 3;   // of a ring
constexpr int64_t kMaxPieceBytes = 16384;
constexpr int64_t kRingBytes = 204 * 1024;  // of shared memory, for all rings
constexpr int kNumDequantized = 2;          // buffers of a ring
constexpr int32_t kDequantizedBytes = 4096;
constexpr int kInFlight = 4;  // newest units that are not yet told
static_assert(kMaxRings <= kMaxMovers && kMaxRings < kMessenger);
static_assert(kRingBytes - kNumDequantized * kDequantizedBytes >=
              kMinStages * WireRowBytes(kMaxFp8Channels));
static_assert(kRingBytes / kNumCopyRings >= kMinStages * kMaxPieceBytes);

// How rows are cut, the rings of a block, and the stages of a ring.
struct Cut {
  int32_t num_pieces;
  int32_t stage_bytes;
  int32_t num_rings;
  int32_t num_stages;
};

// What a stage is for.
struct Unit {
  int32_t bytes;     // to store
  int32_t num_own;   // own units up to this one
  uint32_t lands;    // lanes that store the row to a landing area, as it crosses
};

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  // By stage, the rings' one after the other.
  uint64_t full[kMaxStages];  // [L]
  Unit unit[kMaxStages];
  uint64_t to[kMaxStages][kMaxTopK];         // where each lane stores the row; 0: nowhere
  uint64_t scales_to[kMaxStages][kMaxTopK];  // and its scales
  uint32_t num_batches;                      // of rows that have been looked at for zeroing
  Mailbox box;
};

template <Mode kMode>
__device__ int64_t tokens_row_bytes(const DispatchArguments& a) {
  return kMode == Mode::kQuantize ? a.num_channels : a.row_bytes;
}

template <typename Body>
__device__ void with_vector(RowType type, const Body& body) {
  switch (type) {
    case RowType::kF32:
      return body(F32Vector());
    case RowType::kF16:
      return body(F16Vector());
    case RowType::kBF16:
      return body(Bf16Vector());
  }
}

// Quantises 32 vectors of a row, one a lane; `i` is the lane's, which may lie beyond the row.
template <typename Vector>
__device__ void quantize_vectors(const DispatchArguments& a, uint4 vector, int32_t i,
                                 int32_t num_vectors, char* wire) {
  constexpr int kLanes = kScaleBlock / Vector::kCount;  // that share a scale
  constexpr float kLargest = 448.0f;
  float value[Vector::kCount];
  Vector::load(vector, value);
  float amax = 0x1p-100f;
#pragma unroll
  for (int c = 0; c < Vector::kCount; ++c) amax = fmaxf(amax, fabsf(value[c]));  // without NaN
#pragma unroll
  for (int m = 1; m < kLanes; m *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, m));
  }
  float scale = __fdiv_rn(amax, kLargest);
  float inverse = __fdiv_rn(kLargest, amax);
  if (a.power_of_two_scales) {
    uint32_t bits = __float_as_uint(scale);
    if ((bits & 0x007fffff) != 0) bits = (bits & 0x7f800000) + 0x00800000;
    scale = __uint_as_float(bits);
    inverse = __fdiv_rn(1.0f, scale);
  }
  if (i >= num_vectors) return;
  struct alignas(Vector::kCount) {
    __nv_fp8x2_storage_t pair[Vector::kCount / 2];
  } quantized;
#pragma unroll
  for (int c = 0; c < Vector::kCount; c += 2) {
    const float2 two{__fmul_rn(value[c], inverse), __fmul_rn(value[c + 1], inverse)};
    // The conversion clamps to the largest number and keeps NaN.
    quantized.pair[c / 2] = __nv_cvt_float2_to_fp8x2(two, __NV_SATFINITE, __NV_E4M3);
  }
  *reinterpret_cast<decltype(quantized)*>(wire + i * Vector::kCount) = quantized;
  if (i % kLanes == 0) reinterpret_cast<float*>(wire + a.num_channels)[i / kLanes] = scale;
}

// Quantises a row of x into a row of wire, by a warp.
template <typename Vector>
__device__ void quantize_row(const DispatchArguments& a, const char* x, char* wire) {
  constexpr int kAtOnce = 8;  // vectors of a lane in flight
  const int32_t lane = threadIdx.x % 32;
  const auto num_vectors = static_cast<int32_t>(a.num_channels / Vector::kCount);
  for (int32_t begin = 0; begin < num_vectors; begin += 32 * kAtOnce) {
    uint4 loaded[kAtOnce] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = begin + 32 * j + lane;
      if (i < num_vectors) loaded[j] = __ldcs(reinterpret_cast<const uint4*>(x) + i);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (begin + 32 * j >= num_vectors) break;
      quantize_vectors<Vector>(a, loaded[j], begin + 32 * j + lane, num_vectors, wire);
    }
  }
}

// One warp's ring.
template <Mode kMode>
class Ring {
 public:
  __device__ Ring(const GroupView& g, const DispatchArguments& a, const Cut& cut, Shared& shared,
                  int32_t ring, int32_t first_unit, char* memory)
      : g_(g),
        a_(a),
        cut_(cut),
        shared_(shared),
        ring_(ring),
        first_unit_(first_unit),
        num_own_(num_steps(shared.box.num_units, ring, cut.num_rings)),
        num_received_(num_own_ * (g.num_ranks - 1)),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        num_scales_(kMode == Mode::kCopy ? 0
                                         : static_cast<int32_t>(a.num_channels / kScaleBlock)),
        stages_(memory),
        dequantized_(memory + cut.num_stages * cut.stage_bytes) {}

  // False if the group is broken.
  __device__ bool run() {
    advance_own();
    advance_own();
    next_received();
    while (true) {
      while (num_loaded_ - num_stored_ < cut_.num_stages - 1 && load_next()) {
      }
      if (num_stored_ < num_loaded_) {
        store_next();
        continue;
      }
      bulk_wait_group<0>();  // nothing to do meanwhile
      tell(num_own_issued_);
      if (received_ == 0) return true;
      there_ = wait_for_more(shared_.box, received_unit());  // [P2]
      if (there_ == kBroken) return false;
    }
  }

 private:
  // Of the ring's own units: a lane's (token, k). Loaded two units before they are needed.
  struct Own {
    int32_t row = kNoRow;
    int32_t expert = 0;
    float weight = 0.0f;
  };

  // Unit of the group of the ring's i-th unit.
  __device__ int32_t unit_of(int32_t i) const { return first_unit_ + ring_ + i * cut_.num_rings; }
  __device__ int64_t token_of(int32_t unit) const {
    return cut_.num_pieces == 1 ? unit : unit / cut_.num_pieces;
  }
  // Where a unit's piece begins in the row.
  __device__ int64_t offset_of(int32_t unit) const {
    return cut_.num_pieces == 1 ? 0 : int64_t{unit % cut_.num_pieces} * cut_.stage_bytes;
  }
  // How many bytes of a row a unit is, as it crosses.
  __device__ uint32_t bytes_at(int64_t at) const {
    return static_cast<uint32_t>(
        kMode == Mode::kCopy ? min(int64_t{cut_.stage_bytes}, a_.row_bytes - at) : cut_.stage_bytes);
  }
  __device__ uint64_t tokens_at(uint64_t tokens, int64_t row, int64_t at) const {
    return tokens + row * tokens_row_bytes<kMode>(a_) + at;
  }
  __device__ uint64_t scales_at(uint64_t scales, int64_t row) const {
    return scales + row * num_scales_ * 4;
  }
  __device__ uint64_t landing_at(uint64_t landing, int64_t src, int64_t t, int64_t at) const {
    const int64_t bytes = kMode == Mode::kCopy ? a_.row_bytes : cut_.stage_bytes;
    return landing + (src * a_.num_tokens + t) * bytes + at;
  }

  __device__ void advance_own() {
    own_[0] = own_[1];
    own_[1] = Own{};
    if (num_own_fetched_ == num_own_) return;
    const int64_t t = token_of(unit_of(num_own_fetched_++));
    if (lane_ >= a_.top_k) return;
    const int64_t i = t * a_.top_k + lane_;
    own_[1].row = a_.send_row[i];
    own_[1].expert = a_.topk_idx[i];
    if (a_.weights != nullptr) own_[1].weight = a_.topk_weights[i];
  }

  // Unit within the block of the next received one.
  __device__ int32_t received_unit() const {
    const int32_t i = received_begin_ + __ffs(static_cast<int>(received_)) - 1;
    return ring_ + i / (g_.num_ranks - 1) * cut_.num_rings;
  }
  __device__ int32_t received_src(int32_t i) const {
    const int32_t r = g_.rank + 1 + i % (g_.num_ranks - 1);
    return r < g_.num_ranks ? r : r - g_.num_ranks;
  }
  // Finds the next received units that have something to store: a lane looks at each.
  __device__ void next_received() {
    received_ &= received_ - 1;
    const int32_t fewest = a_.landing != nullptr || kMode == Mode::kDequantize ? 1 : 2;
    while (received_ == 0 && num_received_fetched_ < num_received_) {
      received_begin_ = num_received_fetched_;
      num_received_fetched_ += 32;
      const int32_t i = received_begin_ + lane_;
      count_ = 0;
      if (i < num_received_) {
        const int64_t t = token_of(unit_of(i / (g_.num_ranks - 1)));
        const int64_t flat_token = received_src(i) * a_.num_tokens + t;
        first_slot_ = a_.recv_offsets[flat_token];
        count_ = a_.recv_offsets[flat_token + 1] - first_slot_;
      }
      received_ = __ballot_sync(0xffffffffu, count_ >= fewest);
    }
    if (received_ == 0) return;
    const int32_t from = __ffs(static_cast<int>(received_)) - 1;
    const int32_t slot = __shfl_sync(0xffffffffu, first_slot_, from);
    num_rows_ = __shfl_sync(0xffffffffu, count_, from);
    row_ = lane_ < num_rows_ ? a_.recv_order[slot + lane_] : kNoRow;
  }

  // Begins to load a unit: one of its own, or a received one that is there, in turn. False if there
  // is none.
  __device__ bool load_next() {
    while (true) {
      bool may_receive = received_ != 0;
      if (may_receive && received_unit() >= there_) {
        there_ = units_there(shared_.box);  // [P2]
        may_receive = there_ != kBroken && received_unit() < there_;
      }
      if (num_own_issued_ < num_own_ && !(may_receive && in_turn_)) {
        in_turn_ = true;
        if (load_own()) return true;
      } else if (may_receive) {
        in_turn_ = false;
        load_received();
        return true;
      } else {
        return false;
      }
    }
  }

  // False if the token has no row.
  __device__ bool load_own() {
    const int32_t unit = unit_of(num_own_issued_++);
    const Own own = own_[0];
    advance_own();
    const int64_t t = token_of(unit), at = offset_of(unit);
    const bool has_row = own.row != kNoRow;
    const int32_t rank =
        has_row ? own.expert / static_cast<int32_t>(a_.num_local_experts) : kNotRouted;
    const uint32_t same = __match_any_sync(0xffffffffu, rank);
    const bool is_own = rank == g_.rank;
    const bool crosses = has_row && !is_own && (same & ((1u << lane_) - 1)) == 0;
    uint64_t to = 0, scales_to = 0;
    bool lands = false;
    if (has_row) {
      const uint64_t* address = shared_.address[rank];
      if (a_.weights != nullptr && at == 0) {
        reinterpret_cast<float*>(address[1])[own.row] = own.weight;
      }
      lands = crosses && address[3] != 0;
      if (lands) {
        to = landing_at(address[3], g_.rank, t, at);
      } else if (is_own || crosses) {
        to = tokens_at(address[0], own.row, at);
        if (kMode == Mode::kQuantize) scales_to = scales_at(address[2], own.row);
        // The receiver finds numbers and scales where the products will be.
        lands = crosses && kMode == Mode::kDequantize;
      }
    }
    if (__any_sync(0xffffffffu, to != 0) == 0) return false;
    const char* x = static_cast<const char*>(a_.x) + t * a_.row_bytes + at;
    char* stage = note(to, scales_to, lands, bytes_at(at));
    if (kMode == Mode::kCopy) {
      if (lane_ == 0) load(x, bytes_at(at));
    } else {
      with_vector(a_.type, [&](auto vector) { quantize_row<decltype(vector)>(a_, x, stage); });
      fence_proxy_async_shared();  // the copy engine reads what was written
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive(&shared_.full[load_slot()]);  // [L]
    }
    leave_load_stage();
    return true;
  }

  __device__ void load_received() {
    const int32_t i = received_begin_ + __ffs(static_cast<int>(received_)) - 1;
    const int32_t unit = unit_of(i / (g_.num_ranks - 1));
    const int64_t t = token_of(unit), at = offset_of(unit);
    const int32_t first_row = __shfl_sync(0xffffffffu, row_, 0);
    const bool landed = a_.landing != nullptr;
    const auto tokens = reinterpret_cast<uint64_t>(a_.tokens);
    uint64_t source = tokens_at(tokens, first_row, at), to = 0, scales_to = 0;
    uint32_t bytes = bytes_at(at);
    if (landed) {
      source = landing_at(reinterpret_cast<uint64_t>(a_.landing), received_src(i), t, at);
    } else if (kMode == Mode::kQuantize) {
      bytes = static_cast<uint32_t>(a_.num_channels);
    }
    const bool is_there = kMode != Mode::kDequantize && !landed && lane_ == 0;
    if (lane_ < num_rows_ && !is_there) {
      to = tokens_at(tokens, row_, at);
      if (kMode == Mode::kQuantize) {
        scales_to = scales_at(reinterpret_cast<uint64_t>(a_.scales), row_);
      }
    }
    char* stage = note(to, scales_to, false, bytes);
    if (kMode == Mode::kQuantize && !landed) {
      const float* from = a_.scales + int64_t{first_row} * num_scales_;
      auto* scales = reinterpret_cast<float*>(stage + a_.num_channels);
      for (int32_t s = lane_; s < num_scales_; s += 32) scales[s] = __ldcg(from + s);
    }
    if (lane_ == 0) load(reinterpret_cast<const void*>(source), bytes);
    leave_load_stage();
    next_received();
  }

  __device__ int32_t load_slot() const { return ring_ * cut_.num_stages + load_stage_; }
  __device__ int32_t store_slot() const { return ring_ * cut_.num_stages + store_stage_; }

  // Writes down what the next stage is for.
  __device__ char* note(uint64_t to, uint64_t scales_to, bool lands, uint32_t bytes) {
    shared_.to[load_slot()][lane_] = to;
    if (kMode == Mode::kQuantize) shared_.scales_to[load_slot()][lane_] = scales_to;
    const uint32_t all_lands = __ballot_sync(0xffffffffu, lands);
    if (lane_ == 0) {
      shared_.unit[load_slot()] = {static_cast<int32_t>(bytes), num_own_issued_, all_lands};
    }
    return stages_ + load_stage_ * cut_.stage_bytes;
  }
  __device__ void load(const void* source, uint32_t bytes) {
    uint64_t* full = &shared_.full[load_slot()];
    mbarrier_arrive_expect_tx(full, bytes);
    bulk_load(stages_ + load_stage_ * cut_.stage_bytes, source, bytes, full);  // [L]
  }
  __device__ void leave_load_stage() {
    ++num_loaded_;
    if (++load_stage_ == cut_.num_stages) load_stage_ = 0;
  }

  __device__ void store_next() {
    mbarrier_wait_parity(&shared_.full[store_slot()], parity_);  // [L]
    __syncwarp();  // what the lanes noted
    const Unit unit = shared_.unit[store_slot()];
    const uint64_t to = shared_.to[store_slot()][lane_];
    const char* stage = stages_ + store_stage_ * cut_.stage_bytes;
    const bool lands = (unit.lands >> lane_ & 1) != 0;
    if (kMode == Mode::kCopy) {
      if (to != 0) bulk_store(reinterpret_cast<void*>(to), stage, static_cast<uint32_t>(unit.bytes));
    } else if (lands) {
      bulk_store(reinterpret_cast<void*>(to), stage, static_cast<uint32_t>(cut_.stage_bytes));
    } else if (kMode == Mode::kQuantize && to != 0) {
      bulk_store(reinterpret_cast<void*>(to), stage, static_cast<uint32_t>(a_.num_channels));
    }
    bulk_commit_group();
    if (kMode == Mode::kQuantize) {
      const uint64_t scales_to = shared_.scales_to[store_slot()][lane_];
      const auto* scales = reinterpret_cast<const float*>(stage + a_.num_channels);
      uint32_t left = __ballot_sync(0xffffffffu, scales_to != 0);
      for (; left != 0; left &= left - 1) {
        auto* at = reinterpret_cast<float*>(
            __shfl_sync(0xffffffffu, scales_to, __ffs(static_cast<int>(left)) - 1));
        for (int32_t s = lane_; s < num_scales_; s += 32) at[s] = scales[s];
      }
    }
    if (kMode == Mode::kDequantize) {
      with_vector(a_.type, [&](auto vector) {
        store_dequantized<decltype(vector)>(stage, lands ? 0 : to);
      });
    }
    if (++store_stage_ == cut_.num_stages) {
      store_stage_ = 0;
      parity_ ^= 1;
    }
    ++num_stored_;
    bulk_wait_group_read<1>();  // [F] of the unit before
    bulk_wait_group<kInFlight>();
    const int32_t written = num_own_at_[0];
#pragma unroll
    for (int i = 0; i + 1 < kInFlight; ++i) num_own_at_[i] = num_own_at_[i + 1];
    num_own_at_[kInFlight - 1] = unit.num_own;
    tell(written);
  }

  // Own units whose stores are written: for the messenger, [P1].
  __device__ void tell(int32_t num_own) {
    __syncwarp();
    if (num_own == num_told_) return;
    num_told_ = num_own;
    if (lane_ == 0) st_release_cta_shared(&shared_.box.done[ring_], num_own);
  }

  // Stores a quantised row's products with its scales where the lanes want it.
  template <typename Vector>
  __device__ void store_dequantized(const char* quantized, uint64_t to) {
    const auto* scales = reinterpret_cast<const float*>(quantized + a_.num_channels);
    if (__any_sync(0xffffffffu, to != 0) == 0) return;
    constexpr int kPiece = kDequantizedBytes / 16;  // vectors
    const auto num_vectors = static_cast<int32_t>(a_.num_channels / Vector::kCount);
    for (int32_t begin = 0; begin < num_vectors; begin += kPiece) {
      char* buffer = dequantized_ + num_dequantized_++ % kNumDequantized * kDequantizedBytes;
      bulk_wait_group_read<kNumDequantized - 1>();  // each lane of its own stores
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

  const GroupView& g_;
  const DispatchArguments& a_;
  const Cut& cut_;
  Shared& shared_;
  const int32_t ring_;
  const int32_t first_unit_;               // of the block
  const int32_t num_own_, num_received_;   // of the ring
  const int32_t lane_, num_scales_;
  char* const stages_;       // [num_stages][stage_bytes]
  char* const dequantized_;  // [kNumDequantized][kDequantizedBytes]
  // Own units: metadata is fetched, loads are issued, writes are told.
  Own own_[2];
  int32_t num_own_fetched_ = 0, num_own_issued_ = 0, num_told_ = 0;
  int32_t num_own_at_[kInFlight] = {};  // issued up to each of the newest stored units
  // Received units, 32 at a time, one a lane; bits of those to come, and the rows of the next.
  int32_t num_received_fetched_ = 0, received_begin_ = 0;
  uint32_t received_ = 0;
  int32_t first_slot_ = 0, count_ = 0;
  int32_t num_rows_ = 0, row_ = kNoRow;
  int32_t there_ = 0;     // units that peers have written, as far as is known
  bool in_turn_ = false;  // a received unit goes first
  // The ring: units loaded and stored, the stages of the next ones, the phase to wait for.
  int32_t num_loaded_ = 0, num_stored_ = 0, load_stage_ = 0, store_stage_ = 0;
  uint32_t parity_ = 0;
  uint32_t num_dequantized_ = 0;
};

// Zeros, by any warp; those of a block share its part.
template <Mode kMode>
__device__ void zero_rest(const DispatchArguments& a, Shared& shared) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int64_t row_bytes = tokens_row_bytes<kMode>(a);
  const int64_t num_scales = kMode == Mode::kQuantize ? a.num_channels / kScaleBlock : 0;
  int32_t used = 0;
  if (!a.zero_tail) {
    for (int64_t e = lane; e < a.num_local_experts; e += 32) used += a.group_sizes[e];
    used = __reduce_add_sync(0xffffffffu, used);
  }
  const int64_t end = a.zero_tail ? a.capacity : used;
  while (true) {
    uint32_t taken = 0;
    if (lane == 0) taken = atomicAdd(&shared.num_batches, 1);
    taken = __shfl_sync(0xffffffffu, taken, 0);
    const int64_t batch = (int64_t{taken} * gridDim.x + blockIdx.x) * 32;
    if (batch >= end) return;
    const int64_t row = batch + lane;
    const bool is_empty = row < end && a.recv_src[row] == kNoSource;
    if (is_empty && a.weights != nullptr) a.weights[row] = 0.0f;
    uint32_t empty = __ballot_sync(0xffffffffu, is_empty);
    for (; empty != 0; empty &= empty - 1) {
      const int64_t zero_row = batch + __ffs(static_cast<int>(empty)) - 1;
      auto* at = reinterpret_cast<uint4*>(static_cast<char*>(a.tokens) + zero_row * row_bytes);
      for (int64_t i = lane; i < row_bytes / 16; i += 32) at[i] = uint4{0, 0, 0, 0};
      for (int64_t i = lane; i < num_scales; i += 32) a.scales[zero_row * num_scales + i] = 0.0f;
    }
  }
}

template <Mode kMode>
__global__ __launch_bounds__(kNumThreads,
                             1) void dispatch_kernel(const __grid_constant__ GroupView g,
                                                     const __grid_constant__ DispatchArguments a,
                                                     const __grid_constant__ Cut cut) {
  extern __shared__ __align__(128) char rings[];
  __shared__ Shared shared;
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const int32_t first = first_unit(num_units, blockIdx.x);
  const int32_t num_own = first_unit(num_units, blockIdx.x + 1) - first;
  if (threadIdx.x == 0) {
    for (int s = 0; s < cut.num_rings * cut.num_stages; ++s) mbarrier_init(&shared.full[s], 1);
    fence_mbarrier_init();
    shared.num_batches = 0;
    shared.box = {{}, cut.num_rings, num_own, 0};
  }
  const bool lands = a.landing != nullptr;
  const auto tokens = reinterpret_cast<uint64_t>(a.tokens);
  const auto weights = reinterpret_cast<uint64_t>(a.weights);
  const auto scales = reinterpret_cast<uint64_t>(a.scales);
  const uint64_t own[kNumAddresses] = {tokens, weights, scales, 0};
  if (blockIdx.x == 0) {
    const uint64_t shown[kNumAddresses] = {lands ? 0 : tokens, weights, scales,
                                           reinterpret_cast<uint64_t>(a.landing)};
    send_start(g, OpKind::kDispatch, shown);  // [S1]
  }
  bool ok = true;
  if (num_own > 0) ok = receive_start(g, OpKind::kDispatch, own, shared.address);  // [S2]
  if (num_own == 0) __syncthreads();
  if (ok && num_own > 0) {
    if (warp < cut.num_rings) {
      Ring<kMode> ring(g, a, cut, shared, warp, first,
                       rings + warp * (kRingBytes / cut.num_rings / 128 * 128));
      ok = ring.run();
    } else if (warp == kMessenger) {
      ok = run_messenger(g, OpKind::kDispatch, shared.box);
    }
  }
  zero_rest<kMode>(a, shared);
  const Finish finish = finish_block(g, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kFail) {
    fill(a.tokens, a.capacity * tokens_row_bytes<kMode>(a), a.is_integer ? 0 : kNan);
    if (kMode == Mode::kQuantize) {
      fill(a.scales, a.capacity * a.num_channels / kScaleBlock * 4, kNan);
    }
    if (a.weights != nullptr) fill(a.weights, a.capacity * 4, kNan);
  }
  end_call(g);
}

template <Mode kMode>
cudaError_t Launch(const GroupView& group, const DispatchArguments& a, int num_sms,
                   cudaStream_t stream) {
  Cut cut;
  int64_t num_stages;
  if (kMode == Mode::kCopy) {
    // Equal pieces, each a multiple of 16 bytes.
    const int64_t num_pieces = (a.row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    cut.num_pieces = static_cast<int32_t>(num_pieces);
    cut.stage_bytes =
        static_cast<int32_t>(((a.row_bytes + num_pieces - 1) / num_pieces + 15) / 16 * 16);
    cut.num_rings = kNumCopyRings;
    num_stages = kRingBytes / cut.num_rings / cut.stage_bytes;
  } else {
    if (a.num_channels > kMaxFp8Channels) return cudaErrorInvalidValue;
    cut.num_pieces = 1;
    cut.stage_bytes = static_cast<int32_t>(WireRowBytes(a.num_channels));
    const int64_t buffers = kMode == Mode::kDequantize ? kNumDequantized * kDequantizedBytes : 0;
    cut.num_rings = kMaxRings + 1;
    do {
      --cut.num_rings;
      num_stages = (kRingBytes / cut.num_rings / 128 * 128 - buffers) / cut.stage_bytes;
    } while (num_stages < kMinStages);
  }
  const int64_t most = kMaxStages / cut.num_rings;
  cut.num_stages = static_cast<int32_t>(num_stages < most ? num_stages : most);
  if (a.num_tokens * cut.num_pieces / num_sms >= kMaxUnitsPerBlock) return cudaErrorInvalidValue;
  dispatch_kernel<kMode>
      <<<static_cast<unsigned>(num_sms), kNumThreads, kRingBytes, stream>>>(group, a, cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchDispatch(const GroupView& group, const DispatchArguments& a, int num_sms,
                           cudaStream_t stream) {
  switch (a.mode) {
    case Mode::kCopy:
      return Launch<Mode::kCopy>(group, a, num_sms, stream);
    case Mode::kQuantize:
      return Launch<Mode::kQuantize>(group, a, num_sms, stream);
    case Mode::kDequantize:
      return Launch<Mode::kDequantize>(group, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PrepareDispatch() {
  for (auto* kernel : {dispatch_kernel<Mode::kCopy>, dispatch_kernel<Mode::kQuantize>,
                       dispatch_kernel<Mode::kDequantize>}) {
    if (cudaError_t e = PrepareKernel(kernel, kRingBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu
