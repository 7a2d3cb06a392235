#include "xla_ffi/memory/peer_process.h"

#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "xla_ffi/memory/driver.h"

namespace jax_ep {
namespace {

constexpr size_t kPageBytes = sizeof(uint64_t);  // the kernel rounds it up

Descriptor NewPage() {
  Descriptor fd(memfd_create("jax_ep presence", MFD_CLOEXEC));
  if (fd.get() < 0 || ftruncate(fd.get(), kPageBytes) != 0) {
    Throw(std::string("memory for other processes: ") + strerror(errno));
  }
  return fd;
}

}  // namespace

Presence::Presence() : fd_(NewPage()) { Map(); }
Presence::Presence(Descriptor fd) : fd_(std::move(fd)) { Map(); }
Presence::~Presence() { munmap(left_, kPageBytes); }

void Presence::Map() {
  void* at = mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (at == MAP_FAILED) Throw(std::string("mapping another process's memory: ") + strerror(errno));
  left_ = static_cast<uint64_t*>(at);
}

void Presence::Leave() { __atomic_store_n(left_, 1, __ATOMIC_RELEASE); }
bool Presence::has_left() const { return __atomic_load_n(left_, __ATOMIC_ACQUIRE) != 0; }

PeerProcess::PeerProcess(int64_t pid, int presence_fd)
    : pid_(pid), pidfd_(OpenProcess(pid)), presence_(TakeDescriptor(pid, presence_fd)) {}

PeerProcess::State PeerProcess::Look() const {
  pollfd ended{pidfd_.get(), POLLIN, 0};
  // In this order: a process leaves before it ends.
  const bool has_ended = poll(&ended, 1, 0) > 0;
  if (presence_.has_left()) return State::kLeft;
  return has_ended ? State::kDied : State::kHere;
}

}  // namespace jax_ep
