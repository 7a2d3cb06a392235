// Sixteen bytes of a row as f32 numbers, and back: one rounding to nearest even, subnormals kept.
#ifndef JAX_EP_CUDA_ROWS_ROW_TYPES_CUH_
#define JAX_EP_CUDA_ROWS_ROW_TYPES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.h"

namespace jax_ep::gpu {

struct F32Vector {
  static constexpr int kCount = 4;
  __device__ static void load(uint4 v, float (&x)[kCount]) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
  }
  __device__ static uint4 store(const float (&x)[kCount]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
            __float_as_uint(x[3])};
  }
  __device__ static uint4 add_two(uint4 v, uint4 w) {
    float x[kCount], y[kCount];
    load(v, x);
    load(w, y);
#pragma unroll
    for (int c = 0; c < kCount; ++c) x[c] = __fadd_rn(__fadd_rn(0.0f, x[c]), y[c]);
    return store(x);
  }
};

// Word by word: taken apart into 16-bit numbers, a vector would be loaded as such.
template <typename Pair>
struct HalfVector {
  static constexpr int kCount = 8;
  __device__ static void load(uint4 v, float (&x)[kCount]) {
    Pair::up(v.x, x[0], x[1]);
    Pair::up(v.y, x[2], x[3]);
    Pair::up(v.z, x[4], x[5]);
    Pair::up(v.w, x[6], x[7]);
  }
  __device__ static uint4 store(const float (&x)[kCount]) {
    return {Pair::down(x[0], x[1]), Pair::down(x[2], x[3]), Pair::down(x[4], x[5]),
            Pair::down(x[6], x[7])};
  }
  // store of 0 + x + y added in f32, the same bits: f32 has at least twice the digits of a 16-bit
  // number and two more, so that rounding their sum to f32 first changes nothing. The last addition
  // is for -0 + -0, which the first one of 0 makes +0.
  __device__ static uint4 add_two(uint4 v, uint4 w) {
    const auto add = [](uint32_t a, uint32_t b) { return Pair::add(Pair::add(a, b), 0); };
    return {add(v.x, w.x), add(v.y, w.y), add(v.z, w.z), add(v.w, w.w)};
  }
};
struct Bf16Pair {
  __device__ static void up(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t down(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return static_cast<uint32_t>(__bfloat16_as_ushort(pair.x)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
  }
  __device__ static uint32_t add(uint32_t v, uint32_t w) {
    uint32_t sum;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sum) : "r"(v), "r"(w));
    return sum;
  }
};
struct F16Pair {
  __device__ static void up(uint32_t word, float& low, float& high) {
    low = __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffff)));
    high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  __device__ static uint32_t down(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return static_cast<uint32_t>(__half_as_ushort(pair.x)) |
           static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
  }
  __device__ static uint32_t add(uint32_t v, uint32_t w) {
    uint32_t sum;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(v), "r"(w));
    return sum;
  }
};
using Bf16Vector = HalfVector<Bf16Pair>;
using F16Vector = HalfVector<F16Pair>;

// Calls body(vector of the type).
template <typename Body>
__device__ void with_vector(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::kF32:
      return body(F32Vector());
    case FloatType::kF16:
      return body(F16Vector());
    case FloatType::kBF16:
      return body(Bf16Vector());
  }
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_ROW_TYPES_CUH_
