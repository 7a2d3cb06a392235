#include "xla_ffi/cpu/meet/messages.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace jax_ep::cpu {
namespace {

struct Header {
  MessageType type;
  uint32_t payload_bytes;
  CallKey key;
};

}  // namespace

Peer::Peer(Connection connection) : connection_(std::move(connection)), alive_(true) {}

void Peer::Send(MessageType type, const CallKey& key, std::string_view payload) {
  if (!alive_) return;
  const Header header{type, static_cast<uint32_t>(payload.size()), key};
  outbox_.append(reinterpret_cast<const char*>(&header), sizeof header);
  outbox_.append(payload);
  Flush();
}

void Peer::Flush() {
  while (!outbox_.empty()) {
    const ssize_t n = send(fd(), outbox_.data(), outbox_.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      if (errno != EAGAIN && errno != EWOULDBLOCK) outbox_.clear();  // Receive sees the end
      return;
    }
    outbox_.erase(0, static_cast<size_t>(n));
  }
}

bool Peer::Receive(const std::function<void(const Message&)>& handle) {
  char buffer[65536];
  for (;;) {
    const ssize_t n = recv(fd(), buffer, sizeof buffer, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
    if (n <= 0) {
      alive_ = false;
      return false;
    }
    inbox_.append(buffer, static_cast<size_t>(n));
    size_t at = 0;
    Header header;
    while (inbox_.size() - at >= sizeof header) {
      std::memcpy(&header, inbox_.data() + at, sizeof header);
      if (inbox_.size() - at < sizeof header + header.payload_bytes) break;
      const std::string payload = inbox_.substr(at + sizeof header, header.payload_bytes);
      at += sizeof header + header.payload_bytes;
      if (header.type == MessageType::kGoodbye) {
        said_goodbye_ = true;
      } else {
        handle({header.type, header.key, payload});
      }
    }
    inbox_.erase(0, at);
  }
}

}  // namespace jax_ep::cpu
