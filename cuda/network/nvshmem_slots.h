// Calls in slots over NVSHMEM: a source of its own, for they take most of the time to compile.
#ifndef JAX_EP_CUDA_NETWORK_NVSHMEM_SLOTS_H_
#define JAX_EP_CUDA_NETWORK_NVSHMEM_SLOTS_H_

#include <cuda_runtime_api.h>

#include "cuda/launch.h"
#include "cuda/network/network.h"

namespace jax_ep::gpu {

cudaError_t LaunchLayoutAndDispatchOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                               const LayoutAndDispatchArguments& arguments,
                                               int num_sms, cudaStream_t stream);
cudaError_t LaunchCombineInSlotsOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                            const CombineArguments& arguments, int num_sms,
                                            cudaStream_t stream);
cudaError_t PrepareSlotsOverNvshmem();

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_NVSHMEM_SLOTS_H_
