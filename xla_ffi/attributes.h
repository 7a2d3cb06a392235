// The attributes of the custom calls, the same on every platform that has the call. All are pure
// functions of static sizes and of the mesh: no pointers, no counters, so caches and exported
// programs stay valid.
//
// Each call carries the devices of its groups (xla_ffi/groups.h), the static sizes of its layout
// and a few numbers of its own; each list below is what the call carries and what its hash is of.
#ifndef JAX_EP_XLA_FFI_ATTRIBUTES_H_
#define JAX_EP_XLA_FFI_ATTRIBUTES_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/core/operations.h"
#include "cuda/core/tables.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/groups.h"
#include "xla_ffi/hash.h"

// num_sms: streaming multiprocessors that a CUDA kernel may use; 0 is all of them. No meaning on
// CPU. The rest: TableSizes.
#define JAX_EP_SIZES(NUMBER) \
  NUMBER(num_ranks)          \
  NUMBER(num_sms)            \
  NUMBER(num_tokens)         \
  NUMBER(top_k)              \
  NUMBER(num_experts)        \
  NUMBER(capacity)

// expert_capacity: rows of each expert; 0 where they share the capacity.
#define JAX_EP_LAYOUT_NUMBERS(NUMBER) \
  JAX_EP_SIZES(NUMBER)                \
  NUMBER(expert_alignment)            \
  NUMBER(expert_capacity)

// How rows cross and come out. quantization: a QuantizationKind (cuda/core/wire_row.h). expand:
// TableSizes::num_rows. The others: 0 or 1.
#define JAX_EP_ROW_NUMBERS(NUMBER) \
  NUMBER(has_weights)              \
  NUMBER(zero_tail)                \
  NUMBER(quantization)             \
  NUMBER(dequantize)               \
  NUMBER(expand)

#define JAX_EP_DISPATCH_NUMBERS(NUMBER) \
  JAX_EP_SIZES(NUMBER)                  \
  JAX_EP_ROW_NUMBERS(NUMBER)

#define JAX_EP_LAYOUT_AND_DISPATCH_NUMBERS(NUMBER) \
  JAX_EP_LAYOUT_NUMBERS(NUMBER)                    \
  JAX_EP_ROW_NUMBERS(NUMBER)

// ranks_per_node: a divisor of num_ranks; as many ranks one after the other are a node. expand: of y,
// which has no weights where it is 0. The others: 0 or 1.
#define JAX_EP_COMBINE_NUMBERS(NUMBER) \
  JAX_EP_SIZES(NUMBER)                 \
  NUMBER(ranks_per_node)               \
  NUMBER(has_weights)                  \
  NUMBER(has_values)                   \
  NUMBER(expand)

// 0 or 1.
#define JAX_EP_COMBINE_GRADIENT_NUMBERS(NUMBER) \
  JAX_EP_SIZES(NUMBER)                          \
  NUMBER(zero_tail)

#define JAX_EP_FIELD(name) int64_t name;
#define JAX_EP_VISIT(name) visit(name);
#define JAX_EP_DECODED(name) , ::xla::ffi::StructMember<int64_t>(#name)

// A struct of these numbers and the groups, and how FFI decodes it.
#define JAX_EP_DEFINE_ATTRIBUTES(Type, kind, NUMBERS)                                          \
  namespace jax_ep {                                                                           \
  struct Type {                                                                                \
    static constexpr const char* kOp = op_name(OpKind::kind);                                  \
    ::xla::ffi::Span<const int64_t> member_bases, member_sizes, member_strides;                \
    NUMBERS(JAX_EP_FIELD)                                                                      \
    template <typename Visit>                                                                  \
    void ForEachNumber(Visit visit) const {NUMBERS(JAX_EP_VISIT)} TableSizes sizes() const {   \
      return {num_ranks, num_tokens, top_k, num_experts, capacity};                            \
    }                                                                                          \
  };                                                                                           \
  }                                                                                            \
  XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(                                                       \
      jax_ep::Type, ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("member_bases"), \
      ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("member_sizes"),               \
      ::xla::ffi::StructMember<::xla::ffi::Span<const int64_t>>("member_strides")              \
          NUMBERS(JAX_EP_DECODED))

JAX_EP_DEFINE_ATTRIBUTES(LayoutAttributes, kLayout, JAX_EP_LAYOUT_NUMBERS);
JAX_EP_DEFINE_ATTRIBUTES(DispatchAttributes, kDispatch, JAX_EP_DISPATCH_NUMBERS);
JAX_EP_DEFINE_ATTRIBUTES(CombineAttributes, kCombine, JAX_EP_COMBINE_NUMBERS);
// On CUDA alone; CPU's gradient of combine is made of dispatch.
JAX_EP_DEFINE_ATTRIBUTES(CombineGradientAttributes, kCombineGradient,
                         JAX_EP_COMBINE_GRADIENT_NUMBERS);
JAX_EP_DEFINE_ATTRIBUTES(LayoutAndDispatchAttributes, kLayoutAndDispatch,
                         JAX_EP_LAYOUT_AND_DISPATCH_NUMBERS);

namespace jax_ep {

// Ranks whose calls carry anything that differs find that they are in different calls.
template <typename Attributes>
uint64_t HashOf(const Attributes& attributes) {
  uint64_t hash = HashText(0, Attributes::kOp);
  const auto mix = [&hash](int64_t value) { hash = Mix(hash, static_cast<uint64_t>(value)); };
  for (const auto& list :
       {attributes.member_bases, attributes.member_sizes, attributes.member_strides}) {
    mix(static_cast<int64_t>(list.size()));
    for (int64_t value : list) mix(value);
  }
  attributes.ForEachNumber(mix);
  return hash;
}

template <typename Attributes>
xla::ffi::ErrorOr<Groups> GroupsOf(const Attributes& attributes) {
  const auto copy = [](xla::ffi::Span<const int64_t> list) {
    return std::vector<int64_t>(list.begin(), list.end());
  };
  std::vector<int64_t> bases = copy(attributes.member_bases);
  std::vector<int64_t> sizes = copy(attributes.member_sizes);
  std::vector<int64_t> strides = copy(attributes.member_strides);
  if (auto problem = Groups::Problem(bases, sizes, strides, attributes.num_ranks)) {
    return xla::ffi::Unexpected(
        xla::ffi::Error(xla::ffi::ErrorCode::kInvalidArgument,
                        std::string(Attributes::kOp) + ": " + std::move(*problem)));
  }
  return Groups(std::move(bases), std::move(sizes), std::move(strides), attributes.num_ranks);
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_ATTRIBUTES_H_
