// The codec of combine's gradient: a token's cotangent crosses; tokens hold its products with the
// weights of its rows, and dots the dot products with the rows of y. Several warps share the channels.
#ifndef JAX_EP_CUDA_ROWS_WEIGHTED_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_WEIGHTED_ROWS_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/copy_rows.cuh"
#include "cuda/rows/row_format.h"
#include "cuda/rows/row_types.cuh"

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

class WeightedRows : public RowsOfX {
 public:
  static constexpr RowFormat kFormat = kWeightedFormat;
  struct Extra {
    int32_t row;  // its number
  };

  __device__ WeightedRows(const DispatchArguments& a, char* /*ring_memory*/) : RowsOfX(a) {}

  __device__ Extra extra_of(uint64_t /*scales*/, int32_t row) const { return {row}; }

  // As tokens are, helpers store it.
  __device__ void store(const char* stage, uint32_t bytes, uint64_t to, bool verbatim,
                        const Extra&) const {
    if (to != 0 && verbatim) bulk_store(reinterpret_cast<void*>(to), stage, bytes);
    bulk_commit_group();
  }

  // The lane's row of y.
  __device__ void fetch_ahead(const Extra& extra, uint32_t bytes) const {
    bulk_prefetch_l2(static_cast<const char*>(a_.y) + int64_t{extra.row} * a_.row_bytes, bytes);
  }
  __device__ void help(const char* stage, char* beside, uint64_t to, const Extra& extra,
                       int32_t part) const {
    with_vector(a_.type, [&](auto vector) {
      reinterpret_cast<float*>(beside)[part * 32 + lane_of_warp()] =
          multiply_part<decltype(vector), kNumWeightedHelpers>(a_, stage, to, extra.row, part);
    });
  }
  __device__ void finish(const char* beside, uint64_t to, const Extra& extra) const {
    if (to == 0) return;
    float dot = 0.0f;
    for (int p = 0; p < kNumWeightedHelpers; ++p) {
      dot += reinterpret_cast<const float*>(beside)[p * 32 + lane_of_warp()];
    }
    a_.dots[extra.row] = dot;
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_WEIGHTED_ROWS_CUH_
