// Allocations of device memory that other devices and processes map, and the descriptors by which
// they come to other processes.
#ifndef JAX_EP_XLA_FFI_MEMORY_MAPPING_H_
#define JAX_EP_XLA_FFI_MEMORY_MAPPING_H_

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace jax_ep {

// A file descriptor, closed at the end.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept;
  ~Descriptor();
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// An allocation of device memory at an address of this process, for some of its devices.
class Mapping {
 public:
  // Takes no ownership of the allocation's handle. Throws std::runtime_error, naming `what`.
  Mapping(uint64_t allocation_handle, size_t bytes, const std::vector<int>& ordinals,
          const std::string& what);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  uint64_t begin() const { return begin_; }
  size_t bytes() const { return bytes_; }

 private:
  uint64_t begin_ = 0;
  size_t bytes_;
};

// What lets these devices read and write, for cuMemSetAccess.
std::vector<CUmemAccessDesc> AccessFor(const std::vector<int>& ordinals);

// Zeroed memory of device `ordinal`, which must be current, for all of `ordinals` and for export.
std::shared_ptr<Mapping> Allocate(int ordinal, size_t bytes, const std::vector<int>& ordinals,
                                  const std::string& what);

// A descriptor for other processes of the allocation that is mapped at `begin`.
Descriptor ExportAllocation(uint64_t begin, const std::string& what);

// A pidfd.
Descriptor OpenProcess(int64_t pid);

// A descriptor of another process of this user, in this one.
Descriptor TakeDescriptor(int64_t pid, int fd);

// Maps what process `pid` has exported as its descriptor `fd`.
std::shared_ptr<Mapping> MapPeer(int64_t pid, int fd, size_t bytes,
                                 const std::vector<int>& ordinals, const std::string& what);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MEMORY_MAPPING_H_
