#include "xla_ffi/cpu/meet/join.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "xla_ffi/cpu/meet/clock.h"

namespace jax_ep::cpu {
namespace {

constexpr uint64_t kProbeValue = 0x6a61785f65700001;  // "jax_ep", protocol version 1

// Read by every peer while connecting, to show that it may read this process.
const volatile uint64_t g_probe = kProbeValue;

struct Hello {
  uint64_t version;
  int64_t process;
  uint64_t probe_address;
  char nonce[32];  // of the one who is called
};

[[noreturn]] void ThrowErrno(const std::string& what) { Throw(what + ": " + strerror(errno)); }

Hello MakeHello(int64_t process_index, const std::string& nonce) {
  Hello hello{kProbeValue, process_index, reinterpret_cast<uint64_t>(&g_probe), {}};
  std::memcpy(hello.nonce, nonce.data(), std::min(nonce.size(), sizeof hello.nonce));
  return hello;
}

Connection MakeConnection(UniqueFd socket, int64_t process) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) {
    ThrowErrno("SO_PEERCRED of process " + std::to_string(process));
  }
  fcntl(socket.get(), F_SETFL, fcntl(socket.get(), F_GETFL) | O_NONBLOCK);
  return {std::move(socket), credentials.pid};
}

}  // namespace

Door::Door() {
  unsigned char random[16];
  if (getrandom(random, sizeof random, 0) != sizeof random) ThrowErrno("getrandom");
  for (unsigned char byte : random) {
    nonce_ += "0123456789abcdef"[byte >> 4];
    nonce_ += "0123456789abcdef"[byte & 15];
  }
  socket_ = UniqueFd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket_) ThrowErrno("socket");
  socklen_t length = 0;
  name_ = "jax_ep/" + nonce_.substr(0, 16);
  const sockaddr_un address = AbstractAddress(name_, &length);
  if (bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
    ThrowErrno("bind " + name_);
  }
  if (listen(socket_.get(), SOMAXCONN) != 0) ThrowErrno("listen " + name_);
  // Where the Yama module restricts it, peers may read this process only if it says so.
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}

std::string Door::address() const { return HostIdentity() + " " + name_ + " " + nonce_; }

std::vector<Connection> Door::Connect(int64_t process_index,
                                      const std::vector<std::string>& addresses,
                                      std::chrono::nanoseconds timeout) const {
  const Clock::time_point deadline = Clock::now() + timeout;
  const auto left = [&](const std::string& waiting_for) {
    const auto time = deadline - Clock::now();
    if (time <= time.zero()) Throw("timeout while waiting for " + waiting_for);
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time);
  };
  const auto num_processes = static_cast<int64_t>(addresses.size());
  std::vector<Connection> connections(num_processes);
  std::vector<uint64_t> probe_addresses(num_processes);

  const std::string host = HostIdentity();
  // Each calls those before it and is called by those after it.
  for (int64_t p = 0; p < num_processes; ++p) {
    if (p == process_index) continue;
    std::istringstream in(addresses[p]);
    std::string peer_host, name, nonce;
    in >> peer_host >> name >> nonce;
    const std::string who = "process " + std::to_string(p);
    if (peer_host != host) {
      Throw(who +
            " runs on another host, in another container or as another user; the CPU backend "
            "joins processes of one host only");
    }
    if (p > process_index) continue;
    UniqueFd fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd) ThrowErrno("socket");
    SetTimeouts(fd.get(), left(who));
    socklen_t length = 0;
    const sockaddr_un address = AbstractAddress(name, &length);
    if (connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) {
      ThrowErrno("connecting to " + who);
    }
    const Hello mine = MakeHello(process_index, nonce);
    Hello theirs{};
    if (!SendAll(fd.get(), &mine, sizeof mine) || !ReceiveAll(fd.get(), &theirs, sizeof theirs) ||
        theirs.version != kProbeValue || theirs.process != p) {
      Throw(who + " did not answer as a jax_ep process of this version");
    }
    probe_addresses[p] = theirs.probe_address;
    connections[p] = MakeConnection(std::move(fd), p);
  }
  for (int64_t missing = num_processes - process_index - 1; missing > 0;) {
    std::string who = "process";
    for (int64_t p = process_index + 1; p < num_processes; ++p) {
      if (!connections[p].socket) who += " " + std::to_string(p);
    }
    pollfd poll_fd{socket_.get(), POLLIN, 0};
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(left(who)).count();
    if (poll(&poll_fd, 1, static_cast<int>(std::min<int64_t>(ms + 1, 1000))) <= 0) continue;
    UniqueFd fd(accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!fd) continue;
    SetTimeouts(fd.get(), left(who));
    Hello theirs{};
    const bool known = ReceiveAll(fd.get(), &theirs, sizeof theirs) &&
                       theirs.version == kProbeValue &&
                       std::string_view(theirs.nonce, sizeof theirs.nonce) == nonce_ &&
                       theirs.process > process_index && theirs.process < num_processes &&
                       !connections[theirs.process].socket;
    if (!known) continue;  // a stranger: anybody on the host can knock
    const Hello mine = MakeHello(process_index, "");
    if (!SendAll(fd.get(), &mine, sizeof mine)) ThrowErrno("answering process");
    probe_addresses[theirs.process] = theirs.probe_address;
    connections[theirs.process] = MakeConnection(std::move(fd), theirs.process);
    --missing;
  }
  // Not before all are connected: the others would wait for this process until their timeout.
  for (int64_t p = 0; p < num_processes; ++p) {
    if (p == process_index) continue;
    uint64_t value = 0;
    if (!ReadProcess(connections[p].pid, probe_addresses[p], &value, sizeof value) ||
        value != kProbeValue) {
      Throw("process " + std::to_string(process_index) + " may not read the memory of process " +
            std::to_string(p) + " (process_vm_readv: " + strerror(errno) +
            "), which the CPU backend needs between processes; run them as one user, and in a "
            "container allow the system call (for example --cap-add=SYS_PTRACE)");
    }
  }
  return connections;
}

}  // namespace jax_ep::cpu
