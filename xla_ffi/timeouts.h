// How long an operation waits for another rank, on both platforms.
#ifndef JAX_EP_XLA_FFI_TIMEOUTS_H_
#define JAX_EP_XLA_FFI_TIMEOUTS_H_

#include <chrono>

namespace jax_ep {

struct Timeouts {
  std::chrono::nanoseconds arrival{std::chrono::minutes(10)};   // for a rank to come
  std::chrono::nanoseconds progress{std::chrono::seconds(30)};  // to go on, once it has come
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_TIMEOUTS_H_
