#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
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
  std::vector<Output> out;
  Tables<int32_t>::ForEach(call.tables, call.sizes,
                           [&](const char*, int32_t* table, std::initializer_list<int64_t> shape) {
                             size_t bytes = sizeof(int32_t);
                             for (int64_t size : shape) bytes *= static_cast<size_t>(size);
                             out.push_back({table, bytes});
                           });
  for (const Memory& counts : {call.expert_counts, call.expert_load, call.counters}) {
    out.push_back(AsOutput(counts));
  }
  const cpu::LayoutSizes sizes{a.num_ranks, a.num_tokens, a.top_k, a.num_experts, call.room};
  return Arrive(*state, run, coordinates, {call.topk_idx.data}, out,
                [sizes](const cpu::Members& members) { return cpu::MakeLayoutOp(sizes, members); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateLayoutCpu, Instantiate<LayoutAttributes>,
                              ffi::Ffi::BindInstantiate().Attrs<LayoutAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCpu, Layout, CpuCallBinding<LayoutAttributes>());

}  // namespace jax_ep
