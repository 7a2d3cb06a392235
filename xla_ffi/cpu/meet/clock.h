// The time that waits are measured in.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_CLOCK_H_
#define JAX_EP_XLA_FFI_CPU_MEET_CLOCK_H_

#include <atomic>
#include <chrono>
#include <cstdint>

namespace jax_ep::cpu {

struct Clock {
  using time_point = std::chrono::steady_clock::time_point;

  static time_point now() {
    return std::chrono::steady_clock::now() + std::chrono::nanoseconds(skipped_ns);
  }

  // For tests: from now on it is `time` later. Who sleeps sees it when it wakes.
  static void Skip(std::chrono::nanoseconds time) { skipped_ns += time.count(); }

 private:
  inline static std::atomic<int64_t> skipped_ns{0};
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_CLOCK_H_
