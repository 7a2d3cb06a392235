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
  const auto launch = group.in_slots() ? gpu::LaunchCombineInSlots : gpu::LaunchCombine;
  const cudaError_t launched = launch(group, arguments, NumSms(ordinal, a.num_sms), stream);
  return CudaStatus(a.kOp, group.CopyOut(launched, stream));
}

}  // namespace

JAX_EP_DEFINE_CUDA_HANDLERS(Combine, CombineAttributes);

}  // namespace jax_ep
