// As much of CUDA as xla_ffi/memory and xla_ffi/cuda/call_site.cc call, in host memory: for tests
// without a GPU. An allocation is a memfd, so its descriptors cross process borders and its
// memory lives as long as somebody maps it, as a GPU's does; an access without cuMemSetAccess, or
// after cuMemUnmap, ends the program. The functions themselves are in fake_cuda.cc.
#ifndef JAX_EP_TESTS_NATIVE_FAKE_CUDA_H_
#define JAX_EP_TESTS_NATIVE_FAKE_CUDA_H_

#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>

namespace fake_cuda {

struct Allocation {
  int fd;
  size_t bytes;
  int num_holders;  // handles and mappings
};

struct Mapped {
  CUmemGenericAllocationHandle handle;
  size_t bytes;
  unsigned long long id;     // no other mapping ever has it
  std::set<int> ordinals{};  // devices that may use it
};

inline std::mutex mutex;
inline std::map<CUmemGenericAllocationHandle, Allocation> allocations;
inline std::map<CUdeviceptr, Mapped> mappings;
inline CUmemGenericAllocationHandle next_handle = 1;
inline unsigned long long next_id = 1;
inline int num_driver_calls = 0;        // about addresses
inline size_t most_bytes = ~size_t{0};  // that some devices have for one allocation:
inline int first_small_device = 0;      // from this one on
inline std::condition_variable changed;
inline bool busy = false;                // devices have work that does not end
inline int num_waiting = 0;              // threads that wait for it
inline std::atomic<bool> broken{false};  // every runtime call on a device fails
inline cudaStream_t recorded = nullptr;  // a stream that is captured: it executes nothing
inline cudaStream_t last_copied_on = nullptr;
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeThreadLocal;
inline std::set<std::pair<int, int>> without_atomics;  // pairs of devices, by PCI bus
inline int first_bus = 0;                              // device i is on the bus first_bus + i
inline constexpr size_t kGranularity = size_t{2} << 20;

inline void SetBusy(bool value) {
  std::lock_guard<std::mutex> lock(mutex);
  busy = value;
  changed.notify_all();
}

// Until a thread waits for devices that are busy; false if none does for a long time.
inline bool AwaitWaiting() {
  std::unique_lock<std::mutex> lock(mutex);
  return changed.wait_for(lock, std::chrono::seconds(30), [] { return num_waiting > 0; });
}

inline cudaError_t Status() { return broken ? cudaErrorLaunchFailure : cudaSuccess; }

inline std::map<CUdeviceptr, Mapped>::iterator Find(CUdeviceptr address) {
  auto it = mappings.upper_bound(address);
  if (it == mappings.begin()) return mappings.end();
  --it;
  return address < it->first + it->second.bytes ? it : mappings.end();
}

// Whether a device may use all of [address, address + bytes).
inline bool Reaches(int ordinal, CUdeviceptr address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  for (CUdeviceptr at = address; at < address + bytes;) {
    const auto it = Find(at);
    if (it == mappings.end() || it->second.ordinals.count(ordinal) == 0) return false;
    at = it->first + it->second.bytes;
  }
  return true;
}

// Of all allocations that this process holds.
inline size_t HeldBytes() {
  std::lock_guard<std::mutex> lock(mutex);
  size_t bytes = 0;
  for (const auto& [handle, allocation] : allocations) bytes += allocation.bytes;
  return bytes;
}

inline void Drop(CUmemGenericAllocationHandle handle) {
  Allocation& allocation = allocations.at(handle);
  if (--allocation.num_holders > 0) return;
  close(allocation.fd);
  allocations.erase(handle);
}

inline CUresult GetErrorString(CUresult, const char** text) {
  *text = "a fake error";
  return CUDA_SUCCESS;
}
inline CUresult CtxGetCurrent(CUcontext* context) {
  *context = nullptr;
  return CUDA_SUCCESS;
}
inline CUresult CtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
inline CUresult PointerGetAttribute(void* data, CUpointer_attribute attribute,
                                    CUdeviceptr address) {
  std::lock_guard<std::mutex> lock(mutex);
  ++num_driver_calls;
  if (attribute == CU_POINTER_ATTRIBUTE_BUFFER_ID) {
    const auto it = Find(address);
    *static_cast<unsigned long long*>(data) = it == mappings.end() ? 0 : it->second.id;
  } else {
    *static_cast<CUmemoryPool*>(data) = nullptr;
  }
  return CUDA_SUCCESS;
}
inline CUresult MemPoolGetAccess(CUmemAccess_flags*, CUmemoryPool, CUmemLocation*) {
  return CUDA_ERROR_INVALID_VALUE;
}
inline CUresult MemPoolSetAccess(CUmemoryPool, const CUmemAccessDesc*, size_t) {
  return CUDA_ERROR_INVALID_VALUE;
}
inline CUresult MemGetAllocationGranularity(size_t* bytes, const CUmemAllocationProp*,
                                            CUmemAllocationGranularity_flags) {
  *bytes = kGranularity;
  return CUDA_SUCCESS;
}
inline CUresult MemCreate(CUmemGenericAllocationHandle* handle, size_t bytes,
                          const CUmemAllocationProp* prop, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  if (bytes == 0 || bytes % kGranularity != 0) return CUDA_ERROR_INVALID_VALUE;
  if (bytes > most_bytes && prop->location.id >= first_small_device) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  const int fd = memfd_create("fake_cuda", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) return CUDA_ERROR_OUT_OF_MEMORY;
  *handle = next_handle++;
  allocations[*handle] = {fd, bytes, 1};
  return CUDA_SUCCESS;
}
inline CUresult MemRelease(CUmemGenericAllocationHandle handle) {
  std::lock_guard<std::mutex> lock(mutex);
  Drop(handle);
  return CUDA_SUCCESS;
}
inline CUresult MemGetAddressRange(CUdeviceptr* begin, size_t* bytes, CUdeviceptr address) {
  std::lock_guard<std::mutex> lock(mutex);
  ++num_driver_calls;
  const auto it = Find(address);
  *begin = it == mappings.end() ? address : it->first;
  *bytes = it == mappings.end() ? 1 << 20 : it->second.bytes;
  return CUDA_SUCCESS;
}
// Memory that no cuMemMap made, as with the allocator cuda_async, cannot be exported.
inline CUresult MemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  std::lock_guard<std::mutex> lock(mutex);
  ++num_driver_calls;
  const auto it = Find(reinterpret_cast<CUdeviceptr>(address));
  if (it == mappings.end()) return CUDA_ERROR_INVALID_VALUE;
  *handle = it->second.handle;
  ++allocations.at(*handle).num_holders;
  return CUDA_SUCCESS;
}
inline CUresult MemExportToShareableHandle(void* fd, CUmemGenericAllocationHandle handle,
                                           CUmemAllocationHandleType, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  *static_cast<int*>(fd) = dup(allocations.at(handle).fd);
  return CUDA_SUCCESS;
}
inline CUresult MemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* fd,
                                             CUmemAllocationHandleType) {
  std::lock_guard<std::mutex> lock(mutex);
  struct stat st{};
  const int mine = dup(static_cast<int>(reinterpret_cast<intptr_t>(fd)));
  if (mine < 0 || fstat(mine, &st) != 0) return CUDA_ERROR_INVALID_VALUE;
  *handle = next_handle++;
  allocations[*handle] = {mine, static_cast<size_t>(st.st_size), 1};
  return CUDA_SUCCESS;
}
inline CUresult MemAddressReserve(CUdeviceptr* address, size_t bytes, size_t, CUdeviceptr,
                                  unsigned long long) {
  void* at = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *address = reinterpret_cast<CUdeviceptr>(at);
  return at == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
inline CUresult MemAddressFree(CUdeviceptr address, size_t bytes) {
  munmap(reinterpret_cast<void*>(address), bytes);
  return CUDA_SUCCESS;
}
inline CUresult MemMap(CUdeviceptr address, size_t bytes, size_t,
                       CUmemGenericAllocationHandle handle, unsigned long long) {
  std::lock_guard<std::mutex> lock(mutex);
  Allocation& allocation = allocations.at(handle);
  if (bytes != allocation.bytes) return CUDA_ERROR_INVALID_VALUE;
  if (mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED,
           allocation.fd, 0) == MAP_FAILED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  ++allocation.num_holders;
  mappings[address] = {handle, bytes, next_id++};
  return CUDA_SUCCESS;
}
inline CUresult MemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc* access,
                             size_t count) {
  std::lock_guard<std::mutex> lock(mutex);
  ++num_driver_calls;
  const auto it = mappings.find(address);
  if (it == mappings.end() || it->second.bytes != bytes) return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < count; ++i) it->second.ordinals.insert(access[i].location.id);
  return mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | PROT_WRITE) == 0
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}
inline CUresult MemUnmap(CUdeviceptr address, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto it = mappings.find(address);
  if (it == mappings.end() || it->second.bytes != bytes) return CUDA_ERROR_INVALID_VALUE;
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  Drop(it->second.handle);
  mappings.erase(it);
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda

#endif  // JAX_EP_TESTS_NATIVE_FAKE_CUDA_H_
