#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/call_sizes.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

ffi::Future Layout(ffi::RunId run, CpuSiteState* state, LayoutAttributes a, Coordinates coordinates,
                   ffi::RemainingArgs operands, ffi::RemainingRets results) {
  Checks checks(a.kOp);
  LayoutCall call = DecodeCall(a, operands, results, &checks);
  if (!checks.ok()) return FailedFuture(checks.error());
  return Arrive(*state, run, coordinates, {call.topk_idx.data}, OutputsOf(call),
                [sizes = SizesOf(call)](const cpu::Members& members) {
                  return cpu::MakeLayoutOp(sizes, members);
                });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateLayoutCpu, Instantiate<LayoutAttributes>,
                              ffi::Ffi::BindInstantiate().Attrs<LayoutAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCpu, Layout, CpuCallBinding<LayoutAttributes>());

}  // namespace jax_ep
