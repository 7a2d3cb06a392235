// hop_wait: what the waits of a hop's calls ask, in a call of a group: whether they may go on, as all
// waits of the group's kernels (cuda/sync/give_up.cuh).
#ifndef JAX_EP_CUDA_NETWORK_HOP_WAIT_CUH_
#define JAX_EP_CUDA_NETWORK_HOP_WAIT_CUH_

#include "cuda/launch.h"
#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu {

// By each thread of a warp, for all its waits for the device of one slot.
class HopWait {
 public:
  __device__ HopWait(const GroupView& g, OpKind kind, int slot) : wait_(g, kind), slot_(slot) {}

  // Before a wait: what it is for, as the error record will say it.
  __device__ HopWait& until(uint32_t phase, uint64_t expected) {
    wait_.restart();
    phase_ = phase;
    expected_ = expected;
    return *this;
  }
  __device__ bool operator()(uint64_t seen) {
    return wait_.may_go_on(slot_, phase_, expected_, seen);
  }

 private:
  Wait wait_;
  const int slot_;
  uint32_t phase_ = kProgress;
  uint64_t expected_ = 0;
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_HOP_WAIT_CUH_
