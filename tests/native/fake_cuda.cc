// The functions of fake_cuda.h under CUDA's names.
#include "tests/native/fake_cuda.h"

#include <cstdio>

namespace fake_cuda {
namespace {

void* EntryPoint(const std::string& name) {
  static const std::map<std::string, void*> table = {
      {"cuGetErrorString", reinterpret_cast<void*>(&GetErrorString)},
      {"cuCtxGetCurrent", reinterpret_cast<void*>(&CtxGetCurrent)},
      {"cuCtxSetCurrent", reinterpret_cast<void*>(&CtxSetCurrent)},
      {"cuPointerGetAttribute", reinterpret_cast<void*>(&PointerGetAttribute)},
      {"cuMemPoolGetAccess", reinterpret_cast<void*>(&MemPoolGetAccess)},
      {"cuMemPoolSetAccess", reinterpret_cast<void*>(&MemPoolSetAccess)},
      {"cuMemGetAllocationGranularity", reinterpret_cast<void*>(&MemGetAllocationGranularity)},
      {"cuMemCreate", reinterpret_cast<void*>(&MemCreate)},
      {"cuMemRelease", reinterpret_cast<void*>(&MemRelease)},
      {"cuMemGetAddressRange", reinterpret_cast<void*>(&MemGetAddressRange)},
      {"cuMemRetainAllocationHandle", reinterpret_cast<void*>(&MemRetainAllocationHandle)},
      {"cuMemExportToShareableHandle", reinterpret_cast<void*>(&MemExportToShareableHandle)},
      {"cuMemImportFromShareableHandle", reinterpret_cast<void*>(&MemImportFromShareableHandle)},
      {"cuMemAddressReserve", reinterpret_cast<void*>(&MemAddressReserve)},
      {"cuMemAddressFree", reinterpret_cast<void*>(&MemAddressFree)},
      {"cuMemMap", reinterpret_cast<void*>(&MemMap)},
      {"cuMemSetAccess", reinterpret_cast<void*>(&MemSetAccess)},
      {"cuMemUnmap", reinterpret_cast<void*>(&MemUnmap)}};
  const auto it = table.find(name);
  return it == table.end() ? nullptr : it->second;
}

}  // namespace
}  // namespace fake_cuda

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** address, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *address = fake_cuda::EntryPoint(name);
  *result = cudaDriverEntryPointSuccess;
  return *address == nullptr ? cudaErrorInvalidValue : cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 132;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* possible, int, int) {
  *possible = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned int) {
  return cudaErrorPeerAccessAlreadyEnabled;
}
cudaError_t cudaDeviceSynchronize() {
  std::unique_lock<std::mutex> lock(fake_cuda::mutex);
  ++fake_cuda::num_waiting;
  fake_cuda::changed.notify_all();
  fake_cuda::changed.wait(lock, [] { return !fake_cuda::busy; });
  --fake_cuda::num_waiting;
  return fake_cuda::Status();
}
cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr attribute, int a, int b) {
  if (attribute != cudaDevP2PAttrNativeAtomicSupported) return cudaErrorInvalidValue;
  const auto& pairs = fake_cuda::without_atomics;
  a += fake_cuda::first_bus;
  b += fake_cuda::first_bus;
  *value = pairs.count({a, b}) + pairs.count({b, a}) == 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int ordinal) {
  std::snprintf(text, bytes, "0000:%02d:00.0", fake_cuda::first_bus + ordinal);
  return cudaSuccess;
}
// Processes see the devices on the buses from their first one on.
cudaError_t cudaDeviceGetByPCIBusId(int* ordinal, const char* text) {
  *ordinal = std::atoi(text + 5) - fake_cuda::first_bus;
  return *ordinal < 0 ? cudaErrorInvalidDevice : cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int) {
  static std::atomic<intptr_t> next{1};
  if (fake_cuda::recorded != nullptr && fake_cuda::capture_mode != cudaStreamCaptureModeRelaxed) {
    return cudaErrorStreamCaptureUnsupported;
  }
  *stream = reinterpret_cast<cudaStream_t>(next++);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const bool is_recorded = stream != nullptr && stream == fake_cuda::recorded;
  *status = is_recorded ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, fake_cuda::capture_mode);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMemset(void* at, int value, size_t bytes) {
  if (fake_cuda::Status() == cudaSuccess) std::memset(at, value, bytes);
  return fake_cuda::Status();
}
cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(at, value, bytes);
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  fake_cuda::last_copied_on = stream;
  if (stream != nullptr && stream == fake_cuda::recorded) return cudaSuccess;
  if (fake_cuda::Status() == cudaSuccess) std::memcpy(to, from, bytes);
  return fake_cuda::Status();
}
cudaError_t cudaHostAlloc(void** at, size_t bytes, unsigned int) {
  *at = std::calloc(1, bytes);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* at) {
  std::free(at);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned int) {
  *device = host;
  return cudaSuccess;
}

}  // extern "C"
