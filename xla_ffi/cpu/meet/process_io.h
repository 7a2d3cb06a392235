// What processes of one host do with each other through the kernel: sockets and reading memory.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_PROCESS_IO_H_
#define JAX_EP_XLA_FFI_CPU_MEET_PROCESS_IO_H_

#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace jax_ep::cpu {

// Closes what it holds.
class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  ~UniqueFd() {
    if (fd_ >= 0) close(fd_);
  }
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }

  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// A std::runtime_error for those who set a job up.
[[noreturn]] void Throw(const std::string& what);

// The same in processes that can reach each other: of one boot, pid namespace and user.
std::string HostIdentity();

// Of a socket that is not in the file system, and gone with its owner.
sockaddr_un AbstractAddress(const std::string& name, socklen_t* length);

// How long sending and receiving may take.
void SetTimeouts(int fd, std::chrono::nanoseconds left);

// False with errno set if not all of it went or came.
bool SendAll(int fd, const void* data, size_t bytes);
bool ReceiveAll(int fd, void* data, size_t bytes);

// Reads the memory of process `pid`, `bytes` in all; false with errno set if not all of it came.
bool ReadProcess(pid_t pid, iovec* local, size_t num_local, iovec* remote, size_t num_remote,
                 size_t bytes);
bool ReadProcess(pid_t pid, uint64_t address, void* dst, size_t bytes);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_PROCESS_IO_H_
