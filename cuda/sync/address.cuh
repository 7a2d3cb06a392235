// address: what a rank shows its peers for an address of its memory, and what they make of it.
#ifndef JAX_EP_CUDA_SYNC_ADDRESS_CUH_
#define JAX_EP_CUDA_SYNC_ADDRESS_CUH_

#include "cuda/launch.h"

namespace jax_ep::gpu {

// An address of this device as its peers are shown it.
__device__ inline uint64_t shown_address(const GroupView& g, uint64_t address) {
  const uint64_t offset = address - g.staging;
  return offset < g.staging_bytes ? kStagedAddress | offset : address;
}

// What a peer has shown as an address that is valid here.
__device__ inline uint64_t address_here(const PeerView& peer, uint64_t shown) {
  if ((shown & kStagedAddress) != 0) return peer.staging + (shown & ~kStagedAddress);
  return shown == 0 ? 0 : shown + static_cast<uint64_t>(peer.shift);
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_ADDRESS_CUH_
