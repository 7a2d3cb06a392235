// What handlers share of their kernels' launches, once a call is decoded and checked.
#ifndef JAX_EP_XLA_FFI_CUDA_LAUNCHES_H_
#define JAX_EP_XLA_FFI_CUDA_LAUNCHES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/slots/fits.h"
#include "xla_ffi/calls.h"
#include "xla_ffi/cuda/call_site.h"

namespace jax_ep {

inline gpu::SlotSizes SlotSizesOf(const TableSizes& sizes, const gpu::SlotRow& row) {
  return {sizes.num_ranks, sizes.num_tokens, sizes.top_k, sizes.num_experts, row};
}

// On the buffers that the call has.
gpu::LayoutArguments LayoutArgumentsOf(const LayoutCall& call);

// Layout and dispatch by their own kernels, for their handlers and for that of both: each enters the
// group and launches. `num_sms`: as in the attributes.
xla::ffi::Error LaunchLayout(const CudaSiteState& state, int32_t ordinal, cudaStream_t stream,
                             const LayoutCall& call, int64_t num_sms);
xla::ffi::Error LaunchDispatch(const CudaSiteState& state, int32_t ordinal, cudaStream_t stream,
                               const DispatchCall& call, int64_t num_sms);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_LAUNCHES_H_
