// What the CUDA handlers share: the state of a call site, and the view of its group.
#ifndef JAX_EP_XLA_FFI_CALL_SITE_CUDA_H_
#define JAX_EP_XLA_FFI_CALL_SITE_CUDA_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/symmetric_memory.h"

namespace jax_ep {

// One per call site and executable, shared by the process's devices.
struct CudaSiteState {
  static xla::ffi::TypeId id;
  const char* op;
  int num_ranks;
  std::vector<int64_t> members;  // as the attribute
  uint64_t operation;            // hash of the operation and its attributes
};

void SetCudaTimeout(uint64_t nanoseconds);

xla::ffi::ErrorOr<std::unique_ptr<CudaSiteState>> MakeCudaSite(
    const char* op, int64_t num_ranks, xla::ffi::Span<const int64_t> members,
    std::initializer_list<int64_t> static_values);

// A buffer that peers read or write during the call.
struct SharedBuffer {
  const char* name;
  const void* data;
  size_t bytes;
};

// Fills the group's view for the device, after making the buffers reachable.
xla::ffi::Error EnterGroup(const CudaSiteState& state, int32_t ordinal,
                           std::initializer_list<SharedBuffer> buffers, gpu::GroupView* view);

// SMs that a call uses, of `wanted` ones (0: all).
int NumSms(int32_t ordinal, int64_t wanted);

inline xla::ffi::Error CudaStatus(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return xla::ffi::Error::Success();
  return {xla::ffi::ErrorCode::kInternal, std::string(op) + ": " + cudaGetErrorString(status)};
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CALL_SITE_CUDA_H_
