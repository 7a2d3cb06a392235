#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/call_sizes.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

ffi::Future LayoutAndDispatch(ffi::RunId run, CpuSiteState* state, LayoutAndDispatchAttributes a,
                              Coordinates coordinates, ffi::RemainingArgs operands,
                              ffi::RemainingRets results) {
  Checks checks(a.kOp);
  LayoutAndDispatchCall call = DecodeCall(a, operands, results, &checks);
  if (!checks.ok()) return FailedFuture(checks.error());
  const DispatchCall& dispatch = call.dispatch;
  std::vector<Output> outputs = OutputsOf(call.layout);
  for (const Output& output : OutputsOf(dispatch)) outputs.push_back(output);
  return Arrive(
      *state, run, coordinates,
      {dispatch.topk_idx, dispatch.x.data, dispatch.x_scales.data, dispatch.topk_weights.data},
      outputs,
      [layout_sizes = SizesOf(call.layout),
       dispatch_sizes = SizesOf(dispatch)](const cpu::Members& members) {
        return cpu::MakeLayoutAndDispatchOp(layout_sizes, dispatch_sizes, members);
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateLayoutAndDispatchCpu,
                              Instantiate<LayoutAndDispatchAttributes>,
                              ffi::Ffi::BindInstantiate().Attrs<LayoutAndDispatchAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutAndDispatchCpu, LayoutAndDispatch,
                              CpuCallBinding<LayoutAndDispatchAttributes>());

}  // namespace jax_ep
