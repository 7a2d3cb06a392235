// combine: each rank sums its rows of every token and pushes the sum to the token's rank, which
// adds the ranks' sums. After:    out[t] = round(sum over ranks r ascending of round(sum over the
// kept rows of t on r, in k
//           order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
// Roles:    num_sms blocks of 16 warps, one block an SM, in two roles. Push warps form the sums of
//           the tokens of other ranks and store them there. Sum warps add, for this rank's tokens,
//           the ranks' sums; their own rank's they form on the way. A unit of work is a part of a
//           row. Both go through the tokens in kMaxChunks chunks, or fewer.
// Buffers:  y, weights, values | XLA, own       | before the call       | own warps
//           partial [R, T, H]  | XLA, each rank | peers' push warps, [S2]..[P1] | sum warps, after
//           [P2] collected          | XLA, each rank | likewise for rows of peers; sum warps, the
//           rest | later out                | XLA, own       | sum warps             | later
//           kernels
// Protocol: 1. [S1] show partial and collected, [S2] wait for all. 2. A push warp stores its units
//           of a chunk and counts itself in chunk_arrivals; the last one tells every peer by [P1]
//           that the chunk is there. 3. A sum warp waits for a chunk's [P2] from every peer, then
//           adds. When all chunks have been seen, no peer writes here any more. The last block
//           advances the epochs.
// Reuse:    partial is the call's own scratch; progress only grows, by epoch and chunk.
// Progress: push warps wait only in [S2]; sum warps wait for the peers' push warps; all are
// resident. Failure:  a timeout fills out and collected with NaN bits; see group_sync.cuh. Limits:
// rows are multiples of 16 bytes; K <= 32; compiled without -ftz, -fmad=false.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/kernels/kernels.cuh"
#include "cuda/layout/placement.h"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumWarps = 16;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kRowsAtOnce = 4;     // rows in flight per lane
constexpr int kVectorsAtOnce = 2;  // vectors of a row in flight per lane, 32 apart
constexpr int kStep = 32 * kVectorsAtOnce;
constexpr int kRanksAtOnce = 2;  // partial sums in flight per lane and vector

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

// How the work is cut.
struct Cut {
  int32_t num_push_warps;  // of each block
  int32_t num_chunks;
  int32_t part_vectors;  // of 16 bytes: a unit is this part of a row
};

// acc[j] = sum of weight * y over `count` rows (row and weight of the i-th in lane i), for the
// vectors v + 32 j of the row that lie below `end`.
template <typename Vector>
__device__ void sum_rows(const CombineArguments& a, int32_t row, float weight, int32_t count,
                         int64_t v, int64_t end, float (&acc)[kVectorsAtOnce][Vector::kCount]) {
  const auto* y = static_cast<const uint4*>(a.y);
  const int64_t num_vectors = a.num_channels / Vector::kCount;
#pragma unroll
  for (int j = 0; j < kVectorsAtOnce; ++j) {
    for (int c = 0; c < Vector::kCount; ++c) acc[j][c] = 0.0f;
  }
  for (int32_t first = 0; first < count; first += kRowsAtOnce) {
    uint4 loaded[kRowsAtOnce][kVectorsAtOnce];
#pragma unroll
    for (int32_t i = 0; i < kRowsAtOnce; ++i) {
      const int64_t r = __shfl_sync(0xffffffffu, row, first + i);
#pragma unroll
      for (int j = 0; j < kVectorsAtOnce; ++j) {
        if (first + i < count && v + 32 * j < end) {
          loaded[i][j] = __ldcs(y + r * num_vectors + v + 32 * j);
        }
      }
    }
#pragma unroll
    for (int32_t i = 0; i < kRowsAtOnce; ++i) {
      const float w = __shfl_sync(0xffffffffu, weight, first + i);
      if (first + i >= count) continue;
#pragma unroll
      for (int j = 0; j < kVectorsAtOnce; ++j) {
        float x[Vector::kCount];
        Vector::load(loaded[i][j], x);
        for (int c = 0; c < Vector::kCount; ++c) {
          acc[j][c] = __fadd_rn(acc[j][c], a.weights != nullptr ? __fmul_rn(w, x[c]) : x[c]);
        }
      }
    }
  }
}

template <typename Vector>
__device__ void push(const GroupView& g, const CombineArguments& a, const Cut& cut,
                     const uint64_t (*address)[kNumAddresses]) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t num_vectors = a.num_channels / Vector::kCount;
  const int64_t num_parts = (num_vectors + cut.part_vectors - 1) / cut.part_vectors;
  const int32_t num_others = g.num_ranks - 1;
  const auto num_warps = static_cast<uint32_t>(cut.num_push_warps) * gridDim.x;
  for (int32_t chunk = 0; chunk < cut.num_chunks; ++chunk) {
    const int64_t begin = a.num_tokens * chunk / cut.num_chunks;
    const int64_t end = a.num_tokens * (chunk + 1) / cut.num_chunks;
    const int64_t num_units = (end - begin) * num_others * num_parts;
    for (int64_t unit = int64_t{warp} * gridDim.x + blockIdx.x; unit < num_units;
         unit += num_warps) {
      const int64_t pair = unit / num_parts;
      const int64_t part = unit - pair * num_parts;
      const int64_t t = begin + pair / num_others;
      const auto src = static_cast<int32_t>((g.rank + 1 + pair % num_others) % g.num_ranks);
      const int64_t flat_token = src * a.num_tokens + t;
      const int32_t first_slot = a.recv_offsets[flat_token];
      const int32_t count = a.recv_offsets[flat_token + 1] - first_slot;
      if (count == 0) continue;
      int32_t row = 0;
      float weight = 1.0f;
      if (lane < count) {
        row = a.recv_order[first_slot + lane];
        if (a.weights != nullptr) weight = a.weights[row];
        if (a.values != nullptr && part == 0) {
          const int64_t k = a.recv_src[row] - flat_token * a.top_k;
          reinterpret_cast<float*>(address[src][1])[t * a.top_k + k] = a.values[row];
        }
      }
      auto* to = reinterpret_cast<uint4*>(address[src][0]) +
                 (int64_t{g.rank} * a.num_tokens + t) * num_vectors;
      const int64_t part_end = min(num_vectors, (part + 1) * cut.part_vectors);
      for (int64_t v = part * cut.part_vectors + lane; v - lane < part_end; v += kStep) {
        float acc[kVectorsAtOnce][Vector::kCount];
        sum_rows<Vector>(a, row, weight, count, v, part_end, acc);
#pragma unroll
        for (int j = 0; j < kVectorsAtOnce; ++j) {
          if (v + 32 * j < part_end) to[v + 32 * j] = Vector::store(acc[j]);
        }
      }
    }
    __syncwarp();
    uint32_t before = 0;
    if (lane == 0) {
      before = atom_add_acq_rel_gpu(&g.control->local.chunk_arrivals[chunk], 1);
    }
    if (__shfl_sync(0xffffffffu, before, 0) != num_warps - 1) continue;
    __threadfence_system();
    for (int32_t r = lane; r < g.num_ranks; r += 32) {
      if (r == g.rank) continue;
      const PeerView& peer = g.peer[r];
      const uint64_t epoch = g.control->local.epoch[peer.slot_here] + 1;
      st_release_sys(&peer.control->progress[peer.slot_there].progress,
                     epoch * kProgressBase + chunk + 1);  // [P1]
    }
  }
}

template <typename Vector>
__device__ bool sum(const GroupView& g, const CombineArguments& a, const Cut& cut, int32_t* ranks) {
  const int32_t warp = threadIdx.x / 32 - cut.num_push_warps, lane = threadIdx.x % 32;
  const int64_t num_vectors = a.num_channels / Vector::kCount;
  const int64_t num_parts = (num_vectors + cut.part_vectors - 1) / cut.part_vectors;
  const int64_t num_warps = (kNumWarps - cut.num_push_warps) * int64_t{gridDim.x};
  const auto* partial = static_cast<const uint4*>(a.partial);
  for (int32_t chunk = 0; chunk < cut.num_chunks; ++chunk) {
    bool ok = true;
    for (int32_t r = lane; r < g.num_ranks; r += 32) {
      if (r == g.rank) continue;
      const PeerView& peer = g.peer[r];
      const uint64_t epoch = g.control->local.epoch[peer.slot_here] + 1;
      ok = wait_flag(g, OpKind::kCombine, &g.control->progress[peer.slot_here].progress,
                     epoch * kProgressBase + chunk + 1, r, 1) &&
           ok;  // [P2]
    }
    if (__all_sync(0xffffffffu, ok) == 0) return false;
    const int64_t begin = a.num_tokens * chunk / cut.num_chunks;
    const int64_t end = a.num_tokens * (chunk + 1) / cut.num_chunks;
    const int64_t num_units = (end - begin) * num_parts;
    for (int64_t unit = int64_t{warp} * gridDim.x + blockIdx.x; unit < num_units;
         unit += num_warps) {
      const int64_t t = begin + unit / num_parts;
      const int64_t part = unit % num_parts;
      // Lane k looks at choice k: the rank of its row, and the row if that is here.
      int32_t rank = INT32_MAX, row = 0;
      float weight = 1.0f;
      if (lane < a.top_k) {
        const int64_t i = t * a.top_k + lane;
        row = a.send_row[i];
        if (row != kNoRow) {
          rank = a.topk_idx[i] / static_cast<int32_t>(a.num_local_experts);
          if (rank == g.rank) {
            if (a.weights != nullptr) weight = a.weights[row];
            if (a.values != nullptr && part == 0) a.collected[i] = a.values[row];
          }
        } else if (a.values != nullptr && part == 0) {
          a.collected[i] = 0.0f;
        }
      }
      // This rank's rows move to the first lanes, in k order.
      const uint32_t own = __ballot_sync(0xffffffffu, rank == g.rank);
      const int32_t num_own = __popc(own);
      const int32_t from = lane < num_own ? static_cast<int32_t>(__fns(own, 0, lane + 1)) : 0;
      const int32_t own_row = __shfl_sync(0xffffffffu, row, from);
      const float own_weight = __shfl_sync(0xffffffffu, weight, from);
      // The ranks with rows, ascending and each once, in the first lanes.
      const uint32_t same = __match_any_sync(0xffffffffu, rank);
      const bool chosen = rank != INT32_MAX && (same & ((1u << lane) - 1)) == 0;
      int32_t place = 0;
      for (int32_t k = 0; k < a.top_k; ++k) {
        place += __shfl_sync(0xffffffffu, chosen ? rank : INT32_MAX, k) < rank;
      }
      if (chosen) ranks[place] = rank;
      const int32_t num_chosen = __popc(__ballot_sync(0xffffffffu, chosen));
      __syncwarp();
      const int64_t part_end = min(num_vectors, (part + 1) * cut.part_vectors);
      auto* out = static_cast<uint4*>(a.out) + t * num_vectors;
      for (int64_t v = part * cut.part_vectors + lane; v - lane < part_end; v += kStep) {
        float acc[kVectorsAtOnce][Vector::kCount] = {};
        for (int32_t first = 0; first < num_chosen; first += kRanksAtOnce) {
          uint4 loaded[kRanksAtOnce][kVectorsAtOnce];
          bool has_own = false;
#pragma unroll
          for (int32_t i = 0; i < kRanksAtOnce; ++i) {
            if (first + i >= num_chosen) continue;
            const int32_t r = ranks[first + i];
            has_own = has_own || r == g.rank;
            if (r == g.rank) continue;
#pragma unroll
            for (int j = 0; j < kVectorsAtOnce; ++j) {
              if (v + 32 * j < part_end) {
                loaded[i][j] = __ldcs(partial + (r * a.num_tokens + t) * num_vectors + v + 32 * j);
              }
            }
          }
          float own_sum[kVectorsAtOnce][Vector::kCount];
          if (has_own) {
            sum_rows<Vector>(a, own_row, own_weight, num_own, v, part_end, own_sum);
          }
#pragma unroll
          for (int32_t i = 0; i < kRanksAtOnce; ++i) {
            if (first + i >= num_chosen) continue;
            const bool is_own = ranks[first + i] == g.rank;
#pragma unroll
            for (int j = 0; j < kVectorsAtOnce; ++j) {
              float x[Vector::kCount];
              // Rounded as if it had crossed a link.
              Vector::load(is_own ? Vector::store(own_sum[j]) : loaded[i][j], x);
              for (int c = 0; c < Vector::kCount; ++c) acc[j][c] = __fadd_rn(acc[j][c], x[c]);
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kVectorsAtOnce; ++j) {
          if (v + 32 * j < part_end) out[v + 32 * j] = Vector::store(acc[j]);
        }
      }
      __syncwarp();  // ranks is rewritten for the next unit
    }
  }
  return true;
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads,
                             1) void combine_kernel(const __grid_constant__ GroupView g,
                                                    const __grid_constant__ CombineArguments a,
                                                    const __grid_constant__ Cut cut) {
  __shared__ uint64_t address[kMaxPeers][kNumAddresses];
  __shared__ int32_t ranks[kNumWarps][kMaxTopK];  // of a sum warp's token
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected), 0};
  if (blockIdx.x == 0) send_start(g, own);                     // [S1]
  bool ok = receive_start(g, OpKind::kCombine, own, address);  // [S2]
  if (ok) {
    if (static_cast<int32_t>(threadIdx.x) / 32 < cut.num_push_warps) {
      push<Vector>(g, a, cut, address);
    } else {
      ok = sum<Vector>(g, a, cut, ranks[threadIdx.x / 32]);
    }
  }
  if (__syncthreads_and(ok) == 0) {
    fill_nan(a.out, a.num_tokens * a.num_channels * (16 / Vector::kCount));
    if (a.values != nullptr) fill_nan(a.collected, a.num_tokens * a.top_k * 4);
    return;
  }
  __shared__ bool last;
  if (threadIdx.x == 0) last = is_last_block(g);
  __syncthreads();
  if (!last) return;
  advance_epochs(g);
  if (threadIdx.x < kMaxChunks) g.control->local.chunk_arrivals[threadIdx.x] = 0;
  if (threadIdx.x == 0) g.control->local.num_blocks_done = 0;
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  const int64_t num_vectors = a.num_channels / Vector::kCount;
  Cut cut;
  // Push warps read (R - 1) / R of the rows; a quarter is left for the sums at least.
  cut.num_push_warps =
      group.num_ranks == 1 ? 0 : kNumWarps * (group.num_ranks - 1) / group.num_ranks;
  if (cut.num_push_warps > kNumWarps * 3 / 4) cut.num_push_warps = kNumWarps * 3 / 4;
  // Long parts spare metadata; short ones spread few tokens over all warps.
  const int64_t warps = int64_t{kNumWarps} * num_sms;
  cut.part_vectors = a.num_tokens * ((num_vectors + 255) / 256) < warps ? kStep : 256;
  // A chunk gives every push warp at least a unit.
  const int64_t units = a.num_tokens * (group.num_ranks - 1) *
                        ((num_vectors + cut.part_vectors - 1) / cut.part_vectors);
  const int64_t push_warps = int64_t{cut.num_push_warps} * num_sms;
  const int64_t chunks = push_warps == 0 ? 1 : units / push_warps;
  cut.num_chunks = static_cast<int32_t>(chunks < 1 ? 1 : chunks > kMaxChunks ? kMaxChunks : chunks);
  combine_kernel<Vector><<<num_sms, kNumThreads, 0, stream>>>(group, a, cut);
  return cudaGetLastError();
}

template <typename Vector>
cudaError_t Prepare() {
  return PrepareKernel(combine_kernel<Vector>, 0);
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
