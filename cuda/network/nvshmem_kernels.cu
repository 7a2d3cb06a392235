#include "cuda/network/layout.cuh"
#include "cuda/network/link_check.cuh"
#include "cuda/network/network.h"
#include "cuda/network/nvshmem_hop.cuh"
#include "cuda/network/nvshmem_slots.h"
#include "cuda/network/rail/combine.cuh"
#include "cuda/network/rail/dispatch.cuh"
#include "cuda/network/tell.cuh"

namespace jax_ep::gpu {
namespace {

cudaError_t LaunchLayoutOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                    const LayoutArguments& arguments, int num_sms,
                                    cudaStream_t stream) {
  return LaunchNetworkLayout(group, network.layout, HopOf(network), arguments, num_sms, stream);
}

cudaError_t LaunchDispatchOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                      const DispatchArguments& arguments, int num_sms,
                                      cudaStream_t stream) {
  return LaunchRailDispatch(group, network.dispatch, HopOf(network), arguments, num_sms, stream);
}

cudaError_t LaunchCombineOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                     const CombineArguments& arguments, int num_sms,
                                     cudaStream_t stream) {
  return LaunchRailCombine(group, network.combine, HopOf(network), arguments, num_sms, stream);
}

cudaError_t LaunchTellOverNvshmem(const GroupView& group, const NetworkGroup& network,
                                  cudaStream_t stream) {
  tell_kernel<<<1, 32, 0, stream>>>(group, HopOf(network));
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLinkCheck(const LinkCheck& check, cudaStream_t stream) {
  link_check<<<1, kLinkThreads, 0, stream>>>(NvshmemHop{}, check);
  return cudaGetLastError();
}

NetworkPart MakeNetworkPart() {
  NetworkPart part{};
  part.control_bytes = sizeof(ControlBlock);
  part.view_bytes = sizeof(GroupView);
  part.launch_layout = LaunchLayoutOverNvshmem;
  part.launch_dispatch = LaunchDispatchOverNvshmem;
  part.launch_combine = LaunchCombineOverNvshmem;
  part.launch_tell = LaunchTellOverNvshmem;
  part.launch_layout_and_dispatch = LaunchLayoutAndDispatchOverNvshmem;
  part.launch_combine_in_slots = LaunchCombineInSlotsOverNvshmem;
  return part;
}

cudaError_t PrepareNetworkKernels(bool has_slots) {
  cudaFuncAttributes attributes;
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, &link_check<NvshmemHop>);
      e != cudaSuccess) {
    return e;
  }
  if (cudaError_t e = cudaFuncGetAttributes(&attributes, &tell_kernel<NvshmemGroupHop>);
      e != cudaSuccess) {
    return e;
  }
  if (cudaError_t e = PrepareNetworkLayout<NvshmemGroupHop>(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareRailDispatch<NvshmemGroupHop>(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareRailCombine<NvshmemGroupHop>(); e != cudaSuccess) return e;
  return has_slots ? PrepareSlotsOverNvshmem() : cudaSuccess;
}

}  // namespace jax_ep::gpu
