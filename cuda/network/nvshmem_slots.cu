#include "cuda/network/nvshmem_hop.cuh"
#include "cuda/network/nvshmem_slots.h"
#include "cuda/network/slots.cuh"

namespace jax_ep::gpu {

cudaError_t LaunchLayoutAndDispatchOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                               const LayoutAndDispatchArguments& arguments,
                                               int num_sms, cudaStream_t stream) {
  return LaunchNetworkLayoutAndDispatchInSlots(group, network.slots, HopOf(network), arguments,
                                               num_sms, stream);
}

cudaError_t LaunchCombineInSlotsOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                            const CombineArguments& arguments, int num_sms,
                                            cudaStream_t stream) {
  return LaunchNetworkCombineInSlots(group, network.slots, HopOf(network), arguments, num_sms,
                                     stream);
}

cudaError_t PrepareSlotsOverNvshmem() { return PrepareNetworkSlots<NvshmemGroupHop>(); }

}  // namespace jax_ep::gpu
