// CUDA's driver as the wire needs it, loaded where the process has it. Nothing here waits for a kernel:
// a kernel of this process may wait for what the wire brings.
#ifndef JAX_EP_TESTS_NATIVE_WIRE_DRIVER_H_
#define JAX_EP_TESTS_NATIVE_WIRE_DRIVER_H_

#include <cuda.h>

#include <cstddef>

namespace jax_ep::wire {

// Ends the process: what it says went wrong in a test's network is no error that a user could get.
[[noreturn]] __attribute__((format(printf, 1, 2))) void Die(const char* format, ...);

class Driver {
 public:
  // Of the context that is current at the first call. Never destroyed.
  static Driver& Get();

  bool has_context() const { return context_ != nullptr; }
  void MakeCurrent() const { Check(set_current_(context_), "cuCtxSetCurrent"); }
  bool IsDeviceMemory(const void* pointer) const;
  // The allocation that has the pointer, and its handle. Ends the process if it has none.
  CUdeviceptr Export(const void* pointer, CUipcMemHandle* handle) const;
  char* Import(const CUipcMemHandle& handle) const;
  void Close(char* imported) const;
  char* AllocatePinned(size_t num_bytes) const;
  CUstream MakeStream() const;
  CUevent MakeEvent() const;
  void Copy(void* to, const void* from, size_t num_bytes, CUstream stream) const;
  void CopyAndWait(void* to, const void* from, size_t num_bytes, CUstream stream) const;
  void Record(CUevent event, CUstream stream) const { Check(record_(event, stream), "record"); }
  bool IsDone(CUevent event) const;

 private:
  Driver();
  static void Check(CUresult result, const char* what) {
    if (result != CUDA_SUCCESS) Die("%s: CUresult %d", what, static_cast<int>(result));
  }

  CUcontext context_ = nullptr;
  CUresult (*set_current_)(CUcontext) = nullptr;
  CUresult (*attribute_)(void*, CUpointer_attribute, CUdeviceptr) = nullptr;
  CUresult (*range_)(CUdeviceptr*, size_t*, CUdeviceptr) = nullptr;
  CUresult (*export_)(CUipcMemHandle*, CUdeviceptr) = nullptr;
  CUresult (*import_)(CUdeviceptr*, CUipcMemHandle, unsigned) = nullptr;
  CUresult (*close_)(CUdeviceptr) = nullptr;
  CUresult (*make_stream_)(CUstream*, unsigned) = nullptr;
  CUresult (*synchronize_)(CUstream) = nullptr;
  CUresult (*copy_)(CUdeviceptr, CUdeviceptr, size_t, CUstream) = nullptr;
  CUresult (*make_event_)(CUevent*, unsigned) = nullptr;
  CUresult (*record_)(CUevent, CUstream) = nullptr;
  CUresult (*query_)(CUevent) = nullptr;
  CUresult (*allocate_pinned_)(void**, size_t, unsigned) = nullptr;
};

}  // namespace jax_ep::wire

#endif  // JAX_EP_TESTS_NATIVE_WIRE_DRIVER_H_
