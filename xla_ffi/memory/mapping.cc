#include "xla_ffi/memory/mapping.h"

#include <cuda_runtime_api.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "xla_ffi/memory/driver.h"

namespace jax_ep {
namespace {

// A hold on an allocation; mappings of it live without.
class AllocationHandle {
 public:
  explicit AllocationHandle(CUmemGenericAllocationHandle handle) : handle_(handle) {}
  ~AllocationHandle() { Driver::Get().cuMemRelease(handle_); }
  AllocationHandle(const AllocationHandle&) = delete;
  AllocationHandle& operator=(const AllocationHandle&) = delete;
  CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  CUmemGenericAllocationHandle handle_;
};

// Of memory of a device that others, and other processes, map.
CUmemAllocationProp PropertiesOn(int ordinal) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = ordinal;
  prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return prop;
}

}  // namespace

Descriptor OpenProcess(int64_t pid) {
  Descriptor process(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(pid), 0)));
  if (process.get() < 0) Throw("pidfd_open " + std::to_string(pid) + ": " + strerror(errno));
  return process;
}

Descriptor TakeDescriptor(int64_t pid, int fd) {
  const Descriptor process = OpenProcess(pid);
  Descriptor mine(static_cast<int>(syscall(SYS_pidfd_getfd, process.get(), fd, 0)));
  if (mine.get() < 0) {
    Throw("pidfd_getfd from process " + std::to_string(pid) + ": " + strerror(errno) +
          "; run the processes as one user, and in a container allow the system call (for example "
          "--cap-add=SYS_PTRACE)");
  }
  return mine;
}

Descriptor::Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Descriptor::~Descriptor() {
  if (fd_ >= 0) close(fd_);
}

AddressRange::AddressRange(size_t bytes, const std::string& what) : bytes_(bytes) {
  CUdeviceptr at = 0;
  Check(Driver::Get().cuMemAddressReserve(&at, bytes, 0, 0, 0), "address space for " + what);
  begin_ = at;
}

AddressRange::~AddressRange() { Driver::Get().cuMemAddressFree(begin_, bytes_); }

Mapping::Mapping(uint64_t allocation_handle, size_t bytes, const std::vector<int>& ordinals,
                 const std::string& what, const Place& place)
    : range_(place.range != nullptr ? place.range : std::make_shared<AddressRange>(bytes, what)),
      begin_(range_->begin() + place.offset),
      bytes_(bytes) {
  const Driver& driver = Driver::Get();
  CUresult status = driver.cuMemMap(begin_, bytes, 0, allocation_handle, 0);
  if (status == CUDA_SUCCESS) {
    const std::vector<CUmemAccessDesc> access = AccessFor(ordinals);
    status = driver.cuMemSetAccess(begin_, bytes, access.data(), access.size());
    if (status != CUDA_SUCCESS) driver.cuMemUnmap(begin_, bytes);
  }
  Check(status, "mapping " + what);
}

Mapping::~Mapping() { Driver::Get().cuMemUnmap(begin_, bytes_); }

std::vector<CUmemAccessDesc> AccessFor(const std::vector<int>& ordinals) {
  std::vector<CUmemAccessDesc> all;
  for (int ordinal : ordinals) {
    CUmemAccessDesc access{};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = ordinal;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    all.push_back(access);
  }
  return all;
}

size_t AllocatedBytes(int ordinal, size_t bytes, const std::string& what) {
  const CUmemAllocationProp prop = PropertiesOn(ordinal);
  size_t granularity = 0;
  Check(Driver::Get().cuMemGetAllocationGranularity(&granularity, &prop,
                                                    CU_MEM_ALLOC_GRANULARITY_MINIMUM),
        what);
  return (bytes + granularity - 1) / granularity * granularity;
}

std::shared_ptr<Mapping> Allocate(int ordinal, size_t bytes, const std::vector<int>& ordinals,
                                  const std::string& what, const Place& place) {
  const CUmemAllocationProp prop = PropertiesOn(ordinal);
  const size_t allocated = AllocatedBytes(ordinal, bytes, what);
  CUmemGenericAllocationHandle created;
  Check(Driver::Get().cuMemCreate(&created, allocated, &prop, 0), what);
  const AllocationHandle handle(created);
  auto mapping = std::make_shared<Mapping>(handle.get(), allocated, ordinals, what, place);
  const OwnStream stream(what);
  Check(cudaMemsetAsync(reinterpret_cast<void*>(mapping->begin()), 0, allocated, stream.get()),
        what);
  Check(cudaStreamSynchronize(stream.get()), what);
  return mapping;
}

Descriptor ExportAllocation(uint64_t begin, const std::string& what) {
  const Driver& driver = Driver::Get();
  CUmemGenericAllocationHandle retained;
  Check(driver.cuMemRetainAllocationHandle(&retained, reinterpret_cast<void*>(begin)), what);
  const AllocationHandle handle(retained);
  int fd = -1;
  Check(driver.cuMemExportToShareableHandle(&fd, handle.get(),
                                            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        what);
  return Descriptor(fd);
}

std::shared_ptr<Mapping> MapPeer(int64_t pid, int fd, size_t bytes,
                                 const std::vector<int>& ordinals, const std::string& what,
                                 const Place& place) {
  const Descriptor mine = TakeDescriptor(pid, fd);
  CUmemGenericAllocationHandle imported;
  Check(Driver::Get().cuMemImportFromShareableHandle(
            &imported, reinterpret_cast<void*>(static_cast<intptr_t>(mine.get())),
            CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "importing " + what);
  const AllocationHandle handle(imported);
  return std::make_shared<Mapping>(handle.get(), bytes, ordinals, what, place);
}

}  // namespace jax_ep
