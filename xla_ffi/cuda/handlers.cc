// The CUDA handlers: decode, check, launch. Same targets and attributes as the CPU's, and one target
// more: the gradient of combine. Dispatch takes topk_idx and send_row too, and the scratch of
// combine is one result more.
#include "xla_ffi/cuda/handlers.h"

#include <limits>

#include "xla_ffi/attributes.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/ffi_checks.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32, 1>;
using I32Matrix = ffi::Buffer<ffi::S32, 2>;
using F32 = ffi::Buffer<ffi::F32, 1>;
using State = std::unique_ptr<CudaSiteState>;

bool RowTypeOf(ffi::DataType type, gpu::RowType* row_type) {
  switch (type) {
    case ffi::F32:
      *row_type = gpu::RowType::kF32;
      return true;
    case ffi::F16:
      *row_type = gpu::RowType::kF16;
      return true;
    case ffi::BF16:
      *row_type = gpu::RowType::kBF16;
      return true;
    default:
      return false;
  }
}

bool IsInteger(ffi::DataType type) {
  switch (type) {
    case ffi::F64:
    case ffi::F32:
    case ffi::F16:
    case ffi::BF16:
      return false;
    default:
      return true;
  }
}

ffi::ErrorOr<State> InstantiateLayout(LayoutAttributes a) {
  return MakeCudaSite(a.kOp, a.num_ranks, a.members,
                      {a.num_sms, a.num_experts, a.capacity, a.expert_alignment});
}

ffi::ErrorOr<State> InstantiateDispatch(DispatchAttributes a) {
  return MakeCudaSite(
      a.kOp, a.num_ranks, a.members,
      {a.num_sms, a.num_tokens, a.top_k, a.has_weights, a.zero_tail, a.quantization, a.dequantize});
}

ffi::ErrorOr<State> InstantiateCombine(CombineAttributes a) {
  return MakeCudaSite(a.kOp, a.num_ranks, a.members,
                      {a.num_sms, a.num_experts, a.has_weights, a.has_values});
}

ffi::ErrorOr<State> InstantiateCombineGradient(CombineGradientAttributes a) {
  return MakeCudaSite(a.kOp, a.num_ranks, a.members,
                      {a.num_sms, a.num_tokens, a.top_k, a.zero_tail});
}

ffi::Error Layout(cudaStream_t stream, int32_t ordinal, CudaSiteState* state, LayoutAttributes a,
                  I32 /*coordinates*/, I32Matrix topk_idx, ffi::Result<I32Matrix> send_row,
                  ffi::Result<I32> recv_src, ffi::Result<I32> recv_order,
                  ffi::Result<I32> recv_offsets, ffi::Result<I32> group_sizes,
                  ffi::Result<I32> expert_counts, ffi::Result<I32> expert_load,
                  ffi::Result<I32> counters) {
  const int64_t num_tokens = topk_idx.dimensions()[0], top_k = topk_idx.dimensions()[1];
  Checks checks(a.kOp);
  checks.Require(a.num_experts > 0 && a.num_experts % a.num_ranks == 0 && a.capacity > 0 &&
                     a.expert_alignment > 0 && a.capacity % a.expert_alignment == 0,
                 "num_experts must be a positive multiple of num_ranks, and capacity of "
                 "expert_alignment");
  checks.Require(num_tokens > 0 && top_k > 0 &&
                     a.num_ranks * num_tokens * top_k <= std::numeric_limits<int32_t>::max(),
                 "topk_idx must have ids, and those of all ranks must be below 2^31");
  checks.Require(a.num_experts <= gpu::kMaxExperts,
                 "num_experts must be at most " + std::to_string(gpu::kMaxExperts));
  checks.Require(top_k <= gpu::kMaxTopK, "k must be at most " + std::to_string(gpu::kMaxTopK));
  checks.Shape("send_row", *send_row, {num_tokens, top_k});
  checks.Shape("recv_src", *recv_src, {a.capacity});
  checks.Shape("recv_order", *recv_order, {a.capacity});
  checks.Shape("recv_offsets", *recv_offsets, {a.num_ranks * num_tokens + 1});
  checks.Shape("group_sizes", *group_sizes, {a.num_experts / a.num_ranks});
  checks.Shape("expert_counts", *expert_counts, {a.num_experts / a.num_ranks});
  checks.Shape("expert_load", *expert_load, {a.num_experts});
  checks.Shape("counters", *counters, {3});
  if (!checks.ok()) return checks.error();
  GroupCall group;
  if (ffi::Error e =
          EnterGroup(*state, ordinal, stream,
                     {{"topk_idx", topk_idx.untyped_data(), topk_idx.size_bytes()}}, &group);
      e.failure()) {
    return e;
  }
  group.Distinguish({num_tokens, top_k});
  const gpu::LayoutArguments arguments{group.At(topk_idx.typed_data()),
                                       num_tokens,
                                       top_k,
                                       a.num_experts,
                                       a.capacity,
                                       a.expert_alignment,
                                       send_row->typed_data(),
                                       recv_src->typed_data(),
                                       recv_order->typed_data(),
                                       recv_offsets->typed_data(),
                                       group_sizes->typed_data(),
                                       expert_counts->typed_data(),
                                       expert_load->typed_data(),
                                       counters->typed_data()};
  return CudaStatus(a.kOp, gpu::LaunchLayout(group, arguments, NumSms(ordinal, a.num_sms), stream));
}

// What dispatch and the gradient of combine, which is a form of it, have in common.
struct Tables {
  I32Matrix topk_idx, send_row;
  I32 recv_src, recv_order, recv_offsets, group_sizes;

  int64_t capacity() const { return recv_src.dimensions()[0]; }
  int64_t num_local_experts() const { return group_sizes.dimensions()[0]; }

  template <typename Attributes>
  void Check(const Attributes& a, Checks* checks) const {
    checks->Shape("topk_idx", topk_idx, {a.num_tokens, a.top_k});
    checks->Shape("send_row", send_row, {a.num_tokens, a.top_k});
    checks->Shape("recv_order", recv_order, {capacity()});
    checks->Shape("recv_offsets", recv_offsets, {a.num_ranks * a.num_tokens + 1});
    checks->Require(a.top_k <= gpu::kMaxTopK, "k must be at most " + std::to_string(gpu::kMaxTopK));
    checks->Require(num_local_experts() > 0, "group_sizes must not be empty");
  }

  template <typename Attributes>
  gpu::DispatchArguments Arguments(const Attributes& a, ffi::AnyBuffer x) const {
    gpu::DispatchArguments arguments{};
    arguments.x = x.untyped_data();
    arguments.topk_idx = topk_idx.typed_data();
    arguments.send_row = send_row.typed_data();
    arguments.recv_src = recv_src.typed_data();
    arguments.recv_order = recv_order.typed_data();
    arguments.recv_offsets = recv_offsets.typed_data();
    arguments.group_sizes = group_sizes.typed_data();
    arguments.num_tokens = a.num_tokens;
    arguments.top_k = a.top_k;
    arguments.capacity = capacity();
    arguments.num_local_experts = num_local_experts();
    arguments.num_channels = x.dimensions()[1];
    arguments.row_bytes = RowBytes(x);
    arguments.zero_tail = a.zero_tail != 0;
    return arguments;
  }

  // Peers write rows of this rank by their own numbers for it, so all sizes must agree.
  void Distinguish(ffi::AnyBuffer x, GroupCall* group) const {
    group->Distinguish({x.dimensions()[1], static_cast<int64_t>(x.element_type()), capacity(),
                        num_local_experts()});
  }

  static int64_t RowBytes(ffi::AnyBuffer x) {
    return x.dimensions()[1] * static_cast<int64_t>(ffi::ByteWidth(x.element_type()));
  }
};

ffi::Error Dispatch(cudaStream_t stream, int32_t ordinal, CudaSiteState* state,
                    DispatchAttributes a, I32 /*coordinates*/, ffi::AnyBuffer x, I32Matrix topk_idx,
                    I32Matrix send_row, I32 recv_src, I32 recv_order, I32 recv_offsets,
                    I32 group_sizes, ffi::RemainingArgs optional_in,
                    ffi::Result<ffi::AnyBuffer> tokens, ffi::RemainingRets optional_out) {
  const Tables tables{topk_idx, send_row, recv_src, recv_order, recv_offsets, group_sizes};
  const int64_t capacity = tables.capacity();
  const bool is_fp8 = a.quantization != 0;
  const bool keeps_fp8 = is_fp8 && a.dequantize == 0;
  const gpu::DispatchMode mode = !is_fp8     ? gpu::DispatchMode::kCopy
                                 : keeps_fp8 ? gpu::DispatchMode::kQuantize
                                             : gpu::DispatchMode::kDequantize;
  // Results after tokens: scales, weights.
  const size_t num_out = (keeps_fp8 ? 1 : 0) + (a.has_weights ? 1 : 0);
  Checks checks(a.kOp);
  checks.Shape("x", x, {a.num_tokens, -1});
  tables.Check(a, &checks);
  checks.Require(optional_in.size() == (a.has_weights ? 1u : 0u) && optional_out.size() == num_out,
                 "the number of operands or results disagrees with the attributes");
  if (!checks.ok()) return checks.error();
  const int64_t num_channels = x.dimensions()[1];
  const int64_t row_bytes = Tables::RowBytes(x);
  checks.Shape("tokens", *tokens, {capacity, num_channels});
  checks.Type("tokens", *tokens, keeps_fp8 ? ffi::F8E4M3FN : x.element_type());
  checks.Require(row_bytes % 16 == 0, "a row of x must be a multiple of 16 bytes");
  gpu::RowType type = gpu::RowType::kF32;
  if (is_fp8) {
    checks.Require(RowTypeOf(x.element_type(), &type), "fp8 needs x in bf16, f16 or f32");
    checks.Require(num_channels % gpu::kScaleBlock == 0 && num_channels <= gpu::kMaxFp8Channels,
                   "fp8 needs a hidden size that is a multiple of " +
                       std::to_string(gpu::kScaleBlock) + " and at most " +
                       std::to_string(gpu::kMaxFp8Channels));
  }
  float* scales = nullptr;
  size_t scales_bytes = 0;
  if (keeps_fp8) {
    auto out = *optional_out.get<ffi::AnyBuffer>(0);
    checks.Type("scales", *out, ffi::F32);
    checks.Shape("scales", *out, {capacity, num_channels / gpu::kScaleBlock});
    scales = static_cast<float*>(out->untyped_data());
    scales_bytes = out->size_bytes();
  }
  const float* topk_weights = nullptr;
  float* weights = nullptr;
  size_t weights_bytes = 0;
  if (a.has_weights) {
    const auto in = *optional_in.get<ffi::AnyBuffer>(0);
    auto out = *optional_out.get<ffi::AnyBuffer>(num_out - 1);
    checks.Type("topk_weights", in, ffi::F32);
    checks.Shape("topk_weights", in, {a.num_tokens, a.top_k});
    checks.Type("weights", *out, ffi::F32);
    checks.Shape("weights", *out, {capacity});
    topk_weights = static_cast<const float*>(in.untyped_data());
    weights = static_cast<float*>(out->untyped_data());
    weights_bytes = out->size_bytes();
  }
  if (!checks.ok()) return checks.error();
  const auto landing_bytes = static_cast<size_t>(
      a.num_ranks * a.num_tokens * gpu::LandingRowBytes(mode, num_channels, row_bytes));
  GroupCall group;
  if (ffi::Error e = EnterGroup(
          *state, ordinal, stream,
          {{"tokens", tokens->untyped_data(), tokens->size_bytes(), Use::kLanding, landing_bytes},
           {"weights", weights, weights_bytes, Use::kOutput},
           {"scales", scales, scales_bytes, Use::kOutput}},
          &group);
      e.failure()) {
    return e;
  }
  tables.Distinguish(x, &group);
  gpu::DispatchArguments arguments = tables.Arguments(a, x);
  arguments.topk_weights = topk_weights;
  arguments.tokens = tokens->untyped_data();
  arguments.scales = group.At(scales);
  arguments.weights = group.At(weights);
  arguments.landing = group.LandingOf(tokens->untyped_data());
  arguments.mode = mode;
  arguments.type = type;
  arguments.power_of_two_scales = a.quantization == 2;
  arguments.is_integer = IsInteger(x.element_type());
  const cudaError_t launched =
      gpu::LaunchDispatch(group, arguments, NumSms(ordinal, a.num_sms), stream);
  return CudaStatus(a.kOp, group.CopyOut(launched, stream));
}

ffi::Error Combine(cudaStream_t stream, int32_t ordinal, CudaSiteState* state, CombineAttributes a,
                   I32 /*coordinates*/, ffi::AnyBuffer y, I32Matrix topk_idx, I32Matrix send_row,
                   I32 recv_src, I32 recv_order, I32 recv_offsets, ffi::RemainingArgs optional_in,
                   ffi::Result<ffi::AnyBuffer> combined, ffi::RemainingRets optional_out) {
  const size_t num_values = a.has_values ? 1 : 0;
  const size_t num_weights = a.has_weights ? 1 : 0;
  const int64_t num_tokens = topk_idx.dimensions()[0], top_k = topk_idx.dimensions()[1];
  const int64_t capacity = recv_src.dimensions()[0];
  Checks checks(a.kOp);
  checks.Shape("y", y, {capacity, -1});
  checks.Require(num_tokens > 0 && top_k > 0, "topk_idx must have ids");
  checks.Require(a.num_experts > 0 && a.num_experts % a.num_ranks == 0,
                 "num_experts must be a positive multiple of num_ranks");
  checks.Shape("send_row", send_row, {num_tokens, top_k});
  checks.Shape("recv_order", recv_order, {capacity});
  checks.Shape("recv_offsets", recv_offsets, {a.num_ranks * num_tokens + 1});
  checks.Require(top_k <= gpu::kMaxTopK, "k must be at most " + std::to_string(gpu::kMaxTopK));
  checks.Require(
      optional_in.size() == num_weights + num_values && optional_out.size() == num_values + 1,
      "the number of operands or results disagrees with the attributes");
  gpu::RowType type = gpu::RowType::kF32;
  checks.Require(RowTypeOf(y.element_type(), &type), "y must be bf16, f16 or f32");
  if (!checks.ok()) return checks.error();
  const int64_t num_channels = y.dimensions()[1];
  checks.Require(num_channels * static_cast<int64_t>(ffi::ByteWidth(y.element_type())) % 16 == 0,
                 "a row of y must be a multiple of 16 bytes");
  checks.Shape("out", *combined, {num_tokens, num_channels});
  checks.Type("out", *combined, y.element_type());
  const float* weights = nullptr;
  const float* values = nullptr;
  float* collected = nullptr;
  size_t collected_bytes = 0;
  if (a.has_weights) {
    const auto in = *optional_in.get<ffi::AnyBuffer>(0);
    checks.Type("weights", in, ffi::F32);
    checks.Shape("weights", in, {capacity});
    weights = static_cast<const float*>(in.untyped_data());
  }
  if (a.has_values) {
    const auto in = *optional_in.get<ffi::AnyBuffer>(num_weights);
    auto out = *optional_out.get<ffi::AnyBuffer>(0);
    checks.Type("values", in, ffi::F32);
    checks.Shape("values", in, {capacity});
    checks.Shape("collected", *out, {num_tokens, top_k});
    checks.Type("collected", *out, ffi::F32);
    values = static_cast<const float*>(in.untyped_data());
    collected = static_cast<float*>(out->untyped_data());
    collected_bytes = out->size_bytes();
  }
  auto partial = *optional_out.get<ffi::AnyBuffer>(num_values);
  checks.Shape("partial", *partial, {a.num_ranks, num_tokens, num_channels});
  checks.Type("partial", *partial, y.element_type());
  if (!checks.ok()) return checks.error();
  GroupCall group;
  if (ffi::Error e =
          EnterGroup(*state, ordinal, stream,
                     {{"partial", partial->untyped_data(), partial->size_bytes(), Use::kScratch},
                      {"collected", collected, collected_bytes, Use::kOutput}},
                     &group);
      e.failure()) {
    return e;
  }
  group.Distinguish({num_tokens, top_k, num_channels, static_cast<int64_t>(y.element_type())});
  const gpu::CombineArguments arguments{y.untyped_data(),
                                        weights,
                                        values,
                                        topk_idx.typed_data(),
                                        send_row.typed_data(),
                                        recv_src.typed_data(),
                                        recv_order.typed_data(),
                                        recv_offsets.typed_data(),
                                        group.At(partial->untyped_data()),
                                        combined->untyped_data(),
                                        group.At(collected),
                                        num_tokens,
                                        top_k,
                                        a.num_experts / a.num_ranks,
                                        num_channels,
                                        type};
  const cudaError_t launched =
      gpu::LaunchCombine(group, arguments, NumSms(ordinal, a.num_sms), stream);
  return CudaStatus(a.kOp, group.CopyOut(launched, stream));
}

// Peers write rows of g where d_y will be; y, weights and d_weights are this rank's own.
ffi::Error CombineGradient(cudaStream_t stream, int32_t ordinal, CudaSiteState* state,
                           CombineGradientAttributes a, I32 /*coordinates*/, ffi::AnyBuffer g,
                           I32Matrix topk_idx, I32Matrix send_row, I32 recv_src, I32 recv_order,
                           I32 recv_offsets, I32 group_sizes, ffi::AnyBuffer y, F32 weights,
                           ffi::Result<ffi::AnyBuffer> d_y, ffi::Result<F32> d_weights) {
  const Tables tables{topk_idx, send_row, recv_src, recv_order, recv_offsets, group_sizes};
  const int64_t capacity = tables.capacity();
  gpu::RowType type = gpu::RowType::kF32;
  Checks checks(a.kOp);
  checks.Shape("g", g, {a.num_tokens, -1});
  checks.Require(RowTypeOf(g.element_type(), &type), "g must be bf16, f16 or f32");
  tables.Check(a, &checks);
  checks.Shape("weights", weights, {capacity});
  checks.Shape("d_weights", *d_weights, {capacity});
  if (!checks.ok()) return checks.error();
  const int64_t num_channels = g.dimensions()[1], row_bytes = Tables::RowBytes(g);
  checks.Require(row_bytes % 16 == 0, "a row of g must be a multiple of 16 bytes");
  checks.Require(
      row_bytes <= gpu::kMaxWeightedRowBytes,
      "a row of g must be at most " + std::to_string(gpu::kMaxWeightedRowBytes) + " bytes");
  checks.Shape("y", y, {capacity, num_channels});
  checks.Type("y", y, g.element_type());
  checks.Shape("d_y", *d_y, {capacity, num_channels});
  checks.Type("d_y", *d_y, g.element_type());
  if (!checks.ok()) return checks.error();
  constexpr gpu::DispatchMode kMode = gpu::DispatchMode::kWeighted;
  const auto landing_bytes = static_cast<size_t>(
      a.num_ranks * a.num_tokens * gpu::LandingRowBytes(kMode, num_channels, row_bytes));
  GroupCall group;
  if (ffi::Error e = EnterGroup(
          *state, ordinal, stream,
          {{"d_y", d_y->untyped_data(), d_y->size_bytes(), Use::kLanding, landing_bytes}}, &group);
      e.failure()) {
    return e;
  }
  tables.Distinguish(g, &group);
  gpu::DispatchArguments arguments = tables.Arguments(a, g);
  arguments.tokens = d_y->untyped_data();
  arguments.y = y.untyped_data();
  arguments.row_weights = weights.typed_data();
  arguments.dots = d_weights->typed_data();
  arguments.landing = group.LandingOf(d_y->untyped_data());
  arguments.mode = kMode;
  arguments.type = type;
  const cudaError_t launched =
      gpu::LaunchDispatch(group, arguments, NumSms(ordinal, a.num_sms), stream);
  return CudaStatus(a.kOp, group.CopyOut(launched, stream));
}

// What XLA passes to each operation.

// First of all the coordinates.
template <typename Attributes>
auto BindCall() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::State<CudaSiteState>>()
      .Attrs<Attributes>()
      .template Arg<I32>();
}

// Rows, then topk_idx, send_row, recv_src, recv_order, recv_offsets.
template <typename Attributes>
auto BindRowsAndTables() {
  return BindCall<Attributes>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<I32Matrix>()
      .template Arg<I32Matrix>()
      .template Arg<I32>()
      .template Arg<I32>()
      .template Arg<I32>();
}

auto LayoutBinding() {
  return BindCall<LayoutAttributes>()
      .Arg<I32Matrix>()
      .Ret<I32Matrix>()
      .Ret<I32>()
      .Ret<I32>()
      .Ret<I32>()
      .Ret<I32>()
      .Ret<I32>()
      .Ret<I32>()
      .Ret<I32>();
}

auto DispatchBinding() {
  return BindRowsAndTables<DispatchAttributes>()
      .Arg<I32>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

auto CombineBinding() {
  return BindRowsAndTables<CombineAttributes>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

auto CombineGradientBinding() {
  return BindRowsAndTables<CombineGradientAttributes>()
      .Arg<I32>()
      .Arg<ffi::AnyBuffer>()
      .Arg<F32>()
      .Ret<ffi::AnyBuffer>()
      .Ret<F32>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateLayoutCuda, InstantiateLayout,
                              ffi::Ffi::BindInstantiate().Attrs<LayoutAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateDispatchCuda, InstantiateDispatch,
                              ffi::Ffi::BindInstantiate().Attrs<DispatchAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateCombineCuda, InstantiateCombine,
                              ffi::Ffi::BindInstantiate().Attrs<CombineAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateCombineGradientCuda, InstantiateCombineGradient,
                              ffi::Ffi::BindInstantiate().Attrs<CombineGradientAttributes>());

// Whether XLA may record a call in a command buffer is a trait of the handler itself: not every CUDA
// plugin takes it at registration. So there are two of each; module.cc hands out either.
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCuda, Layout, LayoutBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCudaRecordable, Layout, LayoutBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDispatchCuda, Dispatch, DispatchBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDispatchCudaRecordable, Dispatch, DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineCuda, Combine, CombineBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineCudaRecordable, Combine, CombineBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineGradientCuda, CombineGradient, CombineGradientBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineGradientCudaRecordable, CombineGradient,
                              CombineGradientBinding(), {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
