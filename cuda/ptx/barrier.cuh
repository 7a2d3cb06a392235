// Barriers of some of a block's warps.
#ifndef JAX_EP_CUDA_PTX_BARRIER_CUH_
#define JAX_EP_CUDA_PTX_BARRIER_CUH_

namespace jax_ep::gpu {

// By whole warps, `num_threads` in all, whose lanes may come one after the other; 0 is the barrier of
// __syncthreads, there are 16.
__device__ inline void barrier_sync(int barrier, int num_threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_PTX_BARRIER_CUH_
