// What went wrong, without any framework's type.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_FAILURE_H_
#define JAX_EP_XLA_FFI_CPU_MEET_FAILURE_H_

#include <functional>
#include <optional>
#include <string>

namespace jax_ep::cpu {

enum class FailureCode { kDeadlineExceeded, kUnavailable, kFailedPrecondition, kInternal };

struct Failure {
  FailureCode code;
  std::string message;
};

using MaybeFailure = std::optional<Failure>;

// Told exactly once how a call ended. May run the caller's continuation, which may block for long.
using Completion = std::function<void(const MaybeFailure&)>;

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_FAILURE_H_
