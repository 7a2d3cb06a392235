// What dispatch in fp8 must give, by plain loops on the host: quantise and dequantise as
// jax_ep/reference_fp8.py defines them, and rows that come with scales.
#ifndef JAX_EP_TESTS_NATIVE_FP8_ORACLE_H_
#define JAX_EP_TESTS_NATIVE_FP8_ORACLE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "tests/native/kernels_oracle.h"

namespace jax_ep::gpu::test {

inline constexpr float kFp8Max = 448.0f;
inline constexpr uint8_t kFp8Nan = 0x7f;  // with either sign

// float8_e4m3fn: 4 bits of exponent with bias 7, 3 of mantissa, no infinities.
inline float Fp8Value(uint8_t code) {
  const int exponent = code >> 3 & 0xf, mantissa = code & 7;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((code & 0x7f) == kFp8Nan) value = std::numeric_limits<float>::quiet_NaN();
  return (code & 0x80) != 0 ? -value : value;
}

// The nearest number, of two equally near ones the even one; what is larger than all becomes the
// largest.
inline uint8_t Fp8Code(float x) {
  static const std::vector<float> values = [] {
    std::vector<float> all;  // that are not negative: they ascend
    for (uint8_t code = 0; code < kFp8Nan; ++code) all.push_back(Fp8Value(code));
    return all;
  }();
  if (std::isnan(x)) return kFp8Nan;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::min(std::abs(x), kFp8Max);
  auto code = static_cast<uint8_t>(std::lower_bound(values.begin(), values.end(), magnitude) -
                                   values.begin());
  if (code > 0) {
    // Exact in double.
    const double above = double{values[code]} - magnitude,
                 below = magnitude - double{values[code - 1]};
    if (below < above || (below == above && code % 2 == 1)) --code;
  }
  return sign | code;
}

// A NaN is a NaN, whatever its sign.
inline void MakeNansEqual(std::vector<uint8_t>& numbers) {
  for (uint8_t& code : numbers) {
    if ((code & 0x7f) == kFp8Nan) code = kFp8Nan;
  }
}

struct Fp8Row {
  std::vector<uint8_t> numbers;      // [H]
  std::vector<float> scales;         // [ceil(H / 128)]
  std::vector<uint8_t> dequantized;  // [row]
};

inline Fp8Row Quantized(FloatType type, const uint8_t* row, int64_t num_channels,
                        bool power_of_two_scales) {
  Fp8Row result;
  const int type_bytes = TypeBytes(type);
  result.dequantized.resize(num_channels * type_bytes);
  for (int64_t begin = 0; begin < num_channels; begin += kScaleBlock) {
    const int64_t end = std::min(begin + kScaleBlock, num_channels);
    float amax = 0x1p-100f;
    for (int64_t h = begin; h < end; ++h) {
      const float magnitude = std::abs(ReadNumber(type, row + h * type_bytes));
      if (magnitude > amax) amax = magnitude;  // false for NaN
    }
    float scale = amax / kFp8Max, inverse = kFp8Max / amax;
    if (power_of_two_scales) {
      uint32_t bits;
      std::memcpy(&bits, &scale, 4);
      bits = ((bits >> 23) + ((bits & 0x7fffff) != 0 ? 1 : 0)) << 23;
      std::memcpy(&scale, &bits, 4);
      inverse = 1.0f / scale;
    }
    result.scales.push_back(scale);
    for (int64_t h = begin; h < end; ++h) {
      const uint8_t code = Fp8Code(ReadNumber(type, row + h * type_bytes) * inverse);
      result.numbers.push_back(code);
      WriteNumber(type, Fp8Value(code) * scale, result.dequantized.data() + h * type_bytes);
    }
  }
  return result;
}

// What all ranks send, and what all must get with one kind of scales.
struct Fp8Data {
  std::vector<std::vector<uint8_t>> x;                     // [R][T * row]
  std::vector<std::vector<uint8_t>> numbers, dequantized;  // [R][C * H], [R][C * row]
  std::vector<std::vector<float>> scales;                  // [R][C * ceil(H / 128)]
};

// Rows of g, in which some groups are made of what is special.
inline std::vector<std::vector<uint8_t>> MakeFp8Rows(const Data& d, uint64_t seed) {
  std::mt19937_64 rng(seed);
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int type_bytes = TypeBytes(d.type);
  std::vector<std::vector<uint8_t>> x = d.g;
  const int64_t num_scales = num_block_scales(d.num_channels);
  for (auto& rows : x) {
    for (int64_t i = 0; i < d.num_tokens * num_scales; ++i) {
      const int64_t begin = i % num_scales * kScaleBlock;
      const int64_t size = std::min<int64_t>(kScaleBlock, d.num_channels - begin);
      uint8_t* group = rows.data() + i / num_scales * d.row_bytes + begin * type_bytes;
      const auto set = [&](int64_t h, float value) {
        WriteNumber(d.type, value, group + h * type_bytes);
      };
      const auto kind = rng() % 16;
      const auto at = static_cast<int64_t>(rng() % size);
      if (kind == 0) set(at, nan);
      if (kind == 1) set(at, at % 2 == 0 ? infinity : -infinity);
      for (int64_t h = 0; h < size; ++h) {
        if (kind == 2) set(h, h % 2 == 0 ? 0.0f : -0.0f);
        if (kind == 3) set(h, nan);
        if (kind == 4) set(h, static_cast<float>(h - 64) * 0x1p-110f);  // below the smallest amax
        // Halfway between two numbers of fp8, as the group's amax is 448.
        if (kind == 5) set(h, h == 0 ? kFp8Max : static_cast<float>(2 * (h % 16) + 17));
      }
    }
  }
  return x;
}

inline Fp8Data MakeFp8Data(const Data& d, const std::vector<std::vector<uint8_t>>& x,
                           bool power_of_two_scales) {
  Fp8Data f;
  f.x = x;
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  const int64_t num_scales = num_block_scales(d.num_channels);
  std::vector<std::vector<Fp8Row>> rows(d.num_ranks);
  for (int r = 0; r < d.num_ranks; ++r) {
    for (int64_t token = 0; token < d.num_tokens; ++token) {
      rows[r].push_back(Quantized(d.type, x[r].data() + token * d.row_bytes, d.num_channels,
                                  power_of_two_scales));
    }
  }
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> numbers(d.capacity * d.num_channels, 0);
    std::vector<uint8_t> dequantized(d.capacity * d.row_bytes, 0);
    std::vector<float> scales(d.capacity * num_scales, 0.0f);
    for (int64_t row = 0; row < d.capacity; ++row) {
      const int64_t flat = d.recv_src[r][row];
      if (flat < 0) continue;
      const Fp8Row& from = rows[flat / ids_per_rank][flat % ids_per_rank / d.top_k];
      std::copy(from.numbers.begin(), from.numbers.end(), &numbers[row * d.num_channels]);
      std::copy(from.dequantized.begin(), from.dequantized.end(), &dequantized[row * d.row_bytes]);
      std::copy(from.scales.begin(), from.scales.end(), &scales[row * num_scales]);
    }
    f.numbers.push_back(numbers);
    f.dequantized.push_back(dequantized);
    f.scales.push_back(scales);
  }
  return f;
}

// Rows of any bytes with scales of any bits, which all ranks send, and what all must get.
struct ScaledData {
  int64_t num_scales;
  std::vector<std::vector<uint8_t>> x, tokens;       // [R][T * H], [R][C * H]
  std::vector<std::vector<float>> x_scales, scales;  // [R][T * num_scales], [R][C * num_scales]
};

inline ScaledData MakeScaledData(const Data& d, int64_t num_scales, uint64_t seed) {
  ScaledData s{};
  s.num_scales = num_scales;
  std::mt19937_64 rng(seed);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> x(d.num_tokens * d.num_channels);
    for (uint8_t& code : x) code = static_cast<uint8_t>(rng());
    std::vector<float> scales(d.num_tokens * num_scales);
    for (float& scale : scales) {
      const auto bits = static_cast<uint32_t>(rng());
      std::memcpy(&scale, &bits, 4);
    }
    s.x.push_back(x);
    s.x_scales.push_back(scales);
  }
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> tokens(d.capacity * d.num_channels, 0);
    std::vector<float> scales(d.capacity * num_scales, 0.0f);
    for (int64_t row = 0; row < d.capacity; ++row) {
      const int64_t flat = d.recv_src[r][row];
      if (flat < 0) continue;
      const int64_t src = flat / ids_per_rank, token = flat % ids_per_rank / d.top_k;
      std::memcpy(&tokens[row * d.num_channels], &s.x[src][token * d.num_channels], d.num_channels);
      std::memcpy(&scales[row * num_scales], &s.x_scales[src][token * num_scales], num_scales * 4);
    }
    s.tokens.push_back(tokens);
    s.scales.push_back(scales);
  }
  return s;
}

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_FP8_ORACLE_H_
