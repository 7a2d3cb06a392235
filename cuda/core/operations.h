// The operations: their numbers in records and timelines, and the names that users see.
#ifndef JAX_EP_CUDA_CORE_OPERATIONS_H_
#define JAX_EP_CUDA_CORE_OPERATIONS_H_

#include <cstdint>

namespace jax_ep {

enum class OpKind : uint32_t { kLayout, kDispatch, kCombine, kCombineGradient, kLayoutAndDispatch };
inline constexpr uint32_t kNumOps = 5;

// Of the custom call, and in errors.
inline constexpr const char* kOpNames[] = {"jax_ep_layout", "jax_ep_dispatch", "jax_ep_combine",
                                           "jax_ep_combine_gradient", "jax_ep_layout_and_dispatch"};
static_assert(sizeof kOpNames / sizeof kOpNames[0] == kNumOps);

constexpr const char* op_name(OpKind kind) { return kOpNames[static_cast<uint32_t>(kind)]; }

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_OPERATIONS_H_
