// Quantised rows: float8_e4m3fn values with one f32 scale for each block of channels, and how such
// a row crosses a link.
#ifndef JAX_EP_CUDA_CORE_WIRE_ROW_H_
#define JAX_EP_CUDA_CORE_WIRE_ROW_H_

#include <cstdint>

#include "cuda/core/limits.h"

namespace jax_ep {

// The attribute `quantization`.
enum class QuantizationKind : int32_t { kNone, kFloat32Scales, kPowerOfTwoScales };

// Of a row with this many channels, a multiple of kScaleBlock.
constexpr int64_t num_scales(int64_t num_channels) { return num_channels / kScaleBlock; }

// As it crosses: the values, then the scales, then up to 12 bytes unused.
constexpr int64_t wire_row_bytes(int64_t num_channels) {
  const int64_t scale_bytes = num_scales(num_channels) * int64_t{sizeof(float)};
  return num_channels + (scale_bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}

static_assert(wire_row_bytes(128) == 144 && wire_row_bytes(512) == 528);

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_WIRE_ROW_H_
