// The forms that rows have in slots: what a thread's vectors of x are as words that cross, and as
// tokens. A form is a class with
//   kAtoms, has_atom(place, j)  which atoms a thread has (teams.cuh)
//   packed_bytes(size)          of a unit of so many vectors, as it crosses the network; multiples of 16
//   pack(to, size, thread, place, stride, word), unpack(from, ..)  a team's thread's part of that
//   load(place, word)           of x, as words that cross
//   decode(place, word)         what has crossed, as words of tokens
//   store(row, place, word)     those, to a row of tokens
//   zero(row)                   a row of tokens, by a warp
// Whole warps call them. Rows are what cuda/rows makes of them, to the bit.
#ifndef JAX_EP_CUDA_SLOTS_ROW_FORMS_CUH_
#define JAX_EP_CUDA_SLOTS_ROW_FORMS_CUH_

#include "cuda/launch.h"
#include "cuda/rows/fp8_rows.cuh"
#include "cuda/rows/row_types.cuh"
#include "cuda/slots/teams.cuh"

namespace jax_ep::gpu::slots {

// By a warp: a row of tokens and one of scales.
__device__ inline void zero_row(char* tokens, int64_t num_bytes, float* scales,
                                int64_t num_scales) {
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < num_bytes / 16; i += 32) {
    reinterpret_cast<uint4*>(tokens)[i] = uint4{0, 0, 0, 0};
  }
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < num_scales; i += 32) scales[i] = 0.0f;
}

// To a row of tokens of x's type.
__device__ inline void store_vectors(const LayoutAndDispatchArguments& a, int64_t row,
                                     const Place& place, int32_t stride, const Words& word) {
  auto* to =
      reinterpret_cast<uint4*>(static_cast<char*>(a.tokens) + row * a.row_bytes) + place.first;
#pragma unroll
  for (int j = 0; j < kVectorsEach; ++j) {
    if (j < place.count) to[j * stride] = vector_of(word, j);
  }
}

// Rows that cross, and stay, as they are.
class CopiedRows : public PlainAtoms {
 public:
  __device__ CopiedRows(const LayoutAndDispatchArguments& a, int32_t stride)
      : a_(a), stride_(stride) {}

  __device__ void load(const Place& place, Words& word) const {
    const auto* x = reinterpret_cast<const uint4*>(static_cast<const char*>(a_.x) +
                                                   place.token * a_.row_bytes) +
                    place.first;
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j < place.count) set_vector(word, j, x[j * stride_]);
    }
  }
  __device__ void decode(const Place&, Words&) const {}
  __device__ void store(int64_t row, const Place& place, const Words& word) const {
    store_vectors(a_, row, place, stride_, word);
  }
  __device__ void zero(int64_t row) const {
    zero_row(static_cast<char*>(a_.tokens) + row * a_.row_bytes, a_.row_bytes, nullptr, 0);
  }

 private:
  const LayoutAndDispatchArguments& a_;
  const int32_t stride_;
};

// Likewise with the scales that x comes with: they follow a row's vectors, as vectors.
class ScaledRows : public PlainAtoms {
 public:
  __device__ ScaledRows(const LayoutAndDispatchArguments& a, int32_t stride)
      : a_(a), stride_(stride), num_vectors_(static_cast<int32_t>(a.row_bytes / 16)) {}

  __device__ void load(const Place& place, Words& word) const {
    const char* x = static_cast<const char*>(a_.x) + place.token * a_.row_bytes;
    const auto* scales = reinterpret_cast<const char*>(a_.x_scales + place.token * a_.num_scales);
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j >= place.count) continue;
      set_vector(word, j, *reinterpret_cast<const uint4*>(at(x, scales, place, j)));
    }
  }
  __device__ void decode(const Place&, Words&) const {}
  __device__ void store(int64_t row, const Place& place, const Words& word) const {
    char* tokens = static_cast<char*>(a_.tokens) + row * a_.row_bytes;
    char* scales = reinterpret_cast<char*>(a_.scales + row * a_.num_scales);
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j >= place.count) continue;
      *reinterpret_cast<uint4*>(at(tokens, scales, place, j)) = vector_of(word, j);
    }
  }
  __device__ void zero(int64_t row) const {
    zero_row(static_cast<char*>(a_.tokens) + row * a_.row_bytes, a_.row_bytes,
             a_.scales + row * a_.num_scales, a_.num_scales);
  }

 private:
  // The thread's j-th vector.
  template <typename Char>
  __device__ Char* at(Char* row, Char* scales, const Place& place, int j) const {
    const int32_t vector = place.first + j * stride_;
    return vector < num_vectors_ ? row + vector * 16 : scales + (vector - num_vectors_) * 16;
  }

  const LayoutAndDispatchArguments& a_;
  const int32_t stride_, num_vectors_;  // of a row without scales
};

// Rows that cross as float8_e4m3fn. A vector of x becomes kWords words; the first of the threads that
// share a scale has one atom more, for the scales of their vectors.
template <typename Vector>
class Float8Rows {
 protected:
  static constexpr int kWords = Vector::kCount / 4;
  static constexpr int kDataAtoms = kWords;
  static constexpr int kScales = 3 * kDataAtoms;               // the first of their words
  static constexpr int kLanes = kScaleBlock / Vector::kCount;  // that share a scale

 public:
  static constexpr int kAtoms = kDataAtoms + 1;
  __device__ static bool has_atom(const Place& place, int j) {
    if (j < kDataAtoms) return place.count > j;
    return place.count > 0 && leads();
  }

  // Packed: the numbers, then the scales.
  __device__ static int32_t packed_bytes(int32_t size) {
    return round_up(scales_at(size) + (size + kLanes - 1) / kLanes * 4, 16);
  }
  __device__ static void pack(char* to, int32_t size, int32_t thread, const Place& place,
                              int32_t stride, const Words& word) {
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j >= place.count) continue;
      const int32_t vector = thread + j * stride;
      reinterpret_cast<Quantized*>(to)[vector] = quantized_of(word, j);
      if (leads()) {
        reinterpret_cast<uint32_t*>(to + scales_at(size))[vector / kLanes] = word[kScales + j];
      }
    }
  }
  __device__ static void unpack(const char* from, int32_t size, int32_t thread, const Place& place,
                                int32_t stride, Words& word) {
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j >= place.count) continue;
      const int32_t vector = thread + j * stride;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        word[j * kWords + w] =
            __ldcg(reinterpret_cast<const uint32_t*>(from) + vector * kWords + w);
      }
      if (leads()) {
        word[kScales + j] =
            __ldcg(reinterpret_cast<const uint32_t*>(from + scales_at(size)) + vector / kLanes);
      }
    }
  }

  __device__ Float8Rows(const LayoutAndDispatchArguments& a, int32_t stride)
      : a_(a), stride_(stride) {}

  __device__ void load(const Place& place, Words& word) const {
    const auto* x = reinterpret_cast<const uint4*>(static_cast<const char*>(a_.x) +
                                                   place.token * a_.row_bytes) +
                    place.first;
    uint4 vector[kVectorsEach];
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      vector[j] = j < place.count ? x[j * stride_] : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      float value[Vector::kCount];
      Vector::load(vector[j], value);
      const float2 scale =
          scale_and_inverse(largest_of_lanes<kLanes>(value), a_.power_of_two_scales);
      word[kScales + j] = __float_as_uint(scale.x);
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const float* four = value + 4 * w;
        const uint32_t low = quantize_two(four[0], four[1], scale.y);
        word[j * kWords + w] = low | uint32_t{quantize_two(four[2], four[3], scale.y)} << 16;
      }
    }
  }

 protected:
  struct alignas(4 * kWords) Quantized {
    uint32_t word[kWords];
  };
  // The thread's j-th vector.
  __device__ static Quantized quantized_of(const Words& word, int j) {
    Quantized quantized;
#pragma unroll
    for (int w = 0; w < kWords; ++w) quantized.word[w] = word[j * kWords + w];
    return quantized;
  }
  __device__ static bool leads() { return threadIdx.x % kLanes == 0; }

  const LayoutAndDispatchArguments& a_;
  const int32_t stride_;

 private:
  __device__ static int32_t scales_at(int32_t size) { return round_up(size * kWords * 4, 16); }
};

// Tokens and scales hold them as they cross.
template <typename Vector>
class QuantizedRows : public Float8Rows<Vector> {
  using Base = Float8Rows<Vector>;
  using Base::a_, Base::stride_, Base::kScales;

 public:
  using Base::Base;

  __device__ void decode(const Place&, Words&) const {}
  __device__ void store(int64_t row, const Place& place, const Words& word) const {
    using Quantized = typename Base::Quantized;
    auto* to = reinterpret_cast<Quantized*>(static_cast<char*>(a_.tokens) + row * a_.num_channels);
    float* scales = a_.scales + row * a_.num_scales;
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (j >= place.count) continue;
      const int32_t vector = place.first + j * stride_;
      to[vector] = Base::quantized_of(word, j);
      if (Base::leads()) scales[vector / Base::kLanes] = __uint_as_float(word[kScales + j]);
    }
  }
  __device__ void zero(int64_t row) const {
    zero_row(static_cast<char*>(a_.tokens) + row * a_.num_channels, a_.num_channels,
             a_.scales + row * a_.num_scales, a_.num_scales);
  }
};

// Tokens hold their products with the scales.
template <typename Vector>
class DequantizedRows : public Float8Rows<Vector> {
  using Base = Float8Rows<Vector>;
  using Base::a_, Base::stride_, Base::kWords, Base::kScales;

 public:
  using Base::Base;

  __device__ void decode(const Place&, Words& word) const {
    uint4 product[kVectorsEach];
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      const int leader = static_cast<int>(threadIdx.x) % 32 / Base::kLanes * Base::kLanes;
      const float scale = __uint_as_float(__shfl_sync(0xffffffffu, word[kScales + j], leader));
      float value[Vector::kCount];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        __nv_fp8x4_e4m3 four;
        four.__x = word[j * kWords + w];
        const auto f = static_cast<float4>(four);
        value[4 * w] = __fmul_rn(f.x, scale);
        value[4 * w + 1] = __fmul_rn(f.y, scale);
        value[4 * w + 2] = __fmul_rn(f.z, scale);
        value[4 * w + 3] = __fmul_rn(f.w, scale);
      }
      product[j] = Vector::store(value);
    }
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) set_vector(word, j, product[j]);
  }
  __device__ void store(int64_t row, const Place& place, const Words& word) const {
    store_vectors(a_, row, place, stride_, word);
  }
  __device__ void zero(int64_t row) const {
    zero_row(static_cast<char*>(a_.tokens) + row * a_.row_bytes, a_.row_bytes, nullptr, 0);
  }
};

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_ROW_FORMS_CUH_
