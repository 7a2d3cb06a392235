#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

ffi::Future Combine(ffi::RunId run, CpuSiteState* state, CombineAttributes a,
                    Coordinates coordinates, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  Checks checks(a.kOp);
  const CombineCall call = DecodeCall(a, operands, results, &checks, /*has_scratch=*/false);
  if (!checks.ok()) return FailedFuture(checks.error());
  const cpu::CombineSizes sizes{a.num_ranks,
                                a.num_tokens,
                                a.top_k,
                                a.capacity,
                                call.sizes.num_local_experts(),
                                call.y.num_channels,
                                call.ranks_per_node,
                                *call.y.float_type(),
                                call.expand};
  return Arrive(
      *state, run, coordinates,
      {call.y.data, call.topk_idx, call.tables.send_row, call.tables.recv_src,
       call.tables.recv_order, call.tables.recv_offsets, call.weights.data, call.values.data},
      {AsOutput(call.out), AsOutput(call.collected)},
      [sizes](const cpu::Members& members) { return cpu::MakeCombineOp(sizes, members); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateCombineCpu, Instantiate<CombineAttributes>,
                              ffi::Ffi::BindInstantiate().Attrs<CombineAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineCpu, Combine, CpuCallBinding<CombineAttributes>());

}  // namespace jax_ep
