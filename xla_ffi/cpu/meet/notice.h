// Words on stderr about a call that waits, or whose error nobody may see.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_NOTICE_H_
#define JAX_EP_XLA_FFI_CPU_MEET_NOTICE_H_

#include <string>

namespace jax_ep::cpu {

// Prints a line, unless one was printed in the last 30 s: where many calls wait, they wait for the
// same rank.
void Notice(const std::string& line);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_NOTICE_H_
