#include "xla_ffi/cpu/ops/row_math.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#error "jax_ep: the CPU backend knows the floating-point control of x86-64 and AArch64 only"
#endif

namespace jax_ep::cpu {
namespace {

inline uint32_t bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float from_bits(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

constexpr uint32_t kSign = 0x80000000;
constexpr uint32_t kInfinity = 0x7f800000;

struct F32 {
  using Storage = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

struct BF16 {
  using Storage = uint16_t;
  static float load(uint16_t h) { return from_bits(uint32_t{h} << 16); }
  static uint16_t store(float x) {
    const uint32_t u = bits(x);
    const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40;
    return static_cast<uint16_t>((u & ~kSign) > kInfinity ? quiet_nan : rounded);
  }
};

struct F16 {
  using Storage = uint16_t;
  static float load(uint16_t h) {
    // Exponent and mantissa placed as f32, then rescaled by 2^(127 - 15): exact, subnormals too.
    const uint32_t magnitude = (h & 0x7fffu) << 13;
    uint32_t u = bits(from_bits(magnitude) * from_bits((127 + 112) << 23));
    u = (h & 0x7c00u) == 0x7c00u ? magnitude | kInfinity : u;
    return from_bits(u | (uint32_t{h} & 0x8000u) << 16);
  }
  static uint16_t store(float x) {
    const uint32_t u = bits(x);
    const uint32_t sign = (u >> 16) & 0x8000u;
    const uint32_t a = u & ~kSign;
    uint32_t h;
    if (a > kInfinity) {
      h = 0x7e00;
    } else if (a >= 0x477ff000) {  // 65520, half way to the first value that f16 lacks
      h = 0x7c00;
    } else if (a < 0x38800000) {  // below 2^-14: the ulp of 0.5 is f16's subnormal step 2^-24
      h = bits(from_bits(a) + 0.5f) - bits(0.5f);
    } else {
      h = (a - ((127 - 15) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
    }
    return static_cast<uint16_t>(sign | h);
  }
};

struct E4M3 {
  static float load(uint8_t q) {
    const uint32_t magnitude = (q & 0x7fu) << 20;
    uint32_t u = bits(from_bits(magnitude) * from_bits((127 + 120) << 23));
    u = (q & 0x7fu) == 0x7fu ? 0x7fc00000u : u;
    return from_bits(u | (uint32_t{q} & 0x80u) << 24);
  }
  // |x| <= 448, or NaN.
  static uint8_t store(float x) {
    const uint32_t u = bits(x);
    const uint32_t sign = (u >> 24) & 0x80u;
    const uint32_t a = u & ~kSign;
    uint32_t q;
    if (a > kInfinity) {
      q = 0x7f;
    } else if (a < 0x3c800000) {  // below 2^-6: the ulp of 2^14 is the subnormal step 2^-9
      q = bits(from_bits(a) + 16384.0f) - bits(16384.0f);
    } else {
      q = (a - ((127 - 7) << 23) + 0x7ffff + ((a >> 20) & 1)) >> 20;
    }
    return static_cast<uint8_t>(sign | q);
  }
};

// Calls fn(Format{}) for the format of `type`.
template <typename Fn>
void WithFormat(FloatType type, Fn&& fn) {
  switch (type) {
    case FloatType::kF32:
      return fn(F32{});
    case FloatType::kF16:
      return fn(F16{});
    case FloatType::kBF16:
      return fn(BF16{});
  }
}

}  // namespace

ExactFloatScope::ExactFloatScope() {
#if defined(__x86_64__)
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80);  // exceptions masked, to nearest, no FTZ, no DAZ
#else
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
#endif
}

ExactFloatScope::~ExactFloatScope() {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(saved_));
#else
  asm volatile("msr fpcr, %0" : : "r"(saved_));
#endif
}

void accumulate_row(FloatType type, float* acc, const void* row, float weight, int64_t count) {
  WithFormat(type, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Storage*>(row);
    for (int64_t i = 0; i < count; ++i) acc[i] += weight * Format::load(x[i]);
  });
}

void accumulate_row(FloatType type, float* acc, const void* row, int64_t count) {
  WithFormat(type, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Storage*>(row);
    for (int64_t i = 0; i < count; ++i) acc[i] += Format::load(x[i]);
  });
}

void accumulate_rounded(FloatType type, float* acc, const float* partial, int64_t count) {
  WithFormat(type, [&](auto format) {
    using Format = decltype(format);
    for (int64_t i = 0; i < count; ++i) acc[i] += Format::load(Format::store(partial[i]));
  });
}

void store_row(FloatType type, void* row, const float* acc, int64_t count) {
  WithFormat(type, [&](auto format) {
    using Format = decltype(format);
    auto* x = static_cast<typename Format::Storage*>(row);
    for (int64_t i = 0; i < count; ++i) x[i] = Format::store(acc[i]);
  });
}

void quantize_row(FloatType type, QuantizationKind kind, const void* row, uint8_t* q, float* scales,
                  int64_t count) {
  constexpr float kMaxE4M3 = 448.0f;
  WithFormat(type, [&](auto format) {
    using Format = decltype(format);
    const auto* x = static_cast<const typename Format::Storage*>(row);
    for (int64_t begin = 0; begin < count; begin += kScaleBlock) {
      const int64_t size = std::min<int64_t>(kScaleBlock, count - begin);
      float value[kScaleBlock];
      float amax = from_bits((127 - 100) << 23);
      for (int64_t i = 0; i < size; ++i) {
        value[i] = Format::load(x[begin + i]);
        const float magnitude = from_bits(bits(value[i]) & ~kSign);
        amax = magnitude > amax ? magnitude : amax;  // false for NaN
      }
      float scale = amax / kMaxE4M3;
      float inverse = kMaxE4M3 / amax;
      if (kind == QuantizationKind::kPowerOfTwoScales) {
        uint32_t u = bits(scale);
        if ((u & 0x007fffff) != 0) u = (u & kInfinity) + 0x00800000;
        scale = from_bits(u);
        inverse = 1.0f / scale;
      }
      scales[begin / kScaleBlock] = scale;
      for (int64_t i = 0; i < size; ++i) {
        float y = value[i] * inverse;
        y = y > kMaxE4M3 ? kMaxE4M3 : y;
        y = y < -kMaxE4M3 ? -kMaxE4M3 : y;
        q[begin + i] = E4M3::store(y);
      }
    }
  });
}

void dequantize_row(FloatType type, const uint8_t* q, const float* scales, void* row,
                    int64_t count) {
  WithFormat(type, [&](auto format) {
    using Format = decltype(format);
    auto* x = static_cast<typename Format::Storage*>(row);
    for (int64_t i = 0; i < count; ++i) {
      x[i] = Format::store(E4M3::load(q[i]) * scales[i / kScaleBlock]);
    }
  });
}

}  // namespace jax_ep::cpu
