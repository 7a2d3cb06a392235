#include "xla_ffi/memory/sharing.h"

#include <cuda.h>

#include <iterator>

#include "xla_ffi/memory/driver.h"
#include "xla_ffi/memory/mapping.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {
namespace {

constexpr size_t kMostRemembered = 4096;  // allocations; more are forgotten, and shared again

}  // namespace

std::optional<std::string> SharedAllocations::Share(uint64_t address, size_t bytes) {
  if (ordinals_.size() < 2) return std::nullopt;
  const Driver& driver = Driver::Get();
  std::lock_guard<std::mutex> lock(mutex_);
  for (uint64_t at = address; at < address + bytes;) {
    unsigned long long id = 0;
    if (const CUresult r = driver.cuPointerGetAttribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, at);
        r != CUDA_SUCCESS) {
      return "cuPointerGetAttribute: " + driver.Text(r);
    }
    const auto next = shared_.upper_bound(at);
    if (next != shared_.begin()) {
      const Allocation& known = std::prev(next)->second;
      if (at < known.end && known.id == id) {
        at = known.end;
        continue;
      }
    }
    CUdeviceptr begin = 0;
    size_t size = 0;
    if (const CUresult r = driver.cuMemGetAddressRange(&begin, &size, at); r != CUDA_SUCCESS) {
      return "cuMemGetAddressRange: " + driver.Text(r);
    }
    if (auto problem = GiveAccess(begin, size)) return problem;
    if (id != 0) Remember(begin, {begin + size, id});
    at = begin + size;
  }
  return std::nullopt;
}

std::optional<std::string> SharedAllocations::GiveAccess(uint64_t begin, size_t bytes) const {
  const Driver& driver = Driver::Get();
  const std::vector<CUmemAccessDesc> access = AccessFor(ordinals_);
  CUmemGenericAllocationHandle handle;
  if (driver.cuMemRetainAllocationHandle(&handle, reinterpret_cast<void*>(begin)) == CUDA_SUCCESS) {
    driver.cuMemRelease(handle);
    if (const CUresult r = driver.cuMemSetAccess(begin, bytes, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemSetAccess on XLA's memory: " + driver.Text(r);
    }
    return std::nullopt;
  }
  CUmemoryPool pool = nullptr;
  if (driver.cuPointerGetAttribute(&pool, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, begin) !=
          CUDA_SUCCESS ||
      pool == nullptr) {
    return std::nullopt;  // other memory (cudaMalloc) needs no more than the peer access of Setup
  }
  for (const CUmemAccessDesc& wanted : access) {
    CUmemLocation location = wanted.location;
    CUmemAccess_flags flags = CU_MEM_ACCESS_FLAGS_PROT_NONE;
    if (driver.cuMemPoolGetAccess(&flags, pool, &location) == CUDA_SUCCESS &&
        flags == wanted.flags) {
      continue;  // as of every allocation of a pool but the first
    }
    if (const CUresult r = driver.cuMemPoolSetAccess(pool, access.data(), access.size());
        r != CUDA_SUCCESS) {
      return "cuMemPoolSetAccess on XLA's memory: " + driver.Text(r);
    }
    break;
  }
  return std::nullopt;
}

void SharedAllocations::Remember(uint64_t begin, const Allocation& allocation) {
  if (shared_.size() >= kMostRemembered) shared_.clear();
  // What was there is gone.
  auto it = shared_.upper_bound(begin);
  if (it != shared_.begin() && std::prev(it)->second.end > begin) --it;
  while (it != shared_.end() && it->first < allocation.end) it = shared_.erase(it);
  shared_[begin] = allocation;
}

std::optional<std::string> SymmetricMemory::Share(int ordinal, const void* pointer, size_t bytes,
                                                  bool with_other_processes) {
  const auto address = reinterpret_cast<uint64_t>(pointer);
  std::shared_ptr<SharedAllocations> shared;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const Device* device = FindLocal(ordinal);
    if (device == nullptr) return "CUDA device " + std::to_string(ordinal) + " was not set up";
    if (staged_only_) return "JAX_EP_PATH=staged";
    // What XLA allocates later peers do not map: their hosts would have to wait in the midst of a
    // call for this one's to show it, and the kernels to know more than one shift (PeerView).
    if (with_other_processes &&
        !(device->pool_begin <= address && address + bytes <= device->pool_end)) {
      if (!pool_problem_.empty()) return pool_problem_;
      return "it lies outside the part of XLA's memory that the other processes have mapped: XLA "
             "has allocated it after jax_ep.initialize(), or apart from its pool. With XLA's "
             "default allocator XLA_PYTHON_CLIENT_PREALLOCATE=true prevents that";
    }
    shared = device->shared;
  }
  // Without that lock, since other devices' calls must get through meanwhile.
  return shared->Share(address, bytes);
}

}  // namespace jax_ep
