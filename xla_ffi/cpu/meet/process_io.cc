#include "xla_ffi/cpu/meet/process_io.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <stdexcept>

namespace jax_ep::cpu {

void Throw(const std::string& what) { throw std::runtime_error("jax_ep: " + what); }

std::string HostIdentity() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot_id;
  file >> boot_id;
  struct stat st{};
  stat("/proc/self/ns/pid", &st);
  return boot_id + "/" + std::to_string(st.st_ino) + "/" + std::to_string(getuid());
}

sockaddr_un AbstractAddress(const std::string& name, socklen_t* length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;  // sun_path[0] == 0
  std::memcpy(address.sun_path + 1, name.data(), name.size());
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

void SetTimeouts(int fd, std::chrono::nanoseconds left) {
  const auto us =
      std::max<int64_t>(1, std::chrono::duration_cast<std::chrono::microseconds>(left).count());
  timeval tv{.tv_sec = us / 1000000, .tv_usec = us % 1000000};
  setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
  setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv);
}

bool SendAll(int fd, const void* data, size_t bytes) {
  return send(fd, data, bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
}

bool ReceiveAll(int fd, void* data, size_t bytes) {
  return recv(fd, data, bytes, MSG_WAITALL) == static_cast<ssize_t>(bytes);
}

bool ReadProcess(pid_t pid, iovec* local, size_t num_local, iovec* remote, size_t num_remote,
                 size_t bytes) {
  const ssize_t n = process_vm_readv(pid, local, num_local, remote, num_remote, 0);
  if (n >= 0 && static_cast<size_t>(n) != bytes) errno = EFAULT;
  return n == static_cast<ssize_t>(bytes);
}

bool ReadProcess(pid_t pid, uint64_t address, void* dst, size_t bytes) {
  // The kernel moves at most 2 GiB a call.
  constexpr size_t kChunk = size_t{1} << 30;
  for (size_t at = 0; at < bytes; at += kChunk) {
    const size_t part = std::min(kChunk, bytes - at);
    iovec local{static_cast<char*>(dst) + at, part};
    iovec remote{reinterpret_cast<void*>(address + at), part};
    if (!ReadProcess(pid, &local, 1, &remote, 1, part)) return false;
  }
  return true;
}

}  // namespace jax_ep::cpu
