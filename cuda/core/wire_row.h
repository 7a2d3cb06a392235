// Rows of float8 values with f32 scales, and how such a row crosses a link. Those that dispatch
// quantises are float8_e4m3fn, with one scale for each block of channels.
#ifndef JAX_EP_CUDA_CORE_WIRE_ROW_H_
#define JAX_EP_CUDA_CORE_WIRE_ROW_H_

#include <cstdint>

#include "cuda/core/limits.h"

namespace jax_ep {

// The attribute `quantization`.
enum class QuantizationKind : int32_t {
  kNone,
  kFloat32Scales,
  kPowerOfTwoScales,
  kGivenScales,  // x is float8 and comes with its scales; both are passed on
};

// Of a row with this many channels that dispatch quantises; its last block may be shorter.
constexpr int64_t num_block_scales(int64_t num_channels) {
  return (num_channels + kScaleBlock - 1) / kScaleBlock;
}
static_assert(num_block_scales(2880) == 23);

// As it crosses: the values, a multiple of kRowAlignment, then the scales, then up to 12 bytes
// unused.
constexpr int64_t wire_row_bytes(int64_t num_channels, int64_t num_scales) {
  const int64_t scale_bytes = num_scales * int64_t{sizeof(float)};
  return num_channels + (scale_bytes + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
}
static_assert(wire_row_bytes(128, 1) == 144 && wire_row_bytes(512, 4) == 528);
// Before it is dequantised it may lie where its 16-bit numbers will be.
static_assert(wire_row_bytes(kRowAlignment, 1) <= 2 * kRowAlignment);

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_WIRE_ROW_H_
