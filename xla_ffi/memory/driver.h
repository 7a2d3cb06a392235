// CUDA for the host: errors as exceptions, the driver's functions, the current device.
#ifndef JAX_EP_XLA_FFI_MEMORY_DRIVER_H_
#define JAX_EP_XLA_FFI_MEMORY_DRIVER_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <new>
#include <stdexcept>
#include <string>

namespace jax_ep {

// Of every error.
inline constexpr char kPrefix[] = "jax_ep: ";

// Of a device.
class OutOfMemory : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws std::runtime_error.
[[noreturn]] void Throw(const std::string& what);
// Likewise, OutOfMemory if that is the status.
void Check(cudaError_t status, const std::string& what);
void Check(CUresult status, const std::string& what);

std::string OnDevice(int ordinal);

// Whether a device can use atomic operations on the memory of another one, as the kernels do to
// leave it (cuda/sync/leave.cuh).
bool HasAtomics(int ordinal, int other);

// The driver's functions by name: machines that build or import this may have no driver.
struct Driver {
#define JAX_EP_DRIVER(name) decltype(::name)* name = Load<decltype(::name)>(#name)
  JAX_EP_DRIVER(cuGetErrorString);
  JAX_EP_DRIVER(cuCtxGetCurrent);
  JAX_EP_DRIVER(cuCtxSetCurrent);
  JAX_EP_DRIVER(cuPointerGetAttribute);
  JAX_EP_DRIVER(cuMemPoolGetAccess);
  JAX_EP_DRIVER(cuMemPoolSetAccess);
  JAX_EP_DRIVER(cuMemGetAllocationGranularity);
  JAX_EP_DRIVER(cuMemCreate);
  JAX_EP_DRIVER(cuMemGetAddressRange);
  JAX_EP_DRIVER(cuMemSetAccess);
  JAX_EP_DRIVER(cuMemRetainAllocationHandle);
  JAX_EP_DRIVER(cuMemExportToShareableHandle);
  JAX_EP_DRIVER(cuMemImportFromShareableHandle);
  JAX_EP_DRIVER(cuMemAddressReserve);
  JAX_EP_DRIVER(cuMemAddressFree);
  JAX_EP_DRIVER(cuMemMap);
  JAX_EP_DRIVER(cuMemUnmap);
  JAX_EP_DRIVER(cuMemRelease);
#undef JAX_EP_DRIVER

  static const Driver& Get();

  std::string Text(CUresult result) const;

 private:
  static void* Address(const char* name);
  template <typename Fn>
  static Fn* Load(const char* name) {
    return reinterpret_cast<Fn*>(Address(name));
  }
};

// Makes a device current on this thread; restores what was, without making a context for it.
class DeviceScope {
 public:
  explicit DeviceScope(int ordinal);
  DeviceScope(int ordinal, std::nothrow_t);  // for destructors
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  CUcontext saved_ = nullptr;
};

// A stream for work of set-up on the current device. To wait for the device instead would break
// what another thread is recording for a command buffer there, and wait for all that runs.
class OwnStream {
 public:
  explicit OwnStream(const std::string& what) {
    Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), what);
  }
  ~OwnStream() { cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

// Lets this thread make calls into CUDA that it may not make while it records a stream (a capture).
class AnyCallScope {
 public:
  AnyCallScope() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AnyCallScope() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AnyCallScope(const AnyCallScope&) = delete;
  AnyCallScope& operator=(const AnyCallScope&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one before
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MEMORY_DRIVER_H_
