// Words on stderr about a call that waits, or whose error nobody may see.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_NOTICE_H_
#define JAX_EP_XLA_FFI_CPU_MEET_NOTICE_H_

#include <algorithm>
#include <chrono>
#include <string>

#include "xla_ffi/timeouts.h"

namespace jax_ep::cpu {

// How long after its beginning a wait is told of.
inline std::chrono::nanoseconds NoticeAfter(const Timeouts& timeouts) {
  return std::min<std::chrono::nanoseconds>(std::chrono::seconds(30), timeouts.progress);
}

// Prints a line, unless one was printed in the last 30 s: where many calls wait, they wait for the
// same rank.
void Notice(const std::string& line);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_NOTICE_H_
