// What the kernel files share besides the protocol.
#ifndef JAX_EP_CUDA_KERNELS_KERNELS_CUH_
#define JAX_EP_CUDA_KERNELS_KERNELS_CUH_

#include <cstdint>

#include "cuda/launch.h"

namespace jax_ep::gpu {

cudaError_t PrepareLayout();
cudaError_t PrepareDispatch();
cudaError_t PrepareCombine();

// Loads a kernel on the current device and allows it `shared_bytes` of dynamic shared memory.
template <typename Kernel>
cudaError_t PrepareKernel(Kernel kernel, int64_t shared_bytes) {
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared_bytes));
}

// The runs of equal tokens in recv_order. A token's kept rows on this rank are one run of slots.
struct Slots {
  const int32_t* recv_order;
  const int32_t* recv_src;
  int32_t num_slots;
  int32_t top_k;

  __device__ int32_t row(int32_t slot) const { return recv_order[slot]; }
  __device__ int32_t flat_token(int32_t slot) const { return recv_src[recv_order[slot]] / top_k; }

  // The first slot >= `slot` that begins a token (num_slots if none does). By a whole warp.
  __device__ int32_t token_begin(int32_t slot) const {
    const int32_t lane = threadIdx.x % 32;
    for (int32_t at = slot;; at += 32) {
      const int32_t s = at + lane;
      const bool begins = s >= num_slots || s == 0 || flat_token(s) != flat_token(s - 1);
      const uint32_t mask = __ballot_sync(0xffffffffu, begins);
      if (mask != 0) return min(num_slots, at + __ffs(static_cast<int>(mask)) - 1);
    }
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_KERNELS_KERNELS_CUH_
