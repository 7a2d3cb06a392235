// How the processes of a job on one host come to know each other: a socket to each one, and the
// certainty that its memory can be read.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_JOIN_H_
#define JAX_EP_XLA_FFI_CPU_MEET_JOIN_H_

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "xla_ffi/cpu/meet/process_io.h"

namespace jax_ep::cpu {

struct Connection {
  UniqueFd socket;  // non-blocking; none to the process itself
  pid_t pid = 0;
};

// Where others can call this process.
class Door {
 public:
  // Throws std::runtime_error.
  Door();

  // A line of text that the others need for Connect.
  std::string address() const;

  // Connects to all processes, by process; `addresses[i]` is what process i's door has. Throws
  // std::runtime_error naming the process that is late, on another host or not readable.
  std::vector<Connection> Connect(int64_t process_index, const std::vector<std::string>& addresses,
                                  std::chrono::nanoseconds timeout) const;

 private:
  UniqueFd socket_;
  std::string name_, nonce_;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_JOIN_H_
