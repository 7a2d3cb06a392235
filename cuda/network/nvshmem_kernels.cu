#include "cuda/network/link_check.cuh"
#include "cuda/network/network.h"
#include "cuda/network/nvshmem_hop.cuh"

namespace jax_ep::gpu {

cudaError_t LaunchLinkCheck(const LinkCheck& check, cudaStream_t stream) {
  link_check<<<1, kLinkThreads, 0, stream>>>(NvshmemHop{}, check);
  return cudaGetLastError();
}

cudaError_t PrepareNetworkKernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, &link_check<NvshmemHop>);
}

}  // namespace jax_ep::gpu
