#include "xla_ffi/calls.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/checks.h"
#include "xla_ffi/cuda/dispatch_arguments.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/launches.h"

namespace jax_ep {

namespace ffi = xla::ffi;

ffi::Error LaunchDispatch(const CudaSiteState& state, int32_t ordinal, cudaStream_t stream,
                          const DispatchCall& call, int64_t num_sms) {
  GroupCall group;
  if (ffi::Error e = EnterGroup(state, ordinal, stream,
                                {{"tokens", call.tokens.data, call.tokens.bytes, Use::kLanding,
                                  LandingBytes(call, call.x, call.num_scales)},
                                 {"weights", call.weights.data, call.weights.bytes, Use::kOutput},
                                 {"scales", call.scales.data, call.scales.bytes, Use::kOutput}},
                                &group);
      e.failure()) {
    return e;
  }
  group.Distinguish({call.x.num_channels, static_cast<int64_t>(call.x.type), call.num_scales});
  gpu::DispatchArguments arguments = DispatchArgumentsOf(call, call.x, call.tokens, call.expand);
  arguments.tokens = group.At(call.tokens.data);
  arguments.topk_weights = call.topk_weights.as<const float>();
  arguments.scales = group.At(call.scales.as<float>());
  arguments.weights = group.At(call.weights.as<float>());
  arguments.landing = group.LandingOf(call.tokens.data);
  arguments.mode = ModeOf(call);
  arguments.num_scales = call.num_scales;
  arguments.x_scales = call.x_scales.as<const float>();
  arguments.type = FloatTypeOf(call.x);
  arguments.power_of_two_scales = call.quantization == QuantizationKind::kPowerOfTwoScales;
  arguments.zero_tail = call.zero_tail;
  arguments.is_integer = IsInteger(call.x.type);
  const int sms = NumSms(ordinal, num_sms);
  cudaError_t launched;
  if (const NetworkCall* network = group.network()) {
    if (auto problem = NetworkProblem(*network, call)) return Refused(state.op, *problem);
    launched = network->part.launch_dispatch(group, network->group, arguments, sms, stream);
  } else {
    launched = gpu::LaunchDispatch(group, arguments, sms, stream);
  }
  return CudaStatus(state.op, group.CopyOut(launched, stream));
}

namespace {

ffi::Error Dispatch(cudaStream_t stream, int32_t ordinal, CudaSiteState* state,
                    DispatchAttributes a, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const DispatchCall call = DecodeCall(a, operands, results, &checks);
  if (checks.ok()) CheckForKernel(call, &checks);
  if (!checks.ok()) return checks.error();
  return LaunchDispatch(*state, ordinal, stream, call, a.num_sms);
}

}  // namespace

JAX_EP_DEFINE_CUDA_HANDLERS(Dispatch, DispatchAttributes);

}  // namespace jax_ep
