// Another process of the job, on this host: whether it still takes part.
//
// Its pidfd tells at once that it has ended, however that came. A word in memory that both map
// tells whether it had left before, by jax_ep.finalize() or an exit that calls it: then nobody has
// died.
#ifndef JAX_EP_XLA_FFI_MEMORY_PEER_PROCESS_H_
#define JAX_EP_XLA_FFI_MEMORY_PEER_PROCESS_H_

#include <cstdint>

#include "xla_ffi/memory/mapping.h"

namespace jax_ep {

// A page that processes share.
class Presence {
 public:
  // A new page, of a process that takes part.
  Presence();
  // The page behind a descriptor that came from another process.
  explicit Presence(Descriptor fd);
  ~Presence();
  Presence(const Presence&) = delete;
  Presence& operator=(const Presence&) = delete;

  int fd() const { return fd_.get(); }
  void Leave();
  bool has_left() const;

 private:
  void Map();
  Descriptor fd_;
  uint64_t* left_ = nullptr;
};

class PeerProcess {
 public:
  // `presence_fd` is the descriptor of its page in process `pid`. Throws std::runtime_error.
  PeerProcess(int64_t pid, int presence_fd);

  enum class State { kHere, kLeft, kDied };
  State Look() const;
  int64_t pid() const { return pid_; }

 private:
  int64_t pid_;
  Descriptor pidfd_;
  Presence presence_;
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MEMORY_PEER_PROCESS_H_
