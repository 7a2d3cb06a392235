#include "tests/native/wire/driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <type_traits>

namespace jax_ep::wire {
namespace {

CUdeviceptr AddressOf(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

void Die(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "wire: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  std::fflush(stderr);
  _exit(97);
}

Driver& Driver::Get() {
  static Driver* const driver = new Driver;
  return *driver;
}

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == nullptr) return;
  CUresult (*current)(CUcontext*) = nullptr;
  const auto load = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) Die("libcuda has no %s", name);
  };
  load(current, "cuCtxGetCurrent");
  load(set_current_, "cuCtxSetCurrent");
  load(attribute_, "cuPointerGetAttribute");
  load(range_, "cuMemGetAddressRange_v2");
  load(export_, "cuIpcGetMemHandle");
  load(import_, "cuIpcOpenMemHandle_v2");
  load(close_, "cuIpcCloseMemHandle");
  load(make_stream_, "cuStreamCreate");
  load(synchronize_, "cuStreamSynchronize");
  load(copy_, "cuMemcpyAsync");
  load(make_event_, "cuEventCreate");
  load(record_, "cuEventRecord");
  load(query_, "cuEventQuery");
  load(allocate_pinned_, "cuMemHostAlloc");
  if (current(&context_) != CUDA_SUCCESS) context_ = nullptr;
}

bool Driver::IsDeviceMemory(const void* pointer) const {
  unsigned type = 0;
  return has_context() &&
         attribute_(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, AddressOf(pointer)) == CUDA_SUCCESS &&
         type == CU_MEMORYTYPE_DEVICE;
}

CUdeviceptr Driver::Export(const void* pointer, CUipcMemHandle* handle) const {
  CUdeviceptr allocation = 0;
  size_t num_bytes = 0;
  Check(range_(&allocation, &num_bytes, AddressOf(pointer)), "cuMemGetAddressRange");
  Check(export_(handle, allocation), "cuIpcGetMemHandle (is NVSHMEM_DISABLE_CUDA_VMM=1 set?)");
  return allocation;
}

char* Driver::Import(const CUipcMemHandle& handle) const {
  CUdeviceptr mapped = 0;
  Check(import_(&mapped, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS), "cuIpcOpenMemHandle");
  return reinterpret_cast<char*>(mapped);
}

void Driver::Close(char* imported) const {
  Check(close_(AddressOf(imported)), "cuIpcCloseMemHandle");
}

char* Driver::AllocatePinned(size_t num_bytes) const {
  void* memory = nullptr;
  Check(allocate_pinned_(&memory, num_bytes, CU_MEMHOSTALLOC_PORTABLE), "cuMemHostAlloc");
  return static_cast<char*>(memory);
}

CUstream Driver::MakeStream() const {
  CUstream stream = nullptr;
  Check(make_stream_(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  return stream;
}

CUevent Driver::MakeEvent() const {
  CUevent event = nullptr;
  Check(make_event_(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
  return event;
}

void Driver::Copy(void* to, const void* from, size_t num_bytes, CUstream stream) const {
  Check(copy_(AddressOf(to), AddressOf(from), num_bytes, stream), "cuMemcpyAsync");
}

void Driver::CopyAndWait(void* to, const void* from, size_t num_bytes, CUstream stream) const {
  Copy(to, from, num_bytes, stream);
  Check(synchronize_(stream), "cuStreamSynchronize");
}

bool Driver::IsDone(CUevent event) const {
  const CUresult result = query_(event);
  if (result != CUDA_ERROR_NOT_READY) Check(result, "a copy");
  return result == CUDA_SUCCESS;
}

}  // namespace jax_ep::wire
