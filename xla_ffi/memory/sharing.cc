// How buffers in XLA's memory become reachable for peers.
#include <cuda.h>

#include <iterator>

#include "xla_ffi/memory/driver.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {

std::optional<std::string> SymmetricMemory::Share(int ordinal, const void* pointer, size_t bytes,
                                                  bool with_other_processes) {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  std::lock_guard<std::mutex> lock(mutex_);
  Device* device = FindLocal(ordinal);
  if (device == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
  if (staged_only_) return "JAX_EP_PATH=staged";
  if (with_other_processes &&
      !(device->pool_begin <= address && address + bytes <= device->pool_end)) {
    if (!pool_problem_.empty()) return pool_problem_;
    return "it lies outside the part of XLA's memory that the other processes have mapped: the "
           "pool has grown since jax_ep.initialize(), which XLA_PYTHON_CLIENT_PREALLOCATE=true "
           "prevents";
  }
  const auto it = device->shared.upper_bound(address);
  if (it != device->shared.begin() && address + bytes <= std::prev(it)->second) return std::nullopt;
  return ShareLocally(device, address);
}

std::optional<std::string> SymmetricMemory::ShareLocally(Device* device, uint64_t address) {
  if (devices_.size() < 2) return std::nullopt;
  const Driver& driver = Driver::Get();
  CUdeviceptr begin = 0;
  size_t size = 0;
  if (const CUresult r = driver.cuMemGetAddressRange(&begin, &size, address); r != CUDA_SUCCESS) {
    return "cuMemGetAddressRange: " + driver.Text(r);
  }
  const std::vector<CUmemAccessDesc> access = AccessFor(Ordinals());
  CUmemGenericAllocationHandle handle;
  CUmemoryPool pool = nullptr;
  if (driver.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(begin)) == CUDA_SUCCESS) {
    driver.cuMemRelease(handle);
    if (const CUresult r = driver.cuMemSetAccess(begin, size, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemSetAccess on XLA's memory: " + driver.Text(r);
    }
  } else if (driver.cuPointerGetAttribute(&pool, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, address) ==
                 CUDA_SUCCESS &&
             pool != nullptr) {
    if (const CUresult r = driver.cuMemPoolSetAccess(pool, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemPoolSetAccess on XLA's memory: " + driver.Text(r);
    }
  }
  // Other memory (cudaMalloc) needs no more than the peer access of Setup.
  device->shared[begin] = begin + size;
  return std::nullopt;
}

}  // namespace jax_ep
