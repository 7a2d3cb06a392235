#include "xla_ffi/attributes.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/ops/ops.h"
#include "xla_ffi/ffi_checks.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32, 1>;
using I32Matrix = ffi::Buffer<ffi::S32, 2>;

ffi::ErrorOr<std::unique_ptr<CpuSiteState>> InstantiateLayout(LayoutAttributes a) {
  return Instantiate(a, {a.num_experts, a.capacity, a.expert_alignment});
}

ffi::Future Layout(ffi::RunId run, CpuSiteState* state, LayoutAttributes a, I32 coordinates,
                   I32Matrix topk_idx, ffi::Result<I32Matrix> send_row, ffi::Result<I32> recv_src,
                   ffi::Result<I32> recv_order, ffi::Result<I32> recv_offsets,
                   ffi::Result<I32> group_sizes, ffi::Result<I32> expert_counts,
                   ffi::Result<I32> expert_load, ffi::Result<I32> counters) {
  Checks checks(LayoutAttributes::kOp);
  checks.Require(a.num_experts > 0 && a.num_experts % a.num_ranks == 0 && a.capacity > 0 &&
                     a.expert_alignment > 0 && a.capacity % a.expert_alignment == 0,
                 "num_experts must be a positive multiple of num_ranks, and capacity of "
                 "expert_alignment");
  const int64_t num_tokens = topk_idx.dimensions()[0], top_k = topk_idx.dimensions()[1];
  const int64_t num_local_experts = checks.ok() ? a.num_experts / a.num_ranks : 0;
  checks.Shape("send_row", *send_row, {num_tokens, top_k});
  checks.Shape("recv_src", *recv_src, {a.capacity});
  checks.Shape("recv_order", *recv_order, {a.capacity});
  checks.Shape("recv_offsets", *recv_offsets, {a.num_ranks * num_tokens + 1});
  checks.Shape("group_sizes", *group_sizes, {num_local_experts});
  checks.Shape("expert_counts", *expert_counts, {num_local_experts});
  checks.Shape("expert_load", *expert_load, {a.num_experts});
  checks.Shape("counters", *counters, {3});
  if (!checks.ok()) return FailedFuture(checks.error());

  const cpu::LayoutSizes sizes{a.num_ranks,   num_tokens, top_k,
                               a.num_experts, a.capacity, a.expert_alignment};
  std::vector<const void*> in{topk_idx.untyped_data()};
  const std::vector<Output> out{AsOutput(*send_row),    AsOutput(*recv_src),
                                AsOutput(*recv_order),  AsOutput(*recv_offsets),
                                AsOutput(*group_sizes), AsOutput(*expert_counts),
                                AsOutput(*expert_load), AsOutput(*counters)};
  return Arrive(*state, run, coordinates, std::move(in), out,
                [sizes](const cpu::Members& members) { return cpu::MakeLayoutOp(sizes, members); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateLayoutCpu, InstantiateLayout,
                              ffi::Ffi::BindInstantiate().Attrs<LayoutAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCpu, Layout,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::State<CpuSiteState>>()
                                  .Attrs<LayoutAttributes>()
                                  .Arg<I32>()        // coordinates
                                  .Arg<I32Matrix>()  // topk_idx
                                  .Ret<I32Matrix>()  // send_row
                                  .Ret<I32>()        // recv_src
                                  .Ret<I32>()        // recv_order
                                  .Ret<I32>()        // recv_offsets
                                  .Ret<I32>()        // group_sizes
                                  .Ret<I32>()        // expert_counts
                                  .Ret<I32>()        // expert_load
                                  .Ret<I32>());      // counters

}  // namespace jax_ep
