// names: how ranks of a group across nodes are named in waits and records (control.h, slots).
#ifndef JAX_EP_CUDA_NETWORK_NAMES_CUH_
#define JAX_EP_CUDA_NETWORK_NAMES_CUH_

#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu {

// The rank of the whole group that is the first one of this node.
__device__ inline int32_t first_rank_of_node(const GroupView& g) { return g.nodes.rank - g.rank; }

// Of a rank of the whole group: as waits and records name it.
template <typename Hop>
__device__ int slot_of_rank(const GroupView& g, const Hop& hop, int32_t rank) {
  const int32_t index = rank - first_rank_of_node(g);
  return index >= 0 && index < g.num_ranks ? slot_of(g, index)
                                           : slot_of_process(hop.process_of(rank));
}

// As other nodes name the device of a slot.
template <typename Hop>
__device__ int slot_elsewhere(const GroupView& g, const Hop& hop, int slot) {
  if (slot >= kMaxPeers) return slot;
  int32_t index = g.rank;
  for (int32_t i = 0; i < g.num_ranks; ++i) {
    if (slot_of(g, i) == slot) index = i;
  }
  return slot_of_process(hop.process_of(first_rank_of_node(g) + index));
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_NAMES_CUH_
