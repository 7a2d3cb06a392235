// The attributes of the custom calls, the same on every platform that has the call. All are pure
// functions of static sizes and of the mesh: no pointers, no counters, so caches and exported
// programs stay valid.
//
// members: one number a rank, [num_groups * num_ranks], group by group, ranks ascending: the
// process in the upper 32 bits, JAX's device id in the lower ones.
// num_sms: streaming multiprocessors that a CUDA kernel may use; 0 is all of them. No meaning on
// CPU.
#ifndef JAX_EP_XLA_FFI_ATTRIBUTES_H_
#define JAX_EP_XLA_FFI_ATTRIBUTES_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

struct LayoutAttributes {
  static constexpr const char* kOp = "jax_ep_layout";
  xla::ffi::Span<const int64_t> members;
  int64_t num_ranks, num_sms, num_experts, capacity, expert_alignment;
};

struct DispatchAttributes {
  static constexpr const char* kOp = "jax_ep_dispatch";
  xla::ffi::Span<const int64_t> members;
  int64_t num_ranks, num_sms, num_tokens, top_k;
  int64_t has_weights;   // 0 or 1
  int64_t zero_tail;     // 0 or 1
  int64_t quantization;  // 0 none, 1 fp8 with f32 scales, 2 fp8 with power-of-two scales
  int64_t dequantize;    // 0 or 1
};

struct CombineAttributes {
  static constexpr const char* kOp = "jax_ep_combine";
  xla::ffi::Span<const int64_t> members;
  int64_t num_ranks, num_sms, num_experts;
  int64_t has_weights;  // 0 or 1
  int64_t has_values;   // 0 or 1
};

// On CUDA alone; CPU's gradient of combine is made of dispatch.
struct CombineGradientAttributes {
  static constexpr const char* kOp = "jax_ep_combine_gradient";
  xla::ffi::Span<const int64_t> members;
  int64_t num_ranks, num_sms, num_tokens, top_k;
  int64_t zero_tail;  // 0 or 1
};

}  // namespace jax_ep

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_ep::LayoutAttributes, xla::ffi::StructMember<xla::ffi::Span<const int64_t>>("members"),
    xla::ffi::StructMember<int64_t>("num_ranks"), xla::ffi::StructMember<int64_t>("num_sms"),
    xla::ffi::StructMember<int64_t>("num_experts"), xla::ffi::StructMember<int64_t>("capacity"),
    xla::ffi::StructMember<int64_t>("expert_alignment"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_ep::DispatchAttributes, xla::ffi::StructMember<xla::ffi::Span<const int64_t>>("members"),
    xla::ffi::StructMember<int64_t>("num_ranks"), xla::ffi::StructMember<int64_t>("num_sms"),
    xla::ffi::StructMember<int64_t>("num_tokens"), xla::ffi::StructMember<int64_t>("top_k"),
    xla::ffi::StructMember<int64_t>("has_weights"), xla::ffi::StructMember<int64_t>("zero_tail"),
    xla::ffi::StructMember<int64_t>("quantization"), xla::ffi::StructMember<int64_t>("dequantize"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_ep::CombineAttributes, xla::ffi::StructMember<xla::ffi::Span<const int64_t>>("members"),
    xla::ffi::StructMember<int64_t>("num_ranks"), xla::ffi::StructMember<int64_t>("num_sms"),
    xla::ffi::StructMember<int64_t>("num_experts"), xla::ffi::StructMember<int64_t>("has_weights"),
    xla::ffi::StructMember<int64_t>("has_values"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_ep::CombineGradientAttributes,
    xla::ffi::StructMember<xla::ffi::Span<const int64_t>>("members"),
    xla::ffi::StructMember<int64_t>("num_ranks"), xla::ffi::StructMember<int64_t>("num_sms"),
    xla::ffi::StructMember<int64_t>("num_tokens"), xla::ffi::StructMember<int64_t>("top_k"),
    xla::ffi::StructMember<int64_t>("zero_tail"));

#endif  // JAX_EP_XLA_FFI_ATTRIBUTES_H_
