// dispatch: each rank pulls the rows of its experts from where their tokens live.
// After:    tokens[row] = x of rank src [t] for every kept row, (src, t, k) = recv_src[row];
//           padding is zero, the tail too if zero_tail; weights[row] = topk_weights of src [t, k],
//           else 0.
//           With fp8, x crosses as float8_e4m3fn with a scale per 128 channels, as
//           jax_ep/reference.py's quantize defines them: tokens and scales are those, or, with
//           dequantize, tokens are their products in x's type.
// Roles:    one block an SM, 8 warps. Warps 0 and 1 each run a ring: they load each token's row
//           once (bulk copy, from the peer into shared memory) and store it to each of its rows
//           (bulk copies from shared memory). Warps 2..7, the helpers, first quantise this rank's
//           tokens if that is asked for (block b has the tokens b, b + G, .. of G blocks), then
//           fetch the weights and zero what holds no row.
// Buffers:  name                    | lives on       | written by      | read by
//           x, topk_weights         | XLA, each rank | before the call | all ranks, [S2]..[E1]
//           wire                    | XLA, each rank | own helpers     | all ranks, [P2]..[E1]
//           stages                  | shared memory  | ring's loads    | ring's stores
//           tokens, scales, weights | XLA, own       | own blocks      | later kernels
// Protocol: 1. [S1] show x (or wire) and topk_weights, [S2] wait for all.
//           2. [P1] the helpers of a block tell every rank, their own too, how many tokens they
//           have quantised.
//           3. Rings work through the (token, source) pairs, handed out by a counter; with fp8,
//           [P2] waits for the pair's token.
//           4. [E1], [E2].
//           In a ring, token n uses stage n % S: [L] its load completes the stage's barrier (phase
//           n / S), [F] its stores have read the stage before token n + S is loaded into it.
// Reuse:    no memory outlives the call but the control block, whose progress only grows.
// Progress: [S1] waits for nothing; quantising waits only for [S2]; rings wait for quantisers, so
//           with fp8 all blocks of a grid must get an SM. Without it no block waits for another.
// Failure:  a timeout fills tokens, scales and weights with NaN, integers with 0; see
//           group_sync.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; longer ones than a stage go in
//           pieces, one after the other; with fp8 two rows must fit a ring.
#include <cuda_fp8.h>

#include "cuda/kernels/kernels.cuh"
#include "cuda/kernels/row_types.cuh"
#include "cuda/layout/placement.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumRings = 2;
constexpr int kNumWarps = 8;
constexpr int kNumHelpers = kNumWarps - kNumRings;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kMaxStages = 16;
constexpr int64_t kMaxPieceBytes = 16384;
constexpr int kUnitsAtOnce = 4;
constexpr int64_t kRingBytes = 104 * 1024;  // of shared memory, each ring
constexpr int kNumDequantized = 2;          // buffers of a ring
constexpr int32_t kDequantizedBytes = 8192;
constexpr int kHelperBarrier = 1;
static_assert((kRingBytes - kNumDequantized * kDequantizedBytes) / 2 >=
              WireRowBytes(kMaxFp8Channels));

// How rows travel.
enum class Mode { kCopy, kQuantize, kDequantize };

// How rows are cut, and the stages of a ring.
struct Cut {
  int32_t num_pieces;
  int32_t stage_bytes;
  int32_t num_stages;
};

// A ring's memory, and what the token in each stage is for.
struct Ring {
  char* stages;               // [num_stages][stage_bytes]
  char* dequantized;          // [kNumDequantized][kDequantizedBytes]
  uint64_t* full;             // [num_stages], [L]
  int32_t (*rows)[kMaxTopK];  // [num_stages], rows of the token
  int4* token;                // [num_stages]: number of rows, offset in the row, bytes
};

// Work over all (source rank, token) pairs of the group, in an order that mixes the sources, so
// that the links and the local memory are busy from beginning to end. Ranks begin with different
// sources.
struct TokenOrder {
  int32_t num_ranks, num_tokens, rank;

  // Source rank * T + token of the pair at `position` in [0, num_ranks * num_tokens).
  __device__ int32_t flat_token(int32_t position) const {
    const int32_t token = position / num_ranks;
    const int32_t src = (position + rank) % num_ranks;
    return src * num_tokens + token;
  }
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

// Stores a quantised row's products with its scales to `count` rows, lane i's being `row`.
template <typename Vector>
__device__ void store_dequantized(const DispatchArguments& a, const Ring& ring,
                                  const char* quantized, int32_t row, int32_t count,
                                  uint32_t& num_stored) {
  const int32_t lane = threadIdx.x % 32;
  const auto* scales = reinterpret_cast<const float*>(quantized + a.num_channels);
  constexpr int kPiece = kDequantizedBytes / 16;  // vectors
  const auto num_vectors = static_cast<int32_t>(a.num_channels / Vector::kCount);
  for (int32_t begin = 0; begin < num_vectors; begin += kPiece) {
    char* buffer = ring.dequantized + num_stored++ % kNumDequantized * kDequantizedBytes;
    bulk_wait_group_read<kNumDequantized - 1>();  // each lane of its own stores
    __syncwarp();
    const int32_t size = min(kPiece, num_vectors - begin);
#pragma unroll 4
    for (int32_t i = lane; i < size; i += 32) {
      const int32_t channel = (begin + i) * Vector::kCount;
      const float scale = scales[channel / kScaleBlock];
      float value[Vector::kCount];
#pragma unroll
      for (int c = 0; c < Vector::kCount; c += 4) {
        const auto f =
            static_cast<float4>(*reinterpret_cast<const __nv_fp8x4_e4m3*>(quantized + channel + c));
        value[c] = __fmul_rn(f.x, scale);
        value[c + 1] = __fmul_rn(f.y, scale);
        value[c + 2] = __fmul_rn(f.z, scale);
        value[c + 3] = __fmul_rn(f.w, scale);
      }
      reinterpret_cast<uint4*>(buffer)[i] = Vector::store(value);
    }
    fence_proxy_async_shared();  // the copy engine reads what was written
    __syncwarp();
    if (lane < count) {
      bulk_store(static_cast<char*>(a.tokens) + row * a.row_bytes + begin * 16, buffer,
                 static_cast<uint32_t>(size * 16));
    }
    bulk_commit_group();
  }
}

// Takes work from the device's counter until none is left. A unit is one piece of the row of one
// (source, token) pair; a ring takes kUnitsAtOnce, so that rings with fewer rows take more. Stops
// early if the group is broken.
template <Mode kMode>
__device__ void run_ring(const GroupView& g, const TokenOrder& order, const DispatchArguments& a,
                         const Ring& ring, const Cut& cut,
                         const uint64_t (*address)[kNumAddresses]) {
  const int32_t lane = threadIdx.x % 32;
  const auto num_tokens = static_cast<int32_t>(a.num_tokens);
  const int64_t num_units = int64_t{g.num_ranks} * num_tokens * cut.num_pieces;
  const int64_t row_bytes = kMode == Mode::kCopy ? a.row_bytes : cut.stage_bytes;

  uint32_t left = 0;  // lanes whose unit is still to be loaded
  bool exhausted = false;
  int32_t flat_token = 0, piece = 0, first_slot = 0, num_rows = 0;
  uint32_t num_loaded = 0;
  const auto load_next = [&]() {
    while (left == 0) {
      if (exhausted) return;
      uint32_t taken = 0;
      if (lane == 0) taken = atomicAdd(&g.control->local.next_unit, kUnitsAtOnce);
      const int64_t unit = int64_t{__shfl_sync(0xffffffffu, taken, 0)} + lane;
      exhausted = unit - lane + kUnitsAtOnce >= num_units;
      num_rows = 0;
      bool there = true;
      if (lane < kUnitsAtOnce && unit < num_units) {
        piece = static_cast<int32_t>(unit % cut.num_pieces);
        flat_token = order.flat_token(static_cast<int32_t>(unit / cut.num_pieces));
        first_slot = a.recv_offsets[flat_token];
        num_rows = a.recv_offsets[flat_token + 1] - first_slot;
        if (kMode != Mode::kCopy && num_rows > 0) {
          const int32_t src = flat_token / num_tokens, t = flat_token - src * num_tokens;
          const auto grid = static_cast<int32_t>(gridDim.x);
          const int32_t slot = g.peer[src].slot_here;
          there = wait_flag(g, OpKind::kDispatch, &g.control->progress[slot][t % grid],
                            progress_of(g.control->local.epoch[slot] + 1, t / grid + 1), src,
                            kProgress);  // [P2]
        }
      }
      left = __ballot_sync(0xffffffffu, num_rows > 0);
      if (kMode != Mode::kCopy) {
        if (__all_sync(0xffffffffu, there) == 0) {
          left = 0;
          exhausted = true;
        }
        __syncwarp();
        fence_proxy_async();  // what [P2] made visible is read by the copy engine
      }
    }
    const int32_t from = __ffs(static_cast<int>(left)) - 1;
    left &= left - 1;
    const uint32_t stage = num_loaded++ % cut.num_stages;
    const int32_t count = __shfl_sync(0xffffffffu, num_rows, from);
    const int32_t slot = __shfl_sync(0xffffffffu, first_slot, from);
    if (lane == from) {
      const int32_t src = flat_token / num_tokens;
      const int64_t at = int64_t{piece} * cut.stage_bytes;
      const auto bytes = static_cast<uint32_t>(min(int64_t{cut.stage_bytes}, row_bytes - at));
      const uint64_t row = address[src][0] + (flat_token - src * num_tokens) * row_bytes + at;
      mbarrier_arrive_expect_tx(&ring.full[stage], bytes);
      bulk_load(ring.stages + stage * cut.stage_bytes, reinterpret_cast<const void*>(row), bytes,
                &ring.full[stage]);
      ring.token[stage] = int4{count, static_cast<int32_t>(at), static_cast<int32_t>(bytes), 0};
    }
    if (lane < count) ring.rows[stage][lane] = a.recv_order[slot + lane];
  };

  uint32_t num_dequantized = 0;
  for (int32_t i = 0; i < cut.num_stages; ++i) load_next();
  for (uint32_t next = 0; next < num_loaded; ++next) {
    const uint32_t stage = next % cut.num_stages;
    mbarrier_wait_parity(&ring.full[stage], next / cut.num_stages & 1);  // [L]
    __syncwarp();  // what the lanes noted at the load
    const int4 token = ring.token[stage];
    const char* bytes = ring.stages + stage * cut.stage_bytes;
    const int32_t row = lane < token.x ? ring.rows[stage][lane] : 0;
    if (kMode == Mode::kDequantize) {
      with_vector(a.type, [&](auto vector) {
        store_dequantized<decltype(vector)>(a, ring, bytes, row, token.x, num_dequantized);
      });
      __syncwarp();  // all lanes have read the stage
      load_next();
      continue;
    }
    if (lane < token.x) {
      bulk_store(static_cast<char*>(a.tokens) + row * tokens_row_bytes<kMode>(a) + token.y, bytes,
                 static_cast<uint32_t>(kMode == Mode::kCopy ? token.z : a.num_channels));
    }
    bulk_commit_group();
    if (kMode == Mode::kQuantize) {
      const auto* scales = reinterpret_cast<const float*>(bytes + a.num_channels);
      const auto num_scales = static_cast<int32_t>(a.num_channels / kScaleBlock);
      for (int32_t i = 0; i < token.x; ++i) {
        float* to = a.scales + int64_t{__shfl_sync(0xffffffffu, row, i)} * num_scales;
        for (int32_t s = lane; s < num_scales; s += 32) to[s] = scales[s];
      }
    }
    if (next > 0) {
      bulk_wait_group_read<1>();  // [F] of the token before
      __syncwarp();
      load_next();
    }
  }
  bulk_wait_group<0>();  // written: [E1] may follow
  __syncwarp();
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

// Fills wire, by the helpers of all blocks.
__device__ void quantize(const GroupView& g, const DispatchArguments& a, int32_t wire_row_bytes) {
  const int32_t helper = threadIdx.x / 32 - kNumRings;
  const int32_t num_here = num_steps(static_cast<int32_t>(a.num_tokens), blockIdx.x, gridDim.x);
  for (int32_t done = 0; done < num_here; done += kNumHelpers) {
    const int64_t t = blockIdx.x + int64_t{done + helper} * gridDim.x;
    if (t < a.num_tokens) {
      const char* x = static_cast<const char*>(a.x) + t * a.row_bytes;
      char* wire = static_cast<char*>(a.wire) + t * wire_row_bytes;
      with_vector(a.type, [&](auto vector) { quantize_row<decltype(vector)>(a, x, wire); });
    }
    named_barrier_sync(kHelperBarrier, kNumHelpers * 32);
    if (helper != 0) continue;
    fence_acq_rel_sys();
    for (int32_t r = threadIdx.x % 32; r < g.num_ranks; r += 32) {
      send_progress(g, r, static_cast<int>(blockIdx.x), min(done + kNumHelpers, num_here));  // [P1]
    }
  }
}

// Weights and zeros, by the helpers.
template <Mode kMode>
__device__ void fill_rest(const GroupView& g, const DispatchArguments& a,
                          const uint64_t (*address)[kNumAddresses]) {
  const int32_t lane = threadIdx.x % 32;
  const int64_t warp = int64_t{blockIdx.x} * kNumHelpers + threadIdx.x / 32 - kNumRings;
  const int64_t num_warps = int64_t{gridDim.x} * kNumHelpers;
  const int64_t row_bytes = tokens_row_bytes<kMode>(a);
  const int64_t num_scales = kMode == Mode::kQuantize ? a.num_channels / kScaleBlock : 0;
  int32_t used = 0;
  for (int64_t e = lane; e < a.num_local_experts; e += 32) used += a.group_sizes[e];
  used = __reduce_add_sync(0xffffffffu, used);
  const int64_t end = a.zero_tail ? a.capacity : used;
  const auto ids_per_rank = static_cast<int32_t>(a.num_tokens * a.top_k);
  for (int64_t batch = warp * 32; batch < end; batch += num_warps * 32) {
    const int64_t row = batch + lane;
    const int32_t flat = row < end ? a.recv_src[row] : 0;
    if (a.weights != nullptr && row < end) {
      float weight = 0.0f;
      if (flat != kNoSource) {
        const int32_t src = flat / ids_per_rank;
        const auto* weights = reinterpret_cast<const int32_t*>(address[src][1]);
        weight = __int_as_float(ld_relaxed_sys_i32(weights + (flat - src * ids_per_rank)));
      }
      a.weights[row] = weight;
    }
    uint32_t empty = __ballot_sync(0xffffffffu, row < end && flat == kNoSource);
    while (empty != 0) {
      const int64_t zero_row = batch + __ffs(static_cast<int>(empty)) - 1;
      empty &= empty - 1;
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
  __shared__ uint64_t address[kMaxPeers][kNumAddresses];
  __shared__ uint64_t full[kNumRings][kMaxStages];
  __shared__ int32_t rows[kNumRings][kMaxStages][kMaxTopK];
  __shared__ int4 token[kNumRings][kMaxStages];
  const int32_t warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int r = 0; r < kNumRings; ++r) {
      for (int s = 0; s < cut.num_stages; ++s) mbarrier_init(&full[r][s], 1);
    }
    fence_mbarrier_init();
  }
  const uint64_t own[kNumAddresses] = {
      reinterpret_cast<uint64_t>(kMode == Mode::kCopy ? a.x : a.wire),
      reinterpret_cast<uint64_t>(a.topk_weights), 0};
  if (blockIdx.x == 0) send_start(g, own);                  // [S1]
  if (receive_start(g, OpKind::kDispatch, own, address)) {  // [S2]
    if (warp < kNumRings) {
      fence_proxy_async();  // what [S2] made visible is read by the copy engine
      const TokenOrder order{g.num_ranks, static_cast<int32_t>(a.num_tokens), g.rank};
      char* stages = rings + warp * kRingBytes;
      const Ring ring{stages, stages + cut.num_stages * cut.stage_bytes, full[warp], rows[warp],
                      token[warp]};
      run_ring<kMode>(g, order, a, ring, cut, address);
    } else {
      if (kMode != Mode::kCopy) quantize(g, a, cut.stage_bytes);
      fill_rest<kMode>(g, a, address);
    }
  }
  if (!is_last_block(g)) return;
  if (!is_broken_for_all(g, OpKind::kDispatch)) {
    send_end(g);                        // [E1]
    receive_end(g, OpKind::kDispatch);  // [E2]
  }
  if (is_broken_for_all(g, OpKind::kDispatch)) {
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
  int64_t bytes = kRingBytes;  // for stages
  if (kMode == Mode::kCopy) {
    // Equal pieces, each a multiple of 16 bytes.
    const int64_t num_pieces = (a.row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
    cut.num_pieces = static_cast<int32_t>(num_pieces);
    cut.stage_bytes =
        static_cast<int32_t>(((a.row_bytes + num_pieces - 1) / num_pieces + 15) / 16 * 16);
  } else {
    cut.num_pieces = 1;
    cut.stage_bytes = static_cast<int32_t>(WireRowBytes(a.num_channels));
    if (kMode == Mode::kDequantize) bytes -= kNumDequantized * kDequantizedBytes;
  }
  const int64_t num_stages = bytes / cut.stage_bytes;
  cut.num_stages = static_cast<int32_t>(num_stages < kMaxStages ? num_stages : kMaxStages);
  if (cut.num_stages < 2 || a.num_tokens / num_sms >= kMaxUnitsPerBlock) {
    return cudaErrorInvalidValue;
  }
  dispatch_kernel<kMode>
      <<<static_cast<unsigned>(num_sms), kNumThreads, kNumRings * kRingBytes, stream>>>(group, a,
                                                                                        cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchDispatch(const GroupView& group, const DispatchArguments& a, int num_sms,
                           cudaStream_t stream) {
  if (a.wire == nullptr) return Launch<Mode::kCopy>(group, a, num_sms, stream);
  if (a.scales != nullptr) return Launch<Mode::kQuantize>(group, a, num_sms, stream);
  return Launch<Mode::kDequantize>(group, a, num_sms, stream);
}

cudaError_t PrepareDispatch() {
  for (auto* kernel : {dispatch_kernel<Mode::kCopy>, dispatch_kernel<Mode::kQuantize>,
                       dispatch_kernel<Mode::kDequantize>}) {
    if (cudaError_t e = PrepareKernel(kernel, kNumRings * kRingBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

}  // namespace jax_ep::gpu
