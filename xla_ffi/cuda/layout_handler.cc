#include "xla_ffi/calls.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/checks.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/launches.h"

namespace jax_ep {

namespace ffi = xla::ffi;

gpu::LayoutArguments LayoutArgumentsOf(const LayoutCall& call) {
  gpu::LayoutArguments arguments{};
  static_cast<Tables<int32_t>&>(arguments) = call.tables;
  arguments.topk_idx = call.topk_idx.as<const int32_t>();
  arguments.num_tokens = call.sizes.num_tokens;
  arguments.top_k = call.sizes.top_k;
  arguments.num_experts = call.sizes.num_experts;
  arguments.room = call.room;
  arguments.expert_counts = call.expert_counts.as<int32_t>();
  arguments.expert_load = call.expert_load.as<int32_t>();
  arguments.counters = call.counters.as<int32_t>();
  return arguments;
}

ffi::Error LaunchLayout(const CudaSiteState& state, int32_t ordinal, cudaStream_t stream,
                        const LayoutCall& call, int64_t num_sms) {
  GroupCall group;
  if (ffi::Error e = EnterGroup(state, ordinal, stream,
                                {{"topk_idx", call.topk_idx.data, call.topk_idx.bytes}}, &group);
      e.failure()) {
    return e;
  }
  gpu::LayoutArguments arguments = LayoutArgumentsOf(call);
  arguments.topk_idx = group.At(arguments.topk_idx);
  const int sms = NumSms(ordinal, num_sms);
  if (const NetworkCall* network = group.network()) {
    if (auto problem = NetworkProblem(*network, call)) return Refused(state.op, *problem);
    return CudaStatus(state.op,
                      network->part.launch_layout(group, network->group, arguments, sms, stream));
  }
  return CudaStatus(state.op, gpu::LaunchLayout(group, arguments, sms, stream));
}

namespace {

ffi::Error Layout(cudaStream_t stream, int32_t ordinal, CudaSiteState* state, LayoutAttributes a,
                  ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const LayoutCall call = DecodeCall(a, operands, results, &checks);
  if (checks.ok()) CheckForKernel(call, &checks);
  if (!checks.ok()) return checks.error();
  return LaunchLayout(*state, ordinal, stream, call, a.num_sms);
}

}  // namespace

JAX_EP_DEFINE_CUDA_HANDLERS(Layout, LayoutAttributes);

}  // namespace jax_ep
