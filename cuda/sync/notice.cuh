// notice: what a kernel tells its host of that is no error. The host says it once, in words
// (xla_ffi/memory/watch.cc).
#ifndef JAX_EP_CUDA_SYNC_NOTICE_CUH_
#define JAX_EP_CUDA_SYNC_NOTICE_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

// By one thread of each call that makes a layout, with what it writes to counters[2]; `rank` is of the
// whole group.
__device__ inline void tell_of_invalid_ids(const GroupView& g, int32_t rank, int64_t num_experts,
                                           int32_t num_invalid) {
  if (num_invalid == 0) return;
  st_relaxed_sys(&g.error->invalid_ids,
                 invalid_ids_of(rank, static_cast<int32_t>(num_experts), num_invalid));
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_NOTICE_CUH_
