#include "xla_ffi/calls.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/checks.h"
#include "xla_ffi/cuda/dispatch_arguments.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/launches.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

cudaError_t LaunchInSlots(const GroupCall& group, const LayoutAndDispatchCall& call, int num_sms,
                          cudaStream_t stream) {
  const DispatchCall& dispatch = call.dispatch;
  gpu::LayoutAndDispatchArguments arguments{};
  static_cast<gpu::LayoutArguments&>(arguments) = LayoutArgumentsOf(call.layout);
  arguments.x = dispatch.x.data;
  arguments.topk_weights = dispatch.topk_weights.as<const float>();
  arguments.x_scales = dispatch.x_scales.as<const float>();
  arguments.tokens = dispatch.tokens.data;
  arguments.scales = dispatch.scales.as<float>();
  arguments.weights = dispatch.weights.as<float>();
  arguments.num_channels = dispatch.x.num_channels;
  arguments.row_bytes = dispatch.x.row_bytes();
  arguments.num_rows = dispatch.sizes.num_rows(dispatch.expand);
  arguments.num_scales = dispatch.num_scales;
  arguments.expand = dispatch.expand;
  arguments.mode = ModeOf(dispatch);
  arguments.type = FloatTypeOf(dispatch.x);
  arguments.power_of_two_scales = dispatch.quantization == QuantizationKind::kPowerOfTwoScales;
  arguments.zero_tail = dispatch.zero_tail;
  arguments.is_integer = IsInteger(dispatch.x.type);
  if (const NetworkCall* network = group.network()) {
    return network->part.launch_layout_and_dispatch(group, network->group, arguments, num_sms,
                                                    stream);
  }
  return gpu::LaunchLayoutAndDispatchInSlots(group, arguments, num_sms, stream);
}

// One kernel where slots take the call, else the two; which do not quantise for the network.
ffi::Error LayoutAndDispatch(cudaStream_t stream, int32_t ordinal, CudaSiteState* state,
                             LayoutAndDispatchAttributes a, ffi::RemainingArgs operands,
                             ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const LayoutAndDispatchCall call = DecodeCall(a, operands, results, &checks);
  if (checks.ok()) CheckForKernel(call, &checks);
  if (!checks.ok()) return checks.error();
  const DispatchCall& dispatch = call.dispatch;
  const gpu::SlotRow row = gpu::slot_row(ModeOf(dispatch), FloatTypeOf(dispatch.x),
                                         dispatch.x.row_bytes(), dispatch.num_scales);
  GroupCall group;
  if (ffi::Error e =
          EnterGroup(*state, ordinal, stream, {}, &group, SlotSizesOf(call.layout.sizes, row));
      e.failure()) {
    return e;
  }
  if (group.in_slots()) {
    group.Distinguish(
        {dispatch.x.num_channels, static_cast<int64_t>(dispatch.x.type), dispatch.num_scales});
    return CudaStatus(a.kOp, LaunchInSlots(group, call, NumSms(ordinal, a.num_sms), stream));
  }
  const NetworkCall* const network = group.network();
  if (network != nullptr && network->has_slots && dispatch.is_quantised()) {
    return Refused(a.kOp,
                   "JAX_EP_NETWORK_SLOTS=1 demands slots between nodes for fp8, but they, or those "
                   "of a node, are too small for the call. Set it to 0, or pass a larger "
                   "jax_ep.initialize(heap_bytes=..., slot_bytes=...) in every process, after "
                   "jax_ep.finalize()");
  }
  if (ffi::Error e = LaunchLayout(*state, ordinal, stream, call.layout, a.num_sms); e.failure()) {
    return e;
  }
  return LaunchDispatch(*state, ordinal, stream, call.dispatch, a.num_sms);
}

}  // namespace

JAX_EP_DEFINE_CUDA_HANDLERS(LayoutAndDispatch, LayoutAndDispatchAttributes);

}  // namespace jax_ep
