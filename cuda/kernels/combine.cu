// combine: each rank sums its rows of every token and pushes the sum to the token's rank, which
// adds the ranks' sums. After:    out[t] = round(sum over ranks r ascending of round(sum over the
// kept rows of t on r, in k
//           order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
// Roles:    two kernels of num_sms blocks, 16 warps each. combine_push: a warp takes a contiguous
// share
//           of recv_order and forms the sum of a token at a time, 16 bytes a lane.
//           combine_sum: a warp takes a token of this rank at a time.
// Buffers:  y, weights, values | XLA, own       | before the call     | combine_push
//           partial [R, T, H]  | XLA, each rank | all ranks, [S2]..[E1] | combine_sum, after [E2]
//           collected          | XLA, each rank | all ranks, [S2]..[E1]; combine_sum, the rest |
//           later out                | XLA, own       | combine_sum         | later kernels
// Protocol: push: 1. [S1] show partial and collected, [S2] wait for all. 2. Sum and store, remote
// or
//           own. 3. [E1] by the last block. sum: 4. [E2], in every block. 5. Add. The last
//           block advances the epochs.
// Reuse:    partial is the call's own scratch; no peer writes it after [E2].
// Progress: combine_push waits only in [S2]; combine_sum waits for the peers' combine_push.
// Failure:  a timeout fills out and collected with NaN bits; see group_sync.cuh.
// Limits:   rows are multiples of 16 bytes; K <= 32; compiled without -ftz, -fmad=false.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/kernels.cuh"
#include "cuda/layout/placement.h"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumWarps = 16;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kRowsAtOnce = 4;  // rows in flight per lane

struct F32Vector {
  static constexpr int kCount = 4;
  __device__ static void load(const uint4& v, float (&x)[kCount]) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
  }
  __device__ static uint4 store(const float (&x)[kCount]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
            __float_as_uint(x[3])};
  }
};

template <typename Half, typename Convert>
struct HalfVector {
  static constexpr int kCount = 8;
  __device__ static void load(const uint4& v, float (&x)[kCount]) {
    const auto* h = reinterpret_cast<const Half*>(&v);
    for (int i = 0; i < kCount; ++i) x[i] = Convert::up(h[i]);
  }
  __device__ static uint4 store(const float (&x)[kCount]) {
    uint4 v;
    auto* h = reinterpret_cast<Half*>(&v);
    for (int i = 0; i < kCount; ++i) h[i] = Convert::down(x[i]);
    return v;
  }
};
struct ConvertBf16 {
  __device__ static float up(__nv_bfloat16 h) { return __bfloat162float(h); }
  __device__ static __nv_bfloat16 down(float x) { return __float2bfloat16_rn(x); }
};
struct ConvertF16 {
  __device__ static float up(__half h) { return __half2float(h); }
  __device__ static __half down(float x) { return __float2half_rn(x); }
};
using Bf16Vector = HalfVector<__nv_bfloat16, ConvertBf16>;
using F16Vector = HalfVector<__half, ConvertF16>;

__device__ void fill_nan(void* buffer, int64_t num_bytes) {
  const int64_t stride = int64_t{gridDim.x} * kNumThreads;
  auto* words = static_cast<uint32_t*>(buffer);
  for (int64_t i = int64_t{blockIdx.x} * kNumThreads + threadIdx.x; i < num_bytes / 4;
       i += stride) {
    words[i] = ~0u;
  }
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads, 1) void combine_push_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ CombineArguments a) {
  __shared__ uint64_t address[kMaxPeers][kNumAddresses];
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected), 0};
  if (blockIdx.x == 0) send_start(g, own);                        // [S1]
  if (!receive_start(g, OpKind::kCombine, own, address)) return;  // [S2]

  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t num_vectors = a.num_channels / Vector::kCount;
  const Slots slots{a.recv_order, a.recv_src, *a.num_recv, static_cast<int32_t>(a.top_k)};
  const int64_t share = int64_t{warp} * gridDim.x + blockIdx.x;
  const int64_t num_shares = int64_t{kNumWarps} * gridDim.x;
  const int32_t end =
      slots.token_begin(static_cast<int32_t>(slots.num_slots * (share + 1) / num_shares));
  int32_t slot = slots.token_begin(static_cast<int32_t>(slots.num_slots * share / num_shares));
  const auto* y = static_cast<const uint4*>(a.y);
  while (slot < end) {
    // The token's rows, one a lane.
    const int32_t here = slot + lane;
    const int32_t row = here < end ? slots.row(here) : -1;
    const int32_t flat = row >= 0 ? a.recv_src[row] : -1;
    const int32_t flat_token = flat >= 0 ? flat / slots.top_k : -1;
    const int32_t token = __shfl_sync(0xffffffffu, flat_token, 0);
    const bool mine = flat_token == token;
    const int32_t count = __popc(__ballot_sync(0xffffffffu, mine));
    const float weight = mine && a.weights != nullptr ? a.weights[row] : 1.0f;
    const int32_t src = token / static_cast<int32_t>(a.num_tokens);
    const int32_t t = token - src * static_cast<int32_t>(a.num_tokens);
    if (mine && a.values != nullptr) {
      const int32_t k = flat - token * slots.top_k;
      reinterpret_cast<float*>(address[src][1])[t * a.top_k + k] = a.values[row];
    }
    auto* to = reinterpret_cast<uint4*>(address[src][0]) +
               (int64_t{g.rank} * a.num_tokens + t) * num_vectors;
    for (int64_t v = lane; v - lane < num_vectors; v += 32) {
      const bool inside = v < num_vectors;
      float acc[Vector::kCount] = {};
      for (int32_t first = 0; first < count; first += kRowsAtOnce) {
        uint4 loaded[kRowsAtOnce];
        float w[kRowsAtOnce];
#pragma unroll
        for (int32_t i = 0; i < kRowsAtOnce; ++i) {
          const int32_t from = first + i < count ? first + i : 0;
          const int32_t r = __shfl_sync(0xffffffffu, row, from);
          w[i] = __shfl_sync(0xffffffffu, weight, from);
          if (inside && first + i < count) loaded[i] = __ldcs(y + r * num_vectors + v);
        }
#pragma unroll
        for (int32_t i = 0; i < kRowsAtOnce; ++i) {
          if (!inside || first + i >= count) continue;
          float x[Vector::kCount];
          Vector::load(loaded[i], x);
          for (int c = 0; c < Vector::kCount; ++c) {
            acc[c] = __fadd_rn(acc[c], a.weights != nullptr ? __fmul_rn(w[i], x[c]) : x[c]);
          }
        }
      }
      if (inside) to[v] = Vector::store(acc);
    }
    slot += count;
  }
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = is_last_block(g);
  __syncthreads();
  if (!last) return;
  send_end(g);  // [E1]
  if (threadIdx.x == 0) g.control->local.num_blocks_done = 0;
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads, 1) void combine_sum_kernel(
    const __grid_constant__ GroupView g, const __grid_constant__ CombineArguments a) {
  __shared__ int32_t ranks[kNumWarps][kMaxTopK];
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  const bool ok = receive_end(g, OpKind::kCombine) && !is_broken(g);  // [E2]
  if (__syncthreads_and(ok) == 0) {
    fill_nan(a.out, a.num_tokens * row_bytes);
    if (a.values != nullptr) fill_nan(a.collected, a.num_tokens * a.top_k * 4);
    return;
  }
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t num_vectors = a.num_channels / Vector::kCount;
  const auto* partial = static_cast<const uint4*>(a.partial);
  for (int64_t t = int64_t{warp} * gridDim.x + blockIdx.x; t < a.num_tokens;
       t += int64_t{kNumWarps} * gridDim.x) {
    // The ranks that hold rows of t, ascending, without repetition.
    int32_t rank = -1;
    if (lane < a.top_k) {
      const int64_t i = t * a.top_k + lane;
      if (a.send_row[i] != kNoRow) {
        rank = a.topk_idx[i] / static_cast<int32_t>(a.num_local_experts);
      } else if (a.values != nullptr) {
        a.collected[i] = 0.0f;
      }
    }
    const uint32_t same = __match_any_sync(0xffffffffu, rank);
    const bool chosen = rank >= 0 && (same & ((1u << lane) - 1)) == 0;
    int32_t place = 0;
    for (int32_t i = 0; i < 32; ++i) {
      const int32_t other = __shfl_sync(0xffffffffu, chosen ? rank : INT32_MAX, i);
      place += other < rank;
    }
    if (chosen) ranks[warp][place] = rank;
    const int32_t count = __popc(__ballot_sync(0xffffffffu, chosen));
    __syncwarp();
    auto* out = static_cast<uint4*>(a.out) + t * num_vectors;
    for (int64_t v = lane; v < num_vectors; v += 32) {
      float acc[Vector::kCount] = {};
      for (int32_t first = 0; first < count; first += kRowsAtOnce) {
        uint4 loaded[kRowsAtOnce];
#pragma unroll
        for (int32_t i = 0; i < kRowsAtOnce; ++i) {
          if (first + i >= count) continue;
          const int64_t r = ranks[warp][first + i];
          loaded[i] = __ldcs(partial + (r * a.num_tokens + t) * num_vectors + v);
        }
#pragma unroll
        for (int32_t i = 0; i < kRowsAtOnce; ++i) {
          if (first + i >= count) continue;
          float x[Vector::kCount];
          Vector::load(loaded[i], x);
          for (int c = 0; c < Vector::kCount; ++c) acc[c] = __fadd_rn(acc[c], x[c]);
        }
      }
      out[v] = Vector::store(acc);
    }
    __syncwarp();
  }
  __syncthreads();
  __shared__ bool last;
  if (threadIdx.x == 0) last = is_last_block(g);
  __syncthreads();
  if (!last) return;
  advance_epochs(g);
  if (threadIdx.x == 0) g.control->local.num_blocks_done = 0;
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  combine_push_kernel<Vector><<<num_sms, kNumThreads, 0, stream>>>(group, a);
  combine_sum_kernel<Vector><<<num_sms, kNumThreads, 0, stream>>>(group, a);
  return cudaGetLastError();
}

template <typename Vector>
cudaError_t Prepare() {
  if (cudaError_t e = PrepareKernel(combine_push_kernel<Vector>, 0); e != cudaSuccess) return e;
  return PrepareKernel(combine_sum_kernel<Vector>, 0);
}

}  // namespace

cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& a, int num_sms,
                          cudaStream_t stream) {
  switch (a.type) {
    case RowType::kF32:
      return Launch<F32Vector>(group, a, num_sms, stream);
    case RowType::kF16:
      return Launch<F16Vector>(group, a, num_sms, stream);
    case RowType::kBF16:
      return Launch<Bf16Vector>(group, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PrepareCombine() {
  if (cudaError_t e = Prepare<F32Vector>(); e != cudaSuccess) return e;
  if (cudaError_t e = Prepare<F16Vector>(); e != cudaSuccess) return e;
  return Prepare<Bf16Vector>();
}

cudaError_t PrepareKernels() {
  if (cudaError_t e = PrepareLayout(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareDispatch(); e != cudaSuccess) return e;
  return PrepareCombine();
}

}  // namespace jax_ep::gpu
