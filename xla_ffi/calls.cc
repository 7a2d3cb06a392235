#include "xla_ffi/calls.h"

#include <string>

#include "cuda/core/limits.h"
#include "cuda/network/rail/combine.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;
using Shape = std::initializer_list<int64_t>;

constexpr int64_t kAny = -1;

// Types narrower than a byte are packed by XLA, and FFI counts a byte for each: rows of them
// cannot be told apart.
bool IsWholeBytes(ffi::DataType type) {
  switch (type) {
    case ffi::S1:
    case ffi::S2:
    case ffi::S4:
    case ffi::U1:
    case ffi::U2:
    case ffi::U4:
    case ffi::F4E2M1FN:
      return false;
    default:
      return true;
  }
}

// Takes operands and results one after the other.
class Reader {
 public:
  Reader(ffi::RemainingArgs operands, ffi::RemainingRets results, Checks* checks)
      : operands_(operands), results_(results), checks_(checks) {}

  // Without a type, of any.
  Rows Operand(const char* name, std::optional<ffi::DataType> type, Shape shape) {
    const auto buffer = operands_.get<ffi::AnyBuffer>(num_operands_++);
    return buffer.has_value() ? Check(name, *buffer, type, shape) : Rows{};
  }

  Rows Result(const char* name, std::optional<ffi::DataType> type, Shape shape) {
    auto buffer = results_.get<ffi::AnyBuffer>(num_results_++);
    return buffer.has_value() ? Check(name, **buffer, type, shape) : Rows{};
  }

  Memory TopkIdx(const TableSizes& sizes) {
    return Operand("topk_idx", ffi::S32, {sizes.num_tokens, sizes.top_k});
  }

  void Layout(const TableSizes& sizes, OnLayout* call) {
    call->sizes = sizes;
    call->topk_idx = TopkIdx(sizes).as<int32_t>();
    TableView::ForEach(call->tables, sizes,
                       [&](const char* name, const int32_t*& table, Shape shape) {
                         table = Operand(name, ffi::S32, shape).as<int32_t>();
                       });
  }

  // All must have been taken, and none too many.
  void End() {
    if (num_operands_ != operands_.size() || num_results_ != results_.size()) {
      checks_->Fail("the number of operands or results disagrees with the attributes");
    }
  }

 private:
  Rows Check(const char* name, const ffi::AnyBuffer& buffer, std::optional<ffi::DataType> type,
             Shape shape) {
    checks_->Shape(name, buffer.dimensions(), shape);
    if (type) checks_->Type(name, buffer.element_type(), *type);
    Rows rows;
    rows.data = buffer.untyped_data();
    rows.bytes = buffer.size_bytes();
    rows.type = buffer.element_type();
    if (buffer.dimensions().size() > 0) rows.num_channels = buffer.dimensions().back();
    return rows;
  }

  const ffi::RemainingArgs operands_;
  const ffi::RemainingRets results_;
  Checks* const checks_;
  size_t num_operands_ = 0, num_results_ = 0;
};

void CheckSizes(const TableSizes& sizes, Checks* checks) {
  checks->Require(sizes.num_experts > 0 && sizes.num_experts % sizes.num_ranks == 0,
                  "num_experts must be a positive multiple of num_ranks");
  checks->Require(0 < sizes.capacity && sizes.capacity <= kMaxRows,
                  "capacity must be positive and at most " + std::to_string(kMaxRows));
  checks->Require(
      sizes.num_tokens > 0 && sizes.top_k > 0 &&
          sizes.num_tokens <= kMaxRows / sizes.top_k / sizes.num_ranks,
      "topk_idx must have ids, and those of all ranks must be at most " + std::to_string(kMaxRows));
}

// Experts begin at multiples of the alignment, those with room of their own fill the capacity, and
// the rows of all ranks, with all padding that the experts could get, are counted in int32.
void CheckRoom(const TableSizes& sizes, const Room& room, Checks* checks) {
  checks->Require(room.expert_alignment > 0 && room.capacity % room.expert_alignment == 0,
                  "capacity must be a positive multiple of expert_alignment");
  if (!checks->ok()) return;
  const int64_t num_ids = sizes.num_ranks * sizes.num_tokens * sizes.top_k;
  const int64_t num_local = sizes.num_local_experts();
  checks->Require(
      room.expert_capacity == 0 || (room.expert_capacity > 0 && room.capacity % num_local == 0 &&
                                    room.capacity / num_local == room.expert_capacity &&
                                    room.expert_capacity % room.expert_alignment == 0),
      "expert_capacity must be 0, or a multiple of expert_alignment with which the "
      "experts of a rank fill the capacity");
  checks->Require(room.expert_alignment <= (kMaxRows - num_ids) / sizes.num_experts,
                  "the ids of all ranks and num_experts * expert_alignment must come to at most " +
                      std::to_string(kMaxRows));
}

// What a layout's attributes say beside its sizes.
template <typename Attributes>
LayoutCall LayoutOf(const Attributes& a, Checks* checks) {
  LayoutCall call{};
  call.sizes = a.sizes();
  call.room = {a.capacity, a.expert_alignment, a.expert_capacity};
  CheckSizes(call.sizes, checks);
  CheckRoom(call.sizes, call.room, checks);
  return call;
}

void ReadResults(Reader* reader, LayoutCall* call) {
  const TableSizes& sizes = call->sizes;
  Tables<int32_t>::ForEach(call->tables, sizes,
                           [&](const char* name, int32_t*& table, Shape shape) {
                             table = reader->Result(name, ffi::S32, shape).as<int32_t>();
                           });
  const int64_t num_local_experts = sizes.num_local_experts();
  call->expert_counts = reader->Result("expert_counts", ffi::S32, {num_local_experts});
  call->expert_load = reader->Result("expert_load", ffi::S32, {sizes.num_experts});
  call->counters = reader->Result("counters", ffi::S32, {3});
}

// A dispatch, but for its operands and results: how rows cross and come out.
template <typename Attributes>
DispatchCall RowsOf(const Attributes& a, Checks* checks) {
  DispatchCall call{};
  call.sizes = a.sizes();
  call.quantization = static_cast<QuantizationKind>(a.quantization);
  call.dequantize = a.dequantize != 0;
  call.expand = a.expand != 0;
  call.zero_tail = a.zero_tail != 0;
  checks->Require(0 <= a.quantization && a.quantization <= 3, "quantization must be 0, 1, 2 or 3");
  checks->Require(call.is_quantised() || !call.dequantize, "there is nothing to dequantize");
  return call;
}

void ReadX(Reader* reader, DispatchCall* call, Checks* checks) {
  call->x = reader->Operand("x", std::nullopt, {call->sizes.num_tokens, kAny});
  checks->Require(IsWholeBytes(call->x.type), "x has an element type narrower than a byte");
  if (call->is_quantised()) {
    checks->Require(call->x.float_type().has_value(), "x must be bf16, f16 or f32 to be quantised");
    call->num_scales = num_block_scales(call->x.num_channels);
  }
  if (call->has_x_scales()) {
    checks->Require(call->x.type == ffi::F8E4M3FN || call->x.type == ffi::F8E5M2,
                    "x must be float8_e4m3fn or float8_e5m2 to come with scales");
  }
  if (call->has_x_scales() || call->is_quantised()) {
    checks->Require(call->x.num_channels % kRowAlignment == 0, "x must have a multiple of " +
                                                                   std::to_string(kRowAlignment) +
                                                                   " channels to cross as float8");
  }
}

// Of a dispatch, what comes after x and the layout, and its results.
void ReadRest(Reader* reader, bool has_weights, DispatchCall* call, Checks* checks) {
  const TableSizes& sizes = call->sizes;
  if (call->has_x_scales()) {
    const Rows scales = reader->Operand("x_scales", ffi::F32, {sizes.num_tokens, kAny});
    call->x_scales = scales;
    call->num_scales = scales.num_channels;
    checks->Require(call->num_scales > 0, "x_scales must have one for each row at least");
  }
  if (has_weights) {
    call->topk_weights = reader->Operand("topk_weights", ffi::F32, {sizes.num_tokens, sizes.top_k});
  }
  const int64_t num_rows = sizes.num_rows(call->expand);
  const bool becomes_fp8 = call->is_quantised() && !call->dequantize;
  call->tokens = reader->Result("tokens", becomes_fp8 ? ffi::F8E4M3FN : call->x.type,
                                {num_rows, call->x.num_channels});
  if (becomes_fp8 || call->has_x_scales()) {
    call->scales = reader->Result("scales", ffi::F32, {num_rows, call->num_scales});
  }
  if (has_weights) call->weights = reader->Result("weights", ffi::F32, {sizes.capacity});
}

}  // namespace

std::optional<FloatType> Rows::float_type() const {
  switch (type) {
    case ffi::F32:
      return FloatType::kF32;
    case ffi::F16:
      return FloatType::kF16;
    case ffi::BF16:
      return FloatType::kBF16;
    default:
      return std::nullopt;
  }
}

LayoutCall DecodeCall(const LayoutAttributes& a, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, Checks* checks) {
  LayoutCall call = LayoutOf(a, checks);
  if (!checks->ok()) return call;
  Reader reader(operands, results, checks);
  call.topk_idx = reader.TopkIdx(call.sizes);
  ReadResults(&reader, &call);
  reader.End();
  return call;
}

DispatchCall DecodeCall(const DispatchAttributes& a, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, Checks* checks) {
  CheckSizes(a.sizes(), checks);
  DispatchCall call = RowsOf(a, checks);
  if (!checks->ok()) return call;
  Reader reader(operands, results, checks);
  ReadX(&reader, &call, checks);
  reader.Layout(call.sizes, &call);
  ReadRest(&reader, a.has_weights != 0, &call, checks);
  reader.End();
  return call;
}

LayoutAndDispatchCall DecodeCall(const LayoutAndDispatchAttributes& a, ffi::RemainingArgs operands,
                                 ffi::RemainingRets results, Checks* checks) {
  LayoutAndDispatchCall call{LayoutOf(a, checks), RowsOf(a, checks)};
  if (!checks->ok()) return call;
  auto& [layout, dispatch] = call;
  Reader reader(operands, results, checks);
  ReadX(&reader, &dispatch, checks);
  layout.topk_idx = reader.TopkIdx(layout.sizes);
  ReadResults(&reader, &layout);
  dispatch.topk_idx = layout.topk_idx.as<int32_t>();
  const Tables<int32_t>& tables = layout.tables;
  dispatch.tables = {tables.send_row, tables.recv_src, tables.recv_order, tables.recv_offsets,
                     tables.group_sizes};
  ReadRest(&reader, a.has_weights != 0, &dispatch, checks);
  reader.End();
  return call;
}

int64_t CombineScratchBytes(const TableSizes& sizes, int64_t ranks_per_node, int64_t row_bytes,
                            bool has_values) {
  const gpu::rail::CombineScratch scratch{sizes.num_ranks / ranks_per_node,
                                          ranks_per_node,
                                          sizes.num_tokens,
                                          sizes.top_k,
                                          row_bytes,
                                          has_values};
  return round_up(scratch.num_bytes(), kRowAlignment);
}

CombineCall DecodeCall(const CombineAttributes& a, ffi::RemainingArgs operands,
                       ffi::RemainingRets results, Checks* checks, bool has_scratch) {
  CombineCall call{};
  call.ranks_per_node = a.ranks_per_node;
  call.expand = a.expand != 0;
  CheckSizes(a.sizes(), checks);
  checks->Require(a.ranks_per_node > 0 && a.num_ranks % a.ranks_per_node == 0,
                  "ranks_per_node must divide num_ranks");
  checks->Require(call.expand || a.has_weights == 0, "y has weights only where it is expanded");
  if (!checks->ok()) return call;
  Reader reader(operands, results, checks);
  call.y = reader.Operand("y", std::nullopt, {a.sizes().num_rows(call.expand), kAny});
  checks->Require(call.y.float_type().has_value(), "y must be bf16, f16 or f32");
  reader.Layout(a.sizes(), &call);
  if (a.has_weights) call.weights = reader.Operand("weights", ffi::F32, {a.capacity});
  if (a.has_values) call.values = reader.Operand("values", ffi::F32, {a.capacity});
  const int64_t num_channels = call.y.num_channels;
  call.out = reader.Result("out", call.y.type, {a.num_tokens, num_channels});
  if (a.has_values) {
    call.collected = reader.Result("collected", ffi::F32, {a.num_tokens, a.top_k});
  }
  if (has_scratch && a.ranks_per_node < a.num_ranks) {
    const int64_t bytes =
        CombineScratchBytes(a.sizes(), a.ranks_per_node, call.y.row_bytes(), a.has_values != 0);
    call.partial = reader.Result("partial", ffi::U8, {bytes});
  } else if (has_scratch) {
    call.partial = reader.Result("partial", call.y.type, {a.num_ranks, a.num_tokens, num_channels});
  }
  reader.End();
  return call;
}

CombineGradientCall DecodeCall(const CombineGradientAttributes& a, ffi::RemainingArgs operands,
                               ffi::RemainingRets results, Checks* checks) {
  CombineGradientCall call{};
  call.zero_tail = a.zero_tail != 0;
  CheckSizes(a.sizes(), checks);
  if (!checks->ok()) return call;
  Reader reader(operands, results, checks);
  call.g = reader.Operand("g", std::nullopt, {a.num_tokens, kAny});
  checks->Require(call.g.float_type().has_value(), "g must be bf16, f16 or f32");
  reader.Layout(a.sizes(), &call);
  call.y = reader.Operand("y", call.g.type, {a.capacity, call.g.num_channels});
  call.weights = reader.Operand("weights", ffi::F32, {a.capacity});
  call.d_y = reader.Result("d_y", call.g.type, {a.capacity, call.g.num_channels});
  call.d_weights = reader.Result("d_weights", ffi::F32, {a.capacity});
  reader.End();
  return call;
}

}  // namespace jax_ep
