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

// Work over all (source rank, token) pairs of the group, in an order that mixes the sources, so
// that the links and the local memory are busy from beginning to end. Ranks begin with different
// sources.
struct TokenOrder {
  int32_t num_ranks, num_tokens, rank;

  // Source rank * T + token of the pair at `position` in [0, num_ranks * num_tokens).
  __device__ int32_t flat_token(int32_t position) const {
    const int32_t token = position / num_ranks;
    const int32_t src = (position + rank) % num_ranks;
    return src * num_tokens + token;
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_KERNELS_KERNELS_CUH_
