// Division by a number of the call, which the host prepares, so that a kernel multiplies and shifts.
#ifndef JAX_EP_CUDA_CORE_DIVIDER_H_
#define JAX_EP_CUDA_CORE_DIVIDER_H_

#include <cstdint>

#include "cuda/core/placement.h"

namespace jax_ep {

// n / divisor = (n * multiplier / 2^32 + n) >> shift, for n and divisor in [0, 2^31), divisor > 0:
// 2^32 + multiplier is 2^(32 + shift) / divisor, rounded up, with divisor <= 2^shift.
class Divider {
 public:
  explicit constexpr Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (divisor > int64_t{1} << shift_) ++shift_;
    const uint64_t rest = (uint64_t{1} << shift_) - divisor_;
    multiplier_ = static_cast<uint32_t>((rest << 32) / divisor_ + 1);
  }

  JAX_EP_HOST_DEVICE constexpr int32_t divisor() const { return static_cast<int32_t>(divisor_); }
  JAX_EP_HOST_DEVICE constexpr int32_t quotient(int32_t n) const {
    const auto high =
        static_cast<uint32_t>(static_cast<uint64_t>(multiplier_) * static_cast<uint32_t>(n) >> 32);
    return static_cast<int32_t>((high + static_cast<uint32_t>(n)) >> shift_);
  }
  JAX_EP_HOST_DEVICE constexpr int32_t round_up(int32_t n) const {
    return quotient(n + divisor() - 1) * divisor();
  }

 private:
  uint32_t divisor_, multiplier_ = 0, shift_ = 0;
};

JAX_EP_HOST_DEVICE constexpr int32_t round_up(int32_t n, const Divider& multiple) {
  return multiple.round_up(n);
}

static_assert(Divider(1).quotient(0) == 0 && Divider(1).quotient(INT32_MAX) == INT32_MAX);
static_assert(Divider(7).quotient(6) == 0 && Divider(7).quotient(7) == 1);
static_assert(Divider(641).quotient(INT32_MAX) == INT32_MAX / 641);
static_assert(Divider(INT32_MAX).quotient(INT32_MAX - 1) == 0);
static_assert(Divider(INT32_MAX).quotient(INT32_MAX) == 1);
static_assert(RoomOf<int32_t, Divider>{48, Divider(16), 0}.group_size(0, 17) == 32);
static_assert(Divider(1).round_up(5) == 5 && Divider(16).round_up(17) == 32);

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_DIVIDER_H_
