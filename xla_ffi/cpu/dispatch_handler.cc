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

ffi::ErrorOr<std::unique_ptr<CpuSiteState>> InstantiateDispatch(DispatchAttributes a) {
  return Instantiate(
      a, {a.num_tokens, a.top_k, a.has_weights, a.zero_tail, a.quantization, a.dequantize});
}

// Arguments after group_sizes: topk_weights f32 [T, K] if has_weights.
// Results after tokens: scales f32 [C, H / 128] if fp8 stays, weights f32 [C] if has_weights.
ffi::Future Dispatch(ffi::RunId run, CpuSiteState* state, DispatchAttributes a, I32 coordinates,
                     ffi::AnyBuffer x, I32 recv_src, I32 recv_order, I32 recv_offsets,
                     I32 group_sizes, ffi::RemainingArgs optional_in,
                     ffi::Result<ffi::AnyBuffer> tokens, ffi::RemainingRets optional_out) {
  const bool keeps_fp8 = a.quantization != 0 && a.dequantize == 0;
  const size_t num_out = (keeps_fp8 ? 1 : 0) + (a.has_weights ? 1 : 0);
  const int64_t capacity = recv_src.dimensions()[0];
  Checks checks(DispatchAttributes::kOp);
  checks.Shape("x", x, {a.num_tokens, -1});
  checks.Shape("recv_order", recv_order, {capacity});
  checks.Shape("recv_offsets", recv_offsets, {a.num_ranks * a.num_tokens + 1});
  checks.Require(optional_in.size() == (a.has_weights ? 1u : 0u) && optional_out.size() == num_out,
                 "the number of operands or results disagrees with the attributes");
  if (!checks.ok()) return FailedFuture(checks.error());

  const int64_t num_channels = x.dimensions()[1];
  checks.Shape("tokens", *tokens, {capacity, num_channels});
  checks.Type("tokens", *tokens, keeps_fp8 ? ffi::F8E4M3FN : x.element_type());
  checks.Require(IsWholeBytes(x.element_type()), "x has an element type narrower than a byte");
  std::optional<cpu::Quantization> quantization;
  if (a.quantization != 0) {
    const auto type = ToFloatType(x.element_type());
    checks.Require(type.has_value(), "x must be bf16, f16 or f32 to be quantised");
    checks.Require(num_channels % cpu::kScaleBlock == 0, "x must have a multiple of 128 channels");
    if (!checks.ok()) return FailedFuture(checks.error());
    quantization = cpu::Quantization{
        *type, a.quantization == 1 ? cpu::ScaleFormat::kFloat32 : cpu::ScaleFormat::kPowerOfTwo,
        a.dequantize != 0};
  }
  std::vector<const void*> in{x.untyped_data(),           recv_src.untyped_data(),
                              recv_order.untyped_data(),  recv_offsets.untyped_data(),
                              group_sizes.untyped_data(), nullptr};
  std::vector<Output> out{AsOutput(*tokens), {nullptr, 0}, {nullptr, 0}};
  if (keeps_fp8) {
    auto scales = *optional_out.get<ffi::AnyBuffer>(0);
    checks.Type("scales", *scales, ffi::F32);
    checks.Shape("scales", *scales, {capacity, num_channels / cpu::kScaleBlock});
    out[cpu::kDispatchScales] = AsOutput(*scales);
  }
  if (a.has_weights) {
    const auto topk_weights = *optional_in.get<ffi::AnyBuffer>(0);
    auto weights = *optional_out.get<ffi::AnyBuffer>(num_out - 1);
    checks.Type("topk_weights", topk_weights, ffi::F32);
    checks.Shape("topk_weights", topk_weights, {a.num_tokens, a.top_k});
    checks.Type("weights", *weights, ffi::F32);
    checks.Shape("weights", *weights, {capacity});
    in[cpu::kDispatchTopkWeights] = topk_weights.untyped_data();
    out[cpu::kDispatchWeights] = AsOutput(*weights);
  }
  if (!checks.ok()) return FailedFuture(checks.error());

  const cpu::DispatchSizes sizes{
      a.num_ranks,
      a.num_tokens,
      a.top_k,
      capacity,
      group_sizes.dimensions()[0],
      num_channels * static_cast<int64_t>(ffi::ByteWidth(x.element_type())),
      num_channels,
      a.zero_tail != 0,
      quantization};
  return Arrive(*state, run, coordinates, std::move(in), out, [sizes](const cpu::Members& members) {
    return cpu::MakeDispatchOp(sizes, members);
  });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateDispatchCpu, InstantiateDispatch,
                              ffi::Ffi::BindInstantiate().Attrs<DispatchAttributes>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kDispatchCpu, Dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::RunId>()
                                  .Ctx<ffi::State<CpuSiteState>>()
                                  .Attrs<DispatchAttributes>()
                                  .Arg<I32>()             // coordinates
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<I32>()             // recv_src
                                  .Arg<I32>()             // recv_order
                                  .Arg<I32>()             // recv_offsets
                                  .Arg<I32>()             // group_sizes
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()  // tokens
                                  .RemainingRets());

}  // namespace jax_ep
