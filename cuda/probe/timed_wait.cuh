// A wait that ends: for kernels outside the protocol of a group (give_up.cuh has those).
#ifndef JAX_EP_CUDA_PROBE_TIMED_WAIT_CUH_
#define JAX_EP_CUDA_PROBE_TIMED_WAIT_CUH_

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

// Calls `done` until it returns true. False if that takes longer than `timeout_ns`. The clock is
// read every 64th time, so that a short wait does not pay for it.
template <typename Done>
__device__ inline bool wait_until(const Done& done, uint64_t timeout_ns) {
  uint64_t start = 0;
  for (uint32_t i = 1; !done(); ++i) {
    if ((i & 63u) != 0) continue;
    const uint64_t now = globaltimer_ns();
    if (start == 0) start = now;
    if (now - start > timeout_ns) return false;
  }
  return true;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_PROBE_TIMED_WAIT_CUH_
