#include "cuda/slots/combine.cuh"
#include "cuda/slots/one_node.cuh"

namespace jax_ep::gpu {

cudaError_t LaunchCombineInSlots(const GroupView& group, const CombineArguments& a, int num_sms,
                                 cudaStream_t stream) {
  return slots::LaunchCombine(group, a, group.num_ranks, num_sms, stream,
                              [](const slots::Units&) { return slots::OneNode(); });
}

cudaError_t PrepareCombineInSlots() { return slots::PrepareCombine<slots::OneNode>(); }

}  // namespace jax_ep::gpu
