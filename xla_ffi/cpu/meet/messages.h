// What processes tell each other about their calls, and the socket it goes through.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_MESSAGES_H_
#define JAX_EP_XLA_FFI_CPU_MEET_MESSAGES_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>

#include "xla_ffi/cpu/meet/join.h"

namespace jax_ep::cpu {

// A launch and a call, by the names that they have in every process (see program.h).
struct LaunchKey {
  uint64_t devices = 0;  // the hash of those of the mesh
  int64_t launch = 0;
  uint64_t program = 0;  // the hash of its list

  auto tie() const { return std::tie(devices, launch, program); }
  bool operator<(const LaunchKey& other) const { return tie() < other.tie(); }
  bool operator==(const LaunchKey& other) const { return tie() == other.tie(); }
};

struct CallKey {
  LaunchKey launch;
  int64_t place = 0, group = 0;

  bool operator<(const CallKey& other) const {
    return std::tie(launch, place, group) < std::tie(other.launch, other.place, other.group);
  }
};

// FAILED and GOODBYE are not about one call: of FAILED's key only the launch counts.
enum class MessageType : uint32_t { kArrived = 1, kDone, kFailed, kGoodbye };

struct Message {
  MessageType type;
  CallKey key;
  std::string_view payload;
};

// A peer and the connection to it. Blocks never: what the socket does not take at once waits.
class Peer {
 public:
  Peer() = default;  // of the process itself, or not connected: not alive
  explicit Peer(Connection connection);

  pid_t pid() const { return connection_.pid; }
  int fd() const { return connection_.socket.get(); }
  bool alive() const { return alive_; }
  bool said_goodbye() const { return said_goodbye_; }
  bool has_unsent() const { return !outbox_.empty(); }

  // To a peer that is not alive this does nothing.
  void Send(MessageType type, const CallKey& key, std::string_view payload);
  void Flush();
  // Calls `handle` for every message that has come, but for goodbyes. False if the peer has gone:
  // it is not alive from then on.
  bool Receive(const std::function<void(const Message&)>& handle);

 private:
  Connection connection_;
  bool alive_ = false;
  bool said_goodbye_ = false;
  std::string inbox_, outbox_;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_MESSAGES_H_
