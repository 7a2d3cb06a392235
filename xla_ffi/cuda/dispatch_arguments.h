// What dispatch and the gradient of combine, which is a form of it, have in common.
#ifndef JAX_EP_XLA_FFI_CUDA_DISPATCH_ARGUMENTS_H_
#define JAX_EP_XLA_FFI_CUDA_DISPATCH_ARGUMENTS_H_

#include "cuda/launch.h"
#include "xla_ffi/calls.h"

namespace jax_ep {

// Without NaN.
inline bool IsInteger(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::F64:
    case xla::ffi::F32:
    case xla::ffi::F16:
    case xla::ffi::BF16:
    case xla::ffi::F8E4M3FN:
    case xla::ffi::F8E5M2:
      return false;
    default:
      return true;
  }
}

// How the rows of a dispatch cross.
inline gpu::DispatchMode ModeOf(const DispatchCall& call) {
  switch (call.quantization) {
    case QuantizationKind::kNone:
      return gpu::DispatchMode::kCopy;
    case QuantizationKind::kGivenScales:
      return gpu::DispatchMode::kScaled;
    case QuantizationKind::kFloat32Scales:
    case QuantizationKind::kPowerOfTwoScales:
      break;
  }
  return call.dequantize ? gpu::DispatchMode::kDequantize : gpu::DispatchMode::kQuantize;
}
// Where it says nothing, no number is looked at.
inline FloatType FloatTypeOf(const Rows& x) { return x.float_type().value_or(FloatType::kF32); }

// Of the call of one rank, whose rows x [T, H] become tokens: [C, H], or, not expanded,
// [R * T + 1, H].
inline gpu::DispatchArguments DispatchArgumentsOf(const OnLayout& layout, const Rows& x,
                                                  const Rows& tokens, bool expand) {
  gpu::DispatchArguments arguments{};
  static_cast<TableView&>(arguments) = layout.tables;
  arguments.topk_idx = layout.topk_idx;
  arguments.x = x.data;
  arguments.tokens = tokens.data;
  arguments.num_tokens = layout.sizes.num_tokens;
  arguments.top_k = layout.sizes.top_k;
  arguments.capacity = layout.sizes.capacity;
  arguments.num_local_experts = layout.sizes.num_local_experts();
  arguments.num_channels = x.num_channels;
  arguments.row_bytes = x.row_bytes();
  arguments.num_rows = layout.sizes.num_rows(expand);
  arguments.expand = expand;
  return arguments;
}

// Of the landing area for tokens that peers cannot reach.
inline size_t LandingBytes(const OnLayout& layout, const Rows& x, int64_t num_scales) {
  return static_cast<size_t>(layout.sizes.num_ranks * layout.sizes.num_tokens *
                             gpu::WireRowBytes(x.row_bytes(), x.num_channels, num_scales));
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_DISPATCH_ARGUMENTS_H_
