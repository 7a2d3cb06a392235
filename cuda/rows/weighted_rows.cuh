// Rows of combine's gradient: a token's cotangent times the weights of its rows, and the dot products
// with the rows of y, a part of the channels by each of several warps.
#ifndef JAX_EP_CUDA_ROWS_WEIGHTED_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_WEIGHTED_ROWS_CUH_

#include "cuda/launch.h"

namespace jax_ep::gpu {

// By warp `part` of kNumParts: stores the products of x, a row in shared memory, with the weight of
// each lane's row to where the lane says (0: nowhere), and returns the lane's dot product of x and
// y's row; of the part's channels, which are every kNumParts-th run of 32 vectors.
template <typename Vector, int kNumParts>
__device__ float multiply_part(const DispatchArguments& a, const char* x, uint64_t to, int32_t row,
                               int32_t part) {
  constexpr int kAtOnce = 4;  // vectors of a lane
  constexpr int kStride = 32 * kNumParts;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const uint32_t rows = __ballot_sync(0xffffffffu, to != 0);
  if (rows == 0) return 0.0f;
  const float weight = to != 0 ? a.row_weights[row] : 0.0f;
  const auto num_vectors = static_cast<int32_t>(a.row_bytes / 16);
  // Row by row, so many vectors at once; what comes after them of y is loaded meanwhile. Products
  // are not for the copy engine: its fences would wait for those loads.
  const int32_t first = 32 * part + lane;
  struct Place {
    uint32_t left;  // rows from this one on
    int32_t begin;
  };
  const auto advance = [&](Place& place) {
    place.begin += kStride * kAtOnce;
    if (place.begin - lane < num_vectors) return;
    place.begin = first;
    place.left &= place.left - 1;
  };
  const auto y_at = [&](const Place& place) {
    const int32_t from = __ffs(static_cast<int>(place.left)) - 1;
    const int64_t at = __shfl_sync(0xffffffffu, row, max(0, from));
    return reinterpret_cast<const uint4*>(static_cast<const char*>(a.y) + at * a.row_bytes);
  };
  const auto load = [&](const uint4* y, const Place& place, int j) {
    const int32_t i = place.begin + kStride * j;
    return place.left != 0 && i < num_vectors ? __ldcs(y + i) : uint4{};
  };
  Place next{rows, first};
  uint4 loaded[kAtOnce];
  const uint4* y_next = y_at(next);
#pragma unroll
  for (int j = 0; j < kAtOnce; ++j) loaded[j] = load(y_next, next, j);
  float dot = 0.0f, dot_of_lane = 0.0f;
  for (Place place{rows, first}; place.left != 0; advance(place)) {
    advance(next);
    y_next = y_at(next);
    const int32_t from = __ffs(static_cast<int>(place.left)) - 1;
    const float w = __shfl_sync(0xffffffffu, weight, from);
    auto* products = reinterpret_cast<uint4*>(__shfl_sync(0xffffffffu, to, from));
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      float value[Vector::kCount], y[Vector::kCount];
      Vector::load(loaded[j], y);
      loaded[j] = load(y_next, next, j);
      const int32_t i = place.begin + kStride * j;
      if (i >= num_vectors) continue;
      Vector::load(reinterpret_cast<const uint4*>(x)[i], value);
#pragma unroll
      for (int c = 0; c < Vector::kCount; ++c) {
        dot = __fmaf_rn(y[c], value[c], dot);
        value[c] = __fmul_rn(w, value[c]);
      }
      __stcs(products + i, Vector::store(value));
    }
    if (place.begin - lane + kStride * kAtOnce < num_vectors) continue;
    // The row's end.
#pragma unroll
    for (int m = 16; m > 0; m /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, m);
    if (lane == from) dot_of_lane = dot;
    dot = 0.0f;
  }
  return dot_of_lane;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_WEIGHTED_ROWS_CUH_
