// The CUDA handlers: decode, check, launch. Same targets and attributes as the CPU's; dispatch takes
// topk_idx and send_row too, and the scratch of combine is one result more.
#include "xla_ffi/handlers_cuda.h"

#include "xla_ffi/attributes.h"
#include "xla_ffi/call_site_cuda.h"
#include "xla_ffi/ffi_checks.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;
using I32 = ffi::Buffer<ffi::S32, 1>;
using I32Matrix = ffi::Buffer<ffi::S32, 2>;
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
  checks.Require(a.num_experts <= gpu::kMaxExperts,
                 "num_experts must be at most " + std::to_string(gpu::kMaxExperts));
  checks.Require(top_k <= gpu::kMaxTopK, "k must be at most " + std::to_string(gpu::kMaxTopK));
  checks.Shape("send_row", *send_row, {num_tokens, top_k});
  checks.Shape("recv_src", *recv_src, {a.capacity});
  checks.Shape("recv_order", *recv_order, {a.capacity});
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

ffi::Error Dispatch(cudaStream_t stream, int32_t ordinal, CudaSiteState* state,
                    DispatchAttributes a, I32 /*coordinates*/, ffi::AnyBuffer x, I32Matrix topk_idx,
                    I32Matrix send_row, I32 recv_src, I32 recv_order, I32 recv_offsets,
                    I32 group_sizes, ffi::RemainingArgs optional_in,
                    ffi::Result<ffi::AnyBuffer> tokens, ffi::RemainingRets optional_out) {
  const int64_t capacity = recv_src.dimensions()[0];
  const bool is_fp8 = a.quantization != 0;
  const bool keeps_fp8 = is_fp8 && a.dequantize == 0;
  const gpu::DispatchMode mode = !is_fp8     ? gpu::DispatchMode::kCopy
                                 : keeps_fp8 ? gpu::DispatchMode::kQuantize
                                             : gpu::DispatchMode::kDequantize;
  // Results after tokens: scales, weights.
  const size_t num_out = (keeps_fp8 ? 1 : 0) + (a.has_weights ? 1 : 0);
  Checks checks(a.kOp);
  checks.Shape("x", x, {a.num_tokens, -1});
  checks.Shape("topk_idx", topk_idx, {a.num_tokens, a.top_k});
  checks.Shape("send_row", send_row, {a.num_tokens, a.top_k});
  checks.Shape("recv_order", recv_order, {capacity});
  checks.Shape("recv_offsets", recv_offsets, {a.num_ranks * a.num_tokens + 1});
  checks.Require(a.top_k <= gpu::kMaxTopK, "k must be at most " + std::to_string(gpu::kMaxTopK));
  checks.Require(group_sizes.dimensions()[0] > 0, "group_sizes must not be empty");
  checks.Require(optional_in.size() == (a.has_weights ? 1u : 0u) && optional_out.size() == num_out,
                 "the number of operands or results disagrees with the attributes");
  if (!checks.ok()) return checks.error();
  const int64_t num_channels = x.dimensions()[1];
  const int64_t row_bytes = num_channels * static_cast<int64_t>(ffi::ByteWidth(x.element_type()));
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
  const int64_t num_local_experts = group_sizes.dimensions()[0];
  // Peers write rows of this rank by their own numbers for it, so all sizes must agree.
  group.Distinguish(
      {num_channels, static_cast<int64_t>(x.element_type()), capacity, num_local_experts});
  gpu::DispatchArguments arguments{};
  arguments.x = x.untyped_data();
  arguments.topk_weights = topk_weights;
  arguments.topk_idx = topk_idx.typed_data();
  arguments.send_row = send_row.typed_data();
  arguments.recv_src = recv_src.typed_data();
  arguments.recv_order = recv_order.typed_data();
  arguments.recv_offsets = recv_offsets.typed_data();
  arguments.group_sizes = group_sizes.typed_data();
  arguments.tokens = tokens->untyped_data();
  arguments.scales = group.At(scales);
  arguments.weights = group.At(weights);
  arguments.landing = group.LandingOf(tokens->untyped_data());
  arguments.num_tokens = a.num_tokens;
  arguments.top_k = a.top_k;
  arguments.capacity = capacity;
  arguments.num_local_experts = num_local_experts;
  arguments.num_channels = num_channels;
  arguments.row_bytes = row_bytes;
  arguments.mode = mode;
  arguments.type = type;
  arguments.power_of_two_scales = a.quantization == 2;
  arguments.zero_tail = a.zero_tail != 0;
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
  checks.Shape("send_row", send_row, {num_tokens, top_k});
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
    values = static_cast<const float*>(in.untyped_data());
    collected = static_cast<float*>(out->untyped_data());
    collected_bytes = out->size_bytes();
  }
  auto partial = *optional_out.get<ffi::AnyBuffer>(num_values);
  checks.Shape("partial", *partial, {a.num_ranks, num_tokens, num_channels});
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

// What XLA passes to each operation.

auto LayoutBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::State<CudaSiteState>>()
      .Attrs<LayoutAttributes>()
      .Arg<I32>()
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
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::State<CudaSiteState>>()
      .Attrs<DispatchAttributes>()
      .Arg<I32>()
      .Arg<ffi::AnyBuffer>()
      .Arg<I32Matrix>()
      .Arg<I32Matrix>()
      .Arg<I32>()
      .Arg<I32>()
      .Arg<I32>()
      .Arg<I32>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

auto CombineBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<ffi::State<CudaSiteState>>()
      .Attrs<CombineAttributes>()
      .Arg<I32>()
      .Arg<ffi::AnyBuffer>()
      .Arg<I32Matrix>()
      .Arg<I32Matrix>()
      .Arg<I32>()
      .Arg<I32>()
      .Arg<I32>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateLayoutCuda, InstantiateLayout,
                              ffi::Ffi::BindInstantiate().Attrs<LayoutAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateDispatchCuda, InstantiateDispatch,
                              ffi::Ffi::BindInstantiate().Attrs<DispatchAttributes>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiateCombineCuda, InstantiateCombine,
                              ffi::Ffi::BindInstantiate().Attrs<CombineAttributes>());

// Whether XLA may record a call in a command buffer is a trait of the handler itself: not every CUDA
// plugin takes it at registration. So there are two of each; module_cuda.cc hands out either.
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCuda, Layout, LayoutBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kLayoutCudaRecordable, Layout, LayoutBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDispatchCuda, Dispatch, DispatchBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kDispatchCudaRecordable, Dispatch, DispatchBinding(),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineCuda, Combine, CombineBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(kCombineCudaRecordable, Combine, CombineBinding(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_ep
