#include "xla_ffi/calls.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/checks.h"
#include "xla_ffi/cuda/dispatch_arguments.h"
#include "xla_ffi/cuda/handlers.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

// Peers write rows of g where d_y will be; y, weights and d_weights are this rank's own.
ffi::Error CombineGradient(cudaStream_t stream, int32_t ordinal, CudaSiteState* state,
                           CombineGradientAttributes a, ffi::RemainingArgs operands,
                           ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const CombineGradientCall call = DecodeCall(a, operands, results, &checks);
  if (checks.ok()) CheckForKernel(call, &checks);
  if (!checks.ok()) return checks.error();
  GroupCall group;
  if (ffi::Error e = EnterGroup(
          *state, ordinal, stream,
          {{"d_y", call.d_y.data, call.d_y.bytes, Use::kLanding, LandingBytes(call, call.g, 0)}},
          &group);
      e.failure()) {
    return e;
  }
  if (group.network() != nullptr) {
    return Refused(
        a.kOp, "the program was compiled for a group on one node: compile it after initialize()");
  }
  group.Distinguish({call.g.num_channels, static_cast<int64_t>(call.g.type)});
  gpu::DispatchArguments arguments = DispatchArgumentsOf(call, call.g, call.d_y, /*expand=*/true);
  arguments.y = call.y.data;
  arguments.row_weights = call.weights.as<const float>();
  arguments.dots = call.d_weights.as<float>();
  arguments.landing = group.LandingOf(call.d_y.data);
  arguments.mode = gpu::DispatchMode::kWeighted;
  arguments.type = *call.g.float_type();
  arguments.zero_tail = call.zero_tail;
  const cudaError_t launched =
      gpu::LaunchDispatch(group, arguments, NumSms(ordinal, a.num_sms), stream);
  return CudaStatus(a.kOp, group.CopyOut(launched, stream));
}

}  // namespace

JAX_EP_DEFINE_CUDA_HANDLERS(CombineGradient, CombineGradientAttributes);

}  // namespace jax_ep
