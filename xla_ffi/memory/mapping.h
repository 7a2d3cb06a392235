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

// Addresses of this process, for one allocation of device memory or for several side by side.
class AddressRange {
 public:
  // Throws std::runtime_error, naming `what`.
  AddressRange(size_t bytes, const std::string& what);
  ~AddressRange();
  AddressRange(const AddressRange&) = delete;
  AddressRange& operator=(const AddressRange&) = delete;
  uint64_t begin() const { return begin_; }

 private:
  uint64_t begin_ = 0;
  size_t bytes_;
};

// Where an allocation is to lie: in a range that is shared with others, or, without, one of its own.
struct Place {
  std::shared_ptr<AddressRange> range = nullptr;
  size_t offset = 0;
};

// An allocation of device memory at an address of this process, for some of its devices.
class Mapping {
 public:
  // Takes no ownership of the allocation's handle. Throws std::runtime_error, naming `what`.
  Mapping(uint64_t allocation_handle, size_t bytes, const std::vector<int>& ordinals,
          const std::string& what, const Place& place = {});
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  uint64_t begin() const { return begin_; }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<AddressRange> range_;
  uint64_t begin_ = 0;
  size_t bytes_;
};

// What lets these devices read and write, for cuMemSetAccess.
std::vector<CUmemAccessDesc> AccessFor(const std::vector<int>& ordinals);

// As much as an allocation of so many bytes takes on that device.
size_t AllocatedBytes(int ordinal, size_t bytes, const std::string& what);

// Zeroed memory of device `ordinal`, which must be current, for all of `ordinals` and for export.
// Throws OutOfMemory if the device has not so much left.
std::shared_ptr<Mapping> Allocate(int ordinal, size_t bytes, const std::vector<int>& ordinals,
                                  const std::string& what, const Place& place = {});

// A descriptor for other processes of the allocation that is mapped at `begin`.
Descriptor ExportAllocation(uint64_t begin, const std::string& what);

// A pidfd.
Descriptor OpenProcess(int64_t pid);

// A descriptor of another process of this user, in this one.
Descriptor TakeDescriptor(int64_t pid, int fd);

// Maps what process `pid` has exported as its descriptor `fd`.
std::shared_ptr<Mapping> MapPeer(int64_t pid, int fd, size_t bytes,
                                 const std::vector<int>& ordinals, const std::string& what,
                                 const Place& place = {});

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MEMORY_MAPPING_H_
