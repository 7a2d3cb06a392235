#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/call_sizes.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

ffi::Future Dispatch(ffi::RunId run, CpuSiteState* state, DispatchAttributes a,
                     Coordinates coordinates, ffi::RemainingArgs operands,
                     ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const DispatchCall call = DecodeCall(a, operands, results, &checks);
  if (!checks.ok()) return FailedFuture(checks.error());
  // Receivers fetch the rows, so senders need not know where these go (topk_idx, send_row).
  return Arrive(
      *state, run, coordinates,
      {call.x.data, call.tables.recv_src, call.tables.recv_order, call.tables.recv_offsets,
       call.tables.group_sizes, call.x_scales.data, call.topk_weights.data},
      OutputsOf(call), [sizes = SizesOf(call)](const cpu::Members& members) {
        return cpu::MakeDispatchOp(sizes, members);
      });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateDispatchCpu, Instantiate<DispatchAttributes>,
                              ffi::Ffi::BindInstantiate().Attrs<DispatchAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDispatchCpu, Dispatch, CpuCallBinding<DispatchAttributes>());

}  // namespace jax_ep
