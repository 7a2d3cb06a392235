// Sums of rows by a warp. cuda/network/rail/combine.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_SUMS_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_SUMS_CUH_

#include "cuda/rows/row_types.cuh"

namespace jax_ep::gpu::rail {

struct Addend {
  const void* row;
  float weight;
};

// By a warp, for kAtOnce vectors a lane, which are on their way at once: adds rows up in f32, from +0,
// each product and each sum rounded on its own. addend(i) is the i-th of `count` rows, on all lanes.
template <typename Vector, int kAtOnce>
struct Sums {
  float sum[kAtOnce][Vector::kCount];

  __device__ void clear(int j) {
#pragma unroll
    for (float& number : sum[j]) number = 0.0f;
  }
  template <typename AddendOf>
  __device__ void add_up(int32_t begin, int32_t stride, int32_t end, int32_t count,
                         const AddendOf& addend) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) clear(j);
    for (int32_t i = 0; i < count; ++i) {
      const Addend next = addend(i);
      const auto* row = static_cast<const uint4*>(next.row);
      uint4 vector[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j * stride < end) vector[j] = row[begin + j * stride];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (begin + j * stride < end) add(j, vector[j], next.weight);
      }
    }
  }
  __device__ void add(int j, uint4 vector) {
    float number[Vector::kCount];
    Vector::load(vector, number);
#pragma unroll
    for (int c = 0; c < Vector::kCount; ++c) sum[j][c] = __fadd_rn(sum[j][c], number[c]);
  }
  __device__ void add(int j, uint4 vector, float weight) {
    float number[Vector::kCount];
    Vector::load(vector, number);
#pragma unroll
    for (int c = 0; c < Vector::kCount; ++c) {
      sum[j][c] = __fadd_rn(sum[j][c], __fmul_rn(weight, number[c]));
    }
  }
  __device__ uint4 rounded(int j) const { return Vector::store(sum[j]); }
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_SUMS_CUH_
