// Rows as float8_e4m3fn with a scale per 128 channels: the numbers as jax_ep/reference_fp8.py
// defines them.
#ifndef JAX_EP_CUDA_ROWS_FP8_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_FP8_ROWS_CUH_

#include <cuda_fp8.h>

#include "cuda/launch.h"

namespace jax_ep::gpu {

// The scale of 128 channels whose largest magnitude is `amax`, and what they are multiplied with.
__device__ inline float2 scale_and_inverse(float amax, bool power_of_two) {
  constexpr float kLargest = 448.0f;
  float scale = __fdiv_rn(amax, kLargest);
  if (!power_of_two) return {scale, __fdiv_rn(kLargest, amax)};
  uint32_t bits = __float_as_uint(scale);
  if ((bits & 0x007fffff) != 0) bits = (bits & 0x7f800000) + 0x00800000;
  scale = __uint_as_float(bits);
  return {scale, __fdiv_rn(1.0f, scale)};
}

// The largest magnitude of the lanes' values, of so many neighbours each; NaN is none. On all lanes.
template <int kLanes, int kCount>
__device__ inline float largest_of_lanes(const float (&value)[kCount]) {
  float amax = 0x1p-100f;
#pragma unroll
  for (int c = 0; c < kCount; ++c) amax = fmaxf(amax, fabsf(value[c]));  // without NaN
#pragma unroll
  for (int m = 1; m < kLanes; m *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, m));
  }
  return amax;
}

// Two of them, quantised. The conversion clamps to the largest number and keeps NaN.
__device__ inline __nv_fp8x2_storage_t quantize_two(float a, float b, float inverse) {
  return __nv_cvt_float2_to_fp8x2({__fmul_rn(a, inverse), __fmul_rn(b, inverse)}, __NV_SATFINITE,
                                  __NV_E4M3);
}

// Quantises a row of x, by a warp: kAtOnce vectors of each lane at a time. Of a last block that is
// shorter the missing vectors are zeros, which change no amax.
template <typename Vector>
__device__ void quantize_row(const DispatchArguments& a, const char* x, char* values,
                             float* scales) {
  constexpr int kAtOnce = 8;
  constexpr int kLanes = kScaleBlock / Vector::kCount;  // that share a scale
  constexpr int kGroups = 32 / kLanes;                  // of lanes
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const auto num_vectors = static_cast<int32_t>(a.num_channels / Vector::kCount);
  const auto num_scales = static_cast<int32_t>(a.num_scales);
  const auto load = [&](int32_t begin, uint4(&vector)[kAtOnce]) {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = begin + 32 * j + lane;
      vector[j] =
          i < num_vectors ? __ldcs(reinterpret_cast<const uint4*>(x) + i) : uint4{0, 0, 0, 0};
    }
  };
  uint4 vector[kAtOnce];
  load(0, vector);
  for (int32_t begin = 0; begin < num_vectors; begin += 32 * kAtOnce) {
    uint4 next[kAtOnce];
    load(begin + 32 * kAtOnce, next);  // under way meanwhile
    // The scales: lane s of the first kAtOnce * kGroups computes the s-th.
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      float value[Vector::kCount];
      Vector::load(vector[j], value);
      const float amax = largest_of_lanes<kLanes>(value);
      const float of_group = __shfl_sync(0xffffffffu, amax, lane % kGroups * kLanes);
      if (lane / kGroups == j) largest = of_group;
    }
    const float2 scale = scale_and_inverse(largest, a.power_of_two_scales);
    const int32_t s = begin / 32 * kGroups + lane;
    if (lane < kAtOnce * kGroups && s < num_scales) {
      scales[s] = scale.x;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = begin + 32 * j + lane;
      const float inverse = __shfl_sync(0xffffffffu, scale.y, j * kGroups + lane / kLanes);
      float value[Vector::kCount];
      Vector::load(vector[j], value);
      struct alignas(Vector::kCount) {
        __nv_fp8x2_storage_t pair[Vector::kCount / 2];
      } quantized;
#pragma unroll
      for (int c = 0; c < Vector::kCount; c += 2) {
        quantized.pair[c / 2] = quantize_two(value[c], value[c + 1], inverse);
      }
      if (i < num_vectors) {
        *reinterpret_cast<decltype(quantized)*>(values + i * Vector::kCount) = quantized;
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) vector[j] = next[j];
  }
}

// The products of a row as it crosses with its scales: `size` vectors from vector `begin` on, by a
// warp.
template <typename Vector>
__device__ void dequantize_vectors(const DispatchArguments& a, const char* wire, int32_t begin,
                                   int32_t size, uint4* products) {
  const auto* scales = reinterpret_cast<const float*>(wire + a.num_channels);
#pragma unroll 4
  for (int32_t i = static_cast<int32_t>(threadIdx.x) % 32; i < size; i += 32) {
    const int32_t channel = (begin + i) * Vector::kCount;
    const float scale = scales[channel / kScaleBlock];
    float value[Vector::kCount];
#pragma unroll
    for (int c = 0; c < Vector::kCount; c += 4) {
      const auto f =
          static_cast<float4>(*reinterpret_cast<const __nv_fp8x4_e4m3*>(wire + channel + c));
      value[c] = __fmul_rn(f.x, scale);
      value[c + 1] = __fmul_rn(f.y, scale);
      value[c + 2] = __fmul_rn(f.z, scale);
      value[c + 3] = __fmul_rn(f.w, scale);
    }
    products[i] = Vector::store(value);
  }
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_FP8_ROWS_CUH_
