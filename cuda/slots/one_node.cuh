// Kernels in slots are templates over how ranks are reached that are not on this node: for a group
// that lies on one node there are none, and this is all there is to it. cuda/network/slots.cuh is for
// the others; what it has besides is called where Far::kExists alone.
#ifndef JAX_EP_CUDA_SLOTS_ONE_NODE_CUH_
#define JAX_EP_CUDA_SLOTS_ONE_NODE_CUH_

#include "cuda/core/operations.h"
#include "cuda/launch.h"

namespace jax_ep::gpu::slots {

struct OneNode {
  // A thread's, in a call.
  struct Far {
    static constexpr bool kExists = false;
    __device__ Far(const GroupView&, const OneNode&, OpKind) {}

    // This rank and their number, in the whole group.
    __device__ static int rank(const GroupView& g) { return g.rank; }
    __device__ static int num_ranks(const GroupView& g) { return g.num_ranks; }
    // Whether a rank is of another node; else its number in GroupView.
    __device__ static bool is_far(int) { return false; }
    __device__ static int index(int rank) { return rank; }
  };
};

}  // namespace jax_ep::gpu::slots

#endif  // JAX_EP_CUDA_SLOTS_ONE_NODE_CUH_
