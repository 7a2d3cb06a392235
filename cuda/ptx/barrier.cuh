// Barriers of some of a block's warps.
#ifndef JAX_EP_CUDA_PTX_BARRIER_CUH_
#define JAX_EP_CUDA_PTX_BARRIER_CUH_

namespace jax_ep::gpu {

// By whole warps, `num_threads` in all; 0 is that of __syncthreads, there are 16.
__device__ inline void bar_sync(int barrier, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_PTX_BARRIER_CUH_
