// The memory of one rank through which a hop reaches it (hop.cuh).
#ifndef JAX_EP_CUDA_NETWORK_HOP_MEMORY_H_
#define JAX_EP_CUDA_NETWORK_HOP_MEMORY_H_

#include <cstdint>

namespace jax_ep::gpu {

struct HopMemory {
  char* bytes;
  uint64_t* signals;
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_HOP_MEMORY_H_
