#include "xla_ffi/attributes.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/ops/ops.h"
#include "xla_ffi/ffi_checks.h"
#include "xla_ffi/float_type.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32, 1>;
using I32Matrix = ffi::Buffer<ffi::S32, 2>;

ffi::ErrorOr<std::unique_ptr<CpuSiteState>> InstantiateCombine(CombineAttributes a) {
  return Instantiate(a, {a.num_experts, a.has_weights, a.has_values});
}

// Arguments after recv_offsets: weights f32 [C] if has_weights, values f32 [C] if has_values.
// Results after out: collected f32 [T, K] if has_values.
ffi::Future Combine(ffi::RunId run, CpuSiteState* state, CombineAttributes a, I32 coordinates,
                    ffi::AnyBuffer y, I32Matrix topk_idx, I32Matrix send_row, I32 recv_src,
                    I32 recv_order, I32 recv_offsets, ffi::RemainingArgs optional_in,
                    ffi::Result<ffi::AnyBuffer> combined, ffi::RemainingRets optional_out) {
  const size_t num_values = a.has_values ? 1 : 0;
  const size_t num_weights = a.has_weights ? 1 : 0;
  const int64_t num_tokens = topk_idx.dimensions()[0], top_k = topk_idx.dimensions()[1];
  const int64_t capacity = recv_src.dimensions()[0];
  const auto type = ToFloatType(y.element_type());
  Checks checks(CombineAttributes::kOp);
  checks.Shape("y", y, {capacity, -1});
  checks.Require(type.has_value(), "y must be bf16, f16 or f32");
  checks.Shape("send_row", send_row, {num_tokens, top_k});
  checks.Shape("recv_order", recv_order, {capacity});
  checks.Shape("recv_offsets", recv_offsets, {a.num_ranks * num_tokens + 1});
  checks.Require(a.num_experts > 0 && a.num_experts % a.num_ranks == 0,
                 "num_experts must be a positive multiple of num_ranks");
  checks.Require(
      optional_in.size() == num_weights + num_values && optional_out.size() == num_values,
      "the number of operands or results disagrees with the attributes");
  if (!checks.ok()) return FailedFuture(checks.error());

  checks.Shape("out", *combined, {num_tokens, y.dimensions()[1]});
  checks.Type("out", *combined, y.element_type());
  std::vector<const void*> in{y.untyped_data(),
                              topk_idx.untyped_data(),
                              send_row.untyped_data(),
                              recv_src.untyped_data(),
                              recv_order.untyped_data(),
                              recv_offsets.untyped_data(),
                              nullptr,
                              nullptr};
  std::vector<Output> out{AsOutput(*combined), {nullptr, 0}};
  if (a.has_weights) {
    const auto weights = *optional_in.get<ffi::AnyBuffer>(0);
    checks.Type("weights", weights, ffi::F32);
    checks.Shape("weights", weights, {capacity});
    in[cpu::kCombineWeights] = weights.untyped_data();
  }
  if (a.has_values) {
    const auto values = *optional_in.get<ffi::AnyBuffer>(num_weights);
    auto collected = *optional_out.get<ffi::AnyBuffer>(0);
    checks.Type("values", values, ffi::F32);
    checks.Shape("values", values, {capacity});
    checks.Type("collected", *collected, ffi::F32);
    checks.Shape("collected", *collected, {num_tokens, top_k});
    in[cpu::kCombineValues] = values.untyped_data();
    out[cpu::kCombineCollected] = AsOutput(*collected);
  }
  if (!checks.ok()) return FailedFuture(checks.error());

  const cpu::CombineSizes sizes{
      a.num_ranks,       num_tokens, top_k, capacity, a.num_experts / a.num_ranks,
      y.dimensions()[1], *type};
  return Arrive(*state, run, coordinates, std::move(in), out, [sizes](const cpu::Members& members) {
    return cpu::MakeCombineOp(sizes, members);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateCombineCpu, InstantiateCombine,
                              ffi::Ffi::BindInstantiate().Attrs<CombineAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineCpu, Combine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::State<CpuSiteState>>()
                                  .Attrs<CombineAttributes>()
                                  .Arg<I32>()             // coordinates
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<I32Matrix>()       // topk_idx
                                  .Arg<I32Matrix>()       // send_row
                                  .Arg<I32>()             // recv_src
                                  .Arg<I32>()             // recv_order
                                  .Arg<I32>()             // recv_offsets
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .RemainingRets());

}  // namespace jax_ep
