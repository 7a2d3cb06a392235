#include "xla_ffi/calls.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/checks.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/launches.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

ffi::Error Combine(cudaStream_t stream, int32_t ordinal, CudaSiteState* state, CombineAttributes a,
                   ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const CombineCall call = DecodeCall(a, operands, results, &checks, /*has_scratch=*/true);
  if (checks.ok()) CheckForKernel(call, &checks);
  if (!checks.ok()) return checks.error();
  GroupCall group;
  if (ffi::Error e =
          EnterGroup(*state, ordinal, stream,
                     {{"partial", call.partial.data, call.partial.bytes, Use::kScratch},
                      {"collected", call.collected.data, call.collected.bytes, Use::kOutput}},
                     &group, SlotSizesOf(call.sizes, {call.y.row_bytes()}));
      e.failure()) {
    return e;
  }
  const NetworkCall* const network = group.network();
  const int64_t on_node = network ? network->region.ranks_per_node : call.sizes.num_ranks;
  if (call.ranks_per_node != on_node) {
    return Refused(a.kOp, "the program sums over nodes of " + std::to_string(call.ranks_per_node) +
                              " ranks, but the group has " + std::to_string(on_node) +
                              " on each: compile it where it runs");
  }
  group.Distinguish({call.y.num_channels, static_cast<int64_t>(call.y.type)});
  gpu::CombineArguments arguments{};
  static_cast<TableView&>(arguments) = call.tables;
  arguments.topk_idx = call.topk_idx;
  arguments.y = call.y.data;
  arguments.weights = call.weights.as<const float>();
  arguments.values = call.values.as<const float>();
  arguments.partial = group.At(call.partial.data);
  arguments.out = call.out.data;
  arguments.collected = group.At(call.collected.as<float>());
  arguments.num_tokens = a.num_tokens;
  arguments.top_k = a.top_k;
  arguments.num_local_experts = call.sizes.num_local_experts();
  arguments.num_channels = call.y.num_channels;
  arguments.type = *call.y.float_type();
  arguments.expand = call.expand;
  const int num_sms = NumSms(ordinal, a.num_sms);
  cudaError_t launched;
  if (network != nullptr && group.in_slots()) {
    launched =
        network->part.launch_combine_in_slots(group, network->group, arguments, num_sms, stream);
  } else if (network != nullptr) {
    if (auto problem = NetworkProblem(*network, call)) return Refused(a.kOp, *problem);
    launched = network->part.launch_combine(group, network->group, arguments, num_sms, stream);
  } else {
    const auto launch = group.in_slots() ? gpu::LaunchCombineInSlots : gpu::LaunchCombine;
    launched = launch(group, arguments, num_sms, stream);
  }
  return CudaStatus(a.kOp, group.CopyOut(launched, stream));
}

}  // namespace

JAX_EP_DEFINE_CUDA_HANDLERS(Combine, CombineAttributes);

}  // namespace jax_ep
