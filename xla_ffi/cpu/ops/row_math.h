// Arithmetic on rows, exact to the bit on every machine: each f32 operation is rounded on its own
// (compiled with -ffp-contract=off), to nearest even, and subnormals count.
#ifndef JAX_EP_XLA_FFI_CPU_OPS_ROW_MATH_H_
#define JAX_EP_XLA_FFI_CPU_OPS_ROW_MATH_H_

#include <cstddef>
#include <cstdint>

#include "cuda/core/float_type.h"
#include "cuda/core/wire_row.h"

namespace jax_ep::cpu {

// XLA's threads flush subnormals; inside this scope the thread does not. Rounding is to nearest.
class ExactFloatScope {
 public:
  ExactFloatScope();
  ~ExactFloatScope();
  ExactFloatScope(const ExactFloatScope&) = delete;
  ExactFloatScope& operator=(const ExactFloatScope&) = delete;

 private:
  uint64_t saved_;
};

// acc[i] += weight * row[i] (product rounded, then the sum), for `count` elements.
void accumulate_row(FloatType type, float* acc, const void* row, float weight, int64_t count);

// acc[i] += row[i].
void accumulate_row(FloatType type, float* acc, const void* row, int64_t count);

// acc[i] += round(partial[i]): the partial sum of one rank as it crosses the link.
void accumulate_rounded(FloatType type, float* acc, const float* partial, int64_t count);

// row[i] = round(acc[i]).
void store_row(FloatType type, void* row, const float* acc, int64_t count);

// fp8 with one f32 scale per kScaleBlock channels: value = float8_e4m3fn * scale.

// amax = max |x| of the block (NaN ignored), at least 2^-100.
// kFloat32Scales: scale = amax / 448 and inverse = 448 / amax, each one rounded division.
// kPowerOfTwoScales: scale = the least power of two >= amax / 448, inverse = 1 / scale (exact).
// q = e4m3fn(clamp(x * inverse, -448, 448)); NaN stays NaN. The last block may be shorter.
void quantize_row(FloatType type, QuantizationKind kind, const void* row, uint8_t* q, float* scales,
                  int64_t count);

// row[i] = round(f32(q[i]) * scale).
void dequantize_row(FloatType type, const uint8_t* q, const float* scales, void* row,
                    int64_t count);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_OPS_ROW_MATH_H_
