#include "cuda/slots/layout_and_dispatch.cuh"
#include "cuda/slots/one_node.cuh"

namespace jax_ep::gpu {

cudaError_t LaunchLayoutAndDispatchInSlots(const GroupView& group,
                                           const LayoutAndDispatchArguments& a, int num_sms,
                                           cudaStream_t stream) {
  return slots::LaunchDispatch(group, a, group.num_ranks, num_sms, stream,
                               [](const slots::Units&) { return slots::OneNode(); });
}

cudaError_t PrepareLayoutAndDispatchInSlots() { return slots::PrepareDispatch<slots::OneNode>(); }

}  // namespace jax_ep::gpu
