// The float types that rows of sums and of quantised values have.
#ifndef JAX_EP_CUDA_CORE_FLOAT_TYPE_H_
#define JAX_EP_CUDA_CORE_FLOAT_TYPE_H_

#include <cstdint>

namespace jax_ep {

enum class FloatType : int32_t { kF32, kF16, kBF16 };

inline constexpr int64_t kMaxFloatBytes = 4;
constexpr int64_t float_bytes(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_FLOAT_TYPE_H_
