// The CUDA handlers from a call of XLA's to the launch of a kernel, without XLA, a GPU or kernels:
// which kernels take a call, with what, and what is said where none does.
#include "xla_ffi/cuda/handlers.h"

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/rows/quantize.h"
#include "cuda/slots/fits.h"
#include "tests/native/fake_ffi.h"
#include "tests/native/symmetric_memory_support.h"

namespace jax_ep::test {
namespace {

namespace ffi = xla::ffi;

struct Launched {
  std::string kernel;
  gpu::GroupView group;
  int num_sms;
  cudaStream_t stream;
};
std::vector<Launched> g_launched;
gpu::LayoutArguments g_layout;
gpu::DispatchArguments g_dispatch;
gpu::CombineArguments g_combine;
gpu::LayoutAndDispatchArguments g_both;
gpu::QuantizeArguments g_quantize;
cudaError_t g_status = cudaSuccess;  // of the next launches

cudaError_t Note(const char* kernel, const gpu::GroupView& group, int num_sms,
                 cudaStream_t stream) {
  g_launched.push_back({kernel, group, num_sms, stream});
  return g_status;
}

}  // namespace
}  // namespace jax_ep::test

namespace jax_ep::gpu {

cudaError_t PrepareKernels() { return cudaSuccess; }
cudaError_t LaunchLayout(const GroupView& group, const LayoutArguments& arguments, int num_sms,
                         cudaStream_t stream) {
  test::g_layout = arguments;
  return test::Note("layout", group, num_sms, stream);
}
cudaError_t LaunchDispatch(const GroupView& group, const DispatchArguments& arguments, int num_sms,
                           cudaStream_t stream) {
  test::g_dispatch = arguments;
  return test::Note("dispatch", group, num_sms, stream);
}
cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& arguments, int num_sms,
                          cudaStream_t stream) {
  test::g_combine = arguments;
  return test::Note("combine", group, num_sms, stream);
}
cudaError_t LaunchQuantize(const QuantizeArguments& arguments, int num_sms, cudaStream_t stream) {
  test::g_quantize = arguments;
  return test::Note("quantize", {}, num_sms, stream);
}
cudaError_t LaunchLayoutAndDispatchInSlots(const GroupView& group,
                                           const LayoutAndDispatchArguments& arguments, int num_sms,
                                           cudaStream_t stream) {
  test::g_both = arguments;
  return test::Note("layout and dispatch in slots", group, num_sms, stream);
}
cudaError_t LaunchCombineInSlots(const GroupView& group, const CombineArguments& arguments,
                                 int num_sms, cudaStream_t stream) {
  test::g_combine = arguments;
  return test::Note("combine in slots", group, num_sms, stream);
}

}  // namespace jax_ep::gpu

namespace jax_ep::test {
namespace {

constexpr size_t kSlotBytes = 1 << 20;
constexpr int64_t kRanks = 2, kExperts = 6, kChannels = 8;

void SetUp(size_t slot_bytes, size_t staging_bytes = 0, bool staged_only = false) {
  Memory().Setup(0, 1, {0, 1}, {0, 1}, staging_bytes, staged_only, slot_bytes);
}

// A call of a handler, as XLA makes it. Arrays lie one after the other in real memory.
struct Call {
  XLA_FFI_Handler* handler;
  CudaSiteState site;
  Attributes attributes;
  std::vector<Array> operands, results;
  std::vector<char> memory = std::vector<char>(1 << 20);
  size_t used = 0;

  Call(OpKind kind, XLA_FFI_Handler* execute, int64_t num_tokens, int64_t top_k, int64_t capacity)
      : handler(execute), site(Site({0, 1}, kRanks)) {
    site.op = op_name(kind);
    attributes = {{"member_bases", std::vector<int64_t>{0, 1}},
                  {"member_sizes", std::vector<int64_t>{}},
                  {"member_strides", std::vector<int64_t>{}},
                  {"num_ranks", kRanks},
                  {"num_sms", int64_t{24}},
                  {"num_tokens", num_tokens},
                  {"top_k", top_k},
                  {"num_experts", kExperts},
                  {"capacity", capacity}};
  }
  Array At(ffi::DataType type, std::vector<int64_t> shape) {
    used = (used + 15) / 16 * 16 + 16;
    char* at = memory.data() + (16 - Address(memory.data()) % 16) + used;
    int64_t count = 1;
    for (int64_t size : shape) count *= size;
    used += static_cast<size_t>(count) * ffi::ByteWidth(type);
    CHECK(used + 32 <= memory.size());
    return {type, std::move(shape), at};
  }
  void AddTables(int64_t num_tokens, int64_t top_k, int64_t capacity, std::vector<Array>* to) {
    for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
             {num_tokens, top_k},
             {capacity},
             {capacity},
             {kRanks * num_tokens + 1},
             {kExperts / kRanks},
         }) {
      to->push_back(At(ffi::S32, shape));
    }
  }

  // The kernels that it comes to, of both ranks, whose calls must be of one kind.
  std::string Kernels() {
    std::string kernels;
    for (int ordinal : {0, 1}) {
      g_launched.clear();
      const std::string failure = Run(ordinal);
      if (!failure.empty()) std::fprintf(stderr, "%s\n", failure.c_str());
      CHECK(failure.empty() && !g_launched.empty());
      std::string names;
      uint64_t operations = 0;
      for (const Launched& launched : g_launched) {
        names += (names.empty() ? "" : ", ") + launched.kernel;
        operations = operations * 31 + launched.group.operation;
        CHECK(launched.group.rank == ordinal && launched.group.num_ranks == kRanks);
        CHECK(launched.num_sms == 24 && launched.stream == stream);
      }
      CHECK(ordinal == 0 || (names == kernels && operations == last_operations));
      kernels = names;
      last_operations = operations;
    }
    return kernels;
  }
  std::string Run(int ordinal) {
    return CallHandler(handler, &site, ordinal, stream, operands, results, attributes);
  }

  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(uintptr_t{77});
  uint64_t last_operations = 0;
};

// ---- combine -----------------------------------------------------------------------------------

Call CombineCallOf(int64_t num_tokens, int64_t top_k, bool expand = true) {
  const int64_t capacity = num_tokens * top_k;
  Call call(OpKind::kCombine, kCombineCuda, num_tokens, top_k, capacity);
  call.attributes["ranks_per_node"] = kRanks;
  call.attributes["has_weights"] = int64_t{expand};
  call.attributes["has_values"] = int64_t{1};
  call.attributes["expand"] = int64_t{expand};
  const int64_t num_rows = expand ? capacity : kRanks * num_tokens + 1;
  call.operands = {call.At(ffi::F32, {num_rows, kChannels}),
                   call.At(ffi::S32, {num_tokens, top_k})};
  call.AddTables(num_tokens, top_k, capacity, &call.operands);
  if (expand) call.operands.push_back(call.At(ffi::F32, {capacity}));
  call.operands.push_back(call.At(ffi::F32, {capacity}));
  call.results = {call.At(ffi::F32, {num_tokens, kChannels}),
                  call.At(ffi::F32, {num_tokens, top_k}),
                  call.At(ffi::F32, {kRanks, num_tokens, kChannels})};
  return call;
}

void Combine() {
  Call call = CombineCallOf(4, 2);
  SetUp(0);
  CHECK(call.Kernels() == "combine");
  const uint64_t general = call.last_operations;
  Memory().Release(true);

  SetUp(kSlotBytes);
  CHECK(call.Kernels() == "combine in slots");
  CHECK(call.last_operations != general);  // ranks that choose otherwise are in different calls
  const gpu::GroupView& group = g_launched[0].group;
  CHECK(group.slot_area_bytes == gpu::slot_area_bytes(kSlotBytes, 2));
  CHECK(Memory().SlotAreaBytes() == group.slot_area_bytes);
  CHECK(g_combine.y == call.operands[0].data && g_combine.topk_idx == call.operands[1].data);
  CHECK(g_combine.send_row == call.operands[2].data);
  CHECK(g_combine.recv_src == call.operands[3].data);
  CHECK(g_combine.recv_order == call.operands[4].data);
  CHECK(g_combine.recv_offsets == call.operands[5].data);
  CHECK(g_combine.weights == call.operands[7].data && g_combine.values == call.operands[8].data);
  CHECK(g_combine.out == call.results[0].data && g_combine.collected == call.results[1].data);
  CHECK(g_combine.num_tokens == 4 && g_combine.top_k == 2 && g_combine.num_local_experts == 3);
  CHECK(g_combine.num_channels == kChannels && g_combine.type == FloatType::kF32);
  CHECK(g_combine.expand);
  // What a slot does not take.
  CHECK(CombineCallOf(512, 2).Kernels() == "combine in slots");
  CHECK(CombineCallOf(513, 2).Kernels() == "combine");
  CHECK(CombineCallOf(512, 8).Kernels() == "combine in slots");
  CHECK(CombineCallOf(456, 9).Kernels() == "combine");
  Call flat = CombineCallOf(4, 2, /*expand=*/false);
  CHECK(flat.Kernels() == "combine in slots" && !g_combine.expand && g_combine.weights == nullptr);
  Memory().Release(true);

  // Slots that hold less than the call needs.
  SetUp(gpu::min_slot_bytes(2));
  CHECK(call.Kernels() == "combine" && call.last_operations == general);
  Memory().Release(true);

  // Peers touch none of its buffers, so that none need be staged.
  SetUp(0, 0, /*staged_only=*/true);
  CHECK(Contains(call.Run(0), "the other ranks cannot reach the memory of partial, collected"));
  Memory().Release(true);
  SetUp(kSlotBytes, 0, /*staged_only=*/true);
  CHECK(call.Kernels() == "combine in slots" && g_combine.collected == call.results[1].data);
  Memory().Release(true);
}

// ---- layout and dispatch -----------------------------------------------------------------------

struct Form {
  ffi::DataType type = ffi::F32;
  int64_t quantization = 0, dequantize = 0, expand = 1, has_weights = 1, num_scales = 1;
};

Call LayoutAndDispatchCallOf(int64_t num_tokens, int64_t top_k, Form form = {}) {
  const int64_t capacity = num_tokens * top_k * 3;
  Call call(OpKind::kLayoutAndDispatch, kLayoutAndDispatchCuda, num_tokens, top_k, capacity);
  const auto quantization = static_cast<QuantizationKind>(form.quantization);
  const bool has_x_scales = quantization == QuantizationKind::kGivenScales;
  const bool is_quantised = quantization != QuantizationKind::kNone && !has_x_scales;
  const int64_t num_channels = form.quantization == 0 ? kChannels : 16;
  call.attributes["expert_alignment"] = int64_t{1};
  call.attributes["expert_capacity"] = int64_t{0};
  call.attributes["has_weights"] = form.has_weights;
  call.attributes["zero_tail"] = int64_t{1};
  call.attributes["quantization"] = form.quantization;
  call.attributes["dequantize"] = form.dequantize;
  call.attributes["expand"] = form.expand;
  call.operands = {call.At(form.type, {num_tokens, num_channels}),
                   call.At(ffi::S32, {num_tokens, top_k})};
  if (has_x_scales) call.operands.push_back(call.At(ffi::F32, {num_tokens, form.num_scales}));
  if (form.has_weights != 0) call.operands.push_back(call.At(ffi::F32, {num_tokens, top_k}));
  call.AddTables(num_tokens, top_k, capacity, &call.results);
  for (int64_t size : {kExperts / kRanks, kExperts, int64_t{3}}) {
    call.results.push_back(call.At(ffi::S32, {size}));
  }
  const int64_t num_rows = form.expand != 0 ? capacity : kRanks * num_tokens + 1;
  const bool becomes_fp8 = is_quantised && form.dequantize == 0;
  call.results.push_back(
      call.At(becomes_fp8 ? ffi::F8E4M3FN : form.type, {num_rows, num_channels}));
  if (becomes_fp8 || has_x_scales) {
    call.results.push_back(call.At(ffi::F32, {num_rows, form.num_scales}));
  }
  if (form.has_weights != 0) call.results.push_back(call.At(ffi::F32, {capacity}));
  return call;
}

// The layout's arguments are the call's operand and results, whichever kernel takes them.
void CheckLayout(const gpu::LayoutArguments& a, const Call& call) {
  const std::vector<Array>& r = call.results;
  CHECK(a.topk_idx == call.operands[1].data);
  CHECK(a.send_row == r[0].data && a.recv_src == r[1].data && a.recv_order == r[2].data);
  CHECK(a.recv_offsets == r[3].data && a.group_sizes == r[4].data);
  CHECK(a.expert_counts == r[5].data && a.expert_load == r[6].data && a.counters == r[7].data);
  CHECK(a.num_tokens == 4 && a.top_k == 2 && a.num_experts == kExperts);
  CHECK(a.room.capacity == 24 && a.room.expert_alignment == 1 && a.room.expert_capacity == 0);
}

void LayoutAndDispatch() {
  Call call = LayoutAndDispatchCallOf(4, 2);
  SetUp(0);
  CHECK(call.Kernels() == "layout, dispatch");
  const uint64_t general = call.last_operations;
  // Two calls, for the device as well as for the peers.
  CHECK(g_launched[0].group.call + 1 == g_launched[1].group.call);
  CHECK(g_launched[0].group.operation != g_launched[1].group.operation);
  CheckLayout(g_layout, call);
  CHECK(g_dispatch.x == call.operands[0].data && g_dispatch.topk_idx == call.operands[1].data);
  CHECK(g_dispatch.topk_weights == call.operands[2].data);
  CHECK(g_dispatch.send_row == call.results[0].data && g_dispatch.recv_src == call.results[1].data);
  CHECK(g_dispatch.recv_order == call.results[2].data);
  CHECK(g_dispatch.recv_offsets == call.results[3].data);
  CHECK(g_dispatch.group_sizes == call.results[4].data);
  CHECK(g_dispatch.tokens == call.results[8].data && g_dispatch.weights == call.results[9].data);
  CHECK(g_dispatch.mode == gpu::DispatchMode::kCopy && g_dispatch.expand && g_dispatch.zero_tail);
  // One that fails is the last.
  g_status = cudaErrorInvalidValue;
  g_launched.clear();
  CHECK(call.Run(0) == "jax_ep_layout_and_dispatch: a fake error" && g_launched.size() == 1);
  g_status = cudaSuccess;
  Memory().Release(true);

  SetUp(kSlotBytes);
  CHECK(call.Kernels() == "layout and dispatch in slots" && call.last_operations != general);
  CHECK(g_launched[0].group.slot_area_bytes == gpu::slot_area_bytes(kSlotBytes, 2));
  CheckLayout(g_both, call);
  CHECK(g_both.x == call.operands[0].data && g_both.topk_weights == call.operands[2].data);
  CHECK(g_both.tokens == call.results[8].data && g_both.weights == call.results[9].data);
  CHECK(g_both.row_bytes == 32 && g_both.zero_tail && !g_both.is_integer);
  CHECK(g_both.expand && g_both.num_rows == 24);
  Call unzeroed = LayoutAndDispatchCallOf(4, 2);
  unzeroed.attributes["zero_tail"] = int64_t{0};
  CHECK(unzeroed.Kernels() == "layout and dispatch in slots" && !g_both.zero_tail);
  CHECK(LayoutAndDispatchCallOf(4, 2, {ffi::F32, 0, 0, 0}).Kernels() ==
        "layout and dispatch in slots");
  CHECK(!g_both.expand && g_both.num_rows == 9);
  // Integers, and float8 without scales, are rows as they are; weights may be absent.
  CHECK(LayoutAndDispatchCallOf(4, 2, {ffi::S32, 0, 0, 1, 0}).Kernels() ==
        "layout and dispatch in slots");
  CHECK(g_both.is_integer && g_both.topk_weights == nullptr && g_both.weights == nullptr);
  // Float8, in each form.
  using gpu::DispatchMode;
  const auto in_slots = [](const Form& form) {
    return LayoutAndDispatchCallOf(4, 2, form).Kernels() == "layout and dispatch in slots";
  };
  CHECK(in_slots({ffi::F32, 1}) && g_both.mode == DispatchMode::kQuantize);
  CHECK(!g_both.power_of_two_scales && g_both.scales != nullptr && g_both.num_scales == 1);
  CHECK(g_both.num_channels == 16 && g_both.row_bytes == 64 && g_both.type == FloatType::kF32);
  CHECK(in_slots({ffi::BF16, 2, 1}) && g_both.mode == DispatchMode::kDequantize);
  CHECK(g_both.power_of_two_scales && g_both.scales == nullptr && g_both.row_bytes == 32);
  CHECK(g_both.type == FloatType::kBF16);
  CHECK(in_slots({ffi::F8E4M3FN, 3, 0, 1, 1, 4}) && g_both.mode == DispatchMode::kScaled);
  CHECK(g_both.x_scales != nullptr && g_both.scales != nullptr && g_both.num_scales == 4);
  CHECK(g_both.row_bytes == 16 && g_both.expand && g_both.num_rows == 24);
  // Likewise not expanded.
  CHECK(in_slots({ffi::F8E4M3FN, 3, 0, 0, 0, 4}) && g_both.mode == DispatchMode::kScaled);
  CHECK(!g_both.expand && g_both.num_rows == 9 && g_both.num_scales == 4);
  CHECK(in_slots({ffi::BF16, 1, 0, 0, 0}) && g_both.mode == DispatchMode::kQuantize);
  CHECK(!g_both.expand && g_both.num_rows == 9 && g_both.scales != nullptr);
  CHECK(in_slots({ffi::BF16, 1, 1, 0, 0}) && g_both.mode == DispatchMode::kDequantize);
  CHECK(!g_both.expand && g_both.num_rows == 9 && g_both.scales == nullptr);
  // What a slot does not take: too many tokens, scales that are no whole vectors.
  CHECK(LayoutAndDispatchCallOf(512, 2).Kernels() == "layout and dispatch in slots");
  CHECK(LayoutAndDispatchCallOf(513, 2).Kernels() == "layout, dispatch");
  CHECK(!in_slots({ffi::F8E4M3FN, 3}) && g_dispatch.scales != nullptr);
  // The general kernels' operation does not depend on whether there are slots.
  Memory().Release(true);
  SetUp(gpu::min_slot_bytes(2));
  CHECK(call.Kernels() == "layout, dispatch" && call.last_operations == general);
  Memory().Release(true);

  // Only the general kernels need a staging region; each of the two has all of it.
  SetUp(kSlotBytes, 0, /*staged_only=*/true);
  CHECK(call.Kernels() == "layout and dispatch in slots");
  Memory().Release(true);
  SetUp(0, 256, /*staged_only=*/true);
  CHECK(Contains(call.Run(0),
                 "jax_ep_layout_and_dispatch: the other ranks cannot reach the memory "
                 "of tokens, weights"));
  Memory().Release(true);
  SetUp(0, 2048, /*staged_only=*/true);
  CHECK(call.Kernels() == "layout, dispatch");
  CHECK(g_layout.topk_idx != call.operands[1].data && g_dispatch.landing == g_layout.topk_idx);
  Memory().Release(true);
}

// Refused before anything is launched.
void WrongCalls() {
  SetUp(kSlotBytes);
  g_launched.clear();
  const auto complaint = [](const auto& change) {
    Call call = LayoutAndDispatchCallOf(4, 2);
    change(&call);
    return call.Run(0);
  };
  const std::string op = "jax_ep_layout_and_dispatch: ";
  CHECK(complaint([](Call* c) { c->operands[1].shape = {4, 3}; }) ==
        op + "topk_idx has shape [4, 3], expected [4, 2]");
  CHECK(complaint([](Call* c) { c->results[9].shape = {23}; }) ==
        op + "weights has shape [23], expected [24]");
  CHECK(complaint([](Call* c) { c->results.pop_back(); }) ==
        op + "the number of operands or results disagrees with the attributes");
  for (int i : {0, 8}) {
    CHECK(complaint([i](Call* c) {
            Array& rows = i == 0 ? c->operands[0] : c->results[8];
            rows.data = static_cast<char*>(rows.data) + 4;
          }) == op + (i == 0 ? "x" : "tokens") + " must lie at a multiple of 16 bytes");
  }
  CHECK(complaint([](Call* c) {
          c->operands[0].shape = {4, 7};
          c->results[8].shape = {24, 7};
        }) == op + "a row of x must be a multiple of 16 bytes");
  CHECK(complaint([](Call* c) { c->attributes["expert_capacity"] = int64_t{5}; }) ==
        op + "expert_capacity must be 0, or a multiple of expert_alignment with which the experts "
             "of a rank fill the capacity");
  CHECK(Contains(complaint([](Call* c) { c->attributes.erase("expand"); }),
                 "expected 16 attributes but got 15"));
  CHECK(g_launched.empty());
  Memory().Release(true);
}

// ---- operands and results of no bytes ----------------------------------------------------------

// A layout, a dispatch on it, and combine's gradient, of 4 tokens with 2 experts each.
Call LayoutCallOf() {
  Call call(OpKind::kLayout, Poisoned<kLayoutCuda>, 4, 2, 8);
  call.attributes["expert_alignment"] = int64_t{1};
  call.attributes["expert_capacity"] = int64_t{0};
  call.operands = {call.At(ffi::S32, {4, 2})};
  call.AddTables(4, 2, 8, &call.results);
  for (int64_t size : {kExperts / kRanks, kExperts, int64_t{3}}) {
    call.results.push_back(call.At(ffi::S32, {size}));
  }
  return call;
}

// Rows with given scales have them as an operand and as a result.
Call DispatchCallOf(bool has_scales) {
  Call call(OpKind::kDispatch, Poisoned<kDispatchCuda>, 4, 2, 8);
  call.attributes["has_weights"] = int64_t{1};
  call.attributes["zero_tail"] = int64_t{1};
  call.attributes["quantization"] = int64_t{has_scales ? 3 : 0};
  call.attributes["dequantize"] = int64_t{0};
  call.attributes["expand"] = int64_t{1};
  const ffi::DataType type = has_scales ? ffi::F8E4M3FN : ffi::F32;
  call.operands = {call.At(type, {4, 16}), call.At(ffi::S32, {4, 2})};
  call.AddTables(4, 2, 8, &call.operands);
  if (has_scales) call.operands.push_back(call.At(ffi::F32, {4, 2}));
  call.operands.push_back(call.At(ffi::F32, {4, 2}));
  call.results = {call.At(type, {8, 16})};
  if (has_scales) call.results.push_back(call.At(ffi::F32, {8, 2}));
  call.results.push_back(call.At(ffi::F32, {8}));
  return call;
}

Call CombineGradientCallOf() {
  Call call(OpKind::kCombineGradient, Poisoned<kCombineGradientCuda>, 4, 2, 8);
  call.attributes["zero_tail"] = int64_t{1};
  call.operands = {call.At(ffi::F32, {4, kChannels}), call.At(ffi::S32, {4, 2})};
  call.AddTables(4, 2, 8, &call.operands);
  call.operands.push_back(call.At(ffi::F32, {8, kChannels}));
  call.operands.push_back(call.At(ffi::F32, {8}));
  call.results = {call.At(ffi::F32, {8, kChannels}), call.At(ffi::F32, {8})};
  return call;
}

// XLA has no memory for an array of no bytes: its address is null.
void Empty(size_t dimension, Array* array) {
  array->shape[dimension] = 0;
  array->data = nullptr;
}

// Every operand and every result, in each of its dimensions; then all rows of a call at once, whose
// shapes agree. Each is an error that says what is wrong, before anything is launched.
void NoBytes() {
  SetPoisonOutputs(true);
  SetUp(0);
  Call both = LayoutAndDispatchCallOf(4, 2), combine = CombineCallOf(4, 2);
  both.handler = Poisoned<kLayoutAndDispatchCuda>;
  combine.handler = Poisoned<kCombineCuda>;
  Call calls[] = {LayoutCallOf(), DispatchCallOf(false),  DispatchCallOf(true), both,
                  combine,        CombineGradientCallOf()};
  for (Call& call : calls) {
    const std::string op = std::string(call.site.op) + ": ";
    CHECK(!call.Kernels().empty());
    g_launched.clear();
    for (std::vector<Array>* arrays : {&call.operands, &call.results}) {
      for (Array& array : *arrays) {
        for (size_t d = 0; d < array.shape.size(); ++d) {
          const Array saved = array;
          Empty(d, &array);
          const std::string failure = call.Run(0);
          CHECK(failure.rfind(op, 0) == 0 && g_launched.empty());
          const bool is_of_scales = failure.find("x_scales must have one") != failure.npos;
          CHECK(is_of_scales || Contains(failure, " has shape ["));
          array = saved;
        }
      }
    }
    for (const char* size : {"num_tokens", "top_k", "num_experts", "capacity"}) {
      const auto saved = call.attributes[size];
      call.attributes[size] = int64_t{0};
      CHECK(call.Run(0).rfind(op, 0) == 0 && g_launched.empty());
      call.attributes[size] = saved;
    }
  }
  const auto without_channels = [](Call* call, std::initializer_list<Array*> rows) {
    for (Array* array : rows) Empty(array->shape.size() - 1, array);
    return call->Run(0);
  };
  const std::string channels = " must have channels";
  Call& dispatch = calls[1];
  CHECK(without_channels(&dispatch, {&dispatch.operands[0], &dispatch.results[0]}) ==
        "jax_ep_dispatch: x" + channels);
  CHECK(without_channels(&both, {&both.operands[0], &both.results[8]}) ==
        "jax_ep_layout_and_dispatch: x" + channels);
  CHECK(without_channels(&combine, {&combine.operands[0], &combine.results[0],
                                    &combine.results[2]}) == "jax_ep_combine: y" + channels);
  Call& gradient = calls[5];
  CHECK(without_channels(&gradient,
                         {&gradient.operands[0], &gradient.operands[7], &gradient.results[0]}) ==
        "jax_ep_combine_gradient: g" + channels);
  CHECK(g_launched.empty());
  Memory().Release(true);
}

// ---- groups across nodes -----------------------------------------------------------------------

gpu::NetworkGroup g_network;

gpu::NetworkPart FakeNetwork() {
  gpu::NetworkPart part{};
  part.control_bytes = sizeof(gpu::ControlBlock);
  part.view_bytes = sizeof(gpu::GroupView);
  part.region_bytes = int64_t{64} << 20;
  part.num_processes = 4;
  part.launch_layout = [](const gpu::GroupView& group, const gpu::NetworkGroup& network,
                          const gpu::LayoutArguments& arguments, int num_sms, cudaStream_t stream) {
    g_layout = arguments;
    g_network = network;
    return Note("layout over the network", group, num_sms, stream);
  };
  part.launch_dispatch = [](const gpu::GroupView& group, const gpu::NetworkGroup& network,
                            const gpu::DispatchArguments& arguments, int num_sms,
                            cudaStream_t stream) {
    g_dispatch = arguments;
    g_network = network;
    return Note("dispatch over the network", group, num_sms, stream);
  };
  part.launch_combine = [](const gpu::GroupView& group, const gpu::NetworkGroup& network,
                           const gpu::CombineArguments& arguments, int num_sms,
                           cudaStream_t stream) {
    g_combine = arguments;
    g_network = network;
    return Note("combine over the network", group, num_sms, stream);
  };
  part.launch_tell = [](const gpu::GroupView& group, const gpu::NetworkGroup& network,
                        cudaStream_t stream) {
    g_network = network;
    return Note("telling the other nodes", group, 0, stream);
  };
  part.launch_layout_and_dispatch =
      [](const gpu::GroupView& group, const gpu::NetworkGroup& network,
         const gpu::LayoutAndDispatchArguments& arguments, int num_sms, cudaStream_t stream) {
        g_both = arguments;
        g_network = network;
        return Note("layout and dispatch in slots over the network", group, num_sms, stream);
      };
  part.launch_combine_in_slots = [](const gpu::GroupView& group, const gpu::NetworkGroup& network,
                                    const gpu::CombineArguments& arguments, int num_sms,
                                    cudaStream_t stream) {
    g_combine = arguments;
    g_network = network;
    return Note("combine in slots over the network", group, num_sms, stream);
  };
  return part;
}

// Of four processes with a device each, on two hosts, two groups of two.
void AcrossNodes() {
  Memory().Setup(0, 4, {0}, {0}, 0, false, kSlotBytes);
  constexpr int64_t kProcess = int64_t{1} << 32;
  const auto on = [](Call call, std::vector<int64_t> members) {
    call.site.groups = Groups(std::move(members), {}, {}, kRanks);
    return call;
  };
  const std::vector<int64_t> dp_ep{0, kProcess, 2 * kProcess, 3 * kProcess};
  const std::vector<int64_t> ep_dp{0, 2 * kProcess, kProcess, 3 * kProcess};
  Call call = on(LayoutAndDispatchCallOf(4, 2), ep_dp);
  const std::string op = "jax_ep_layout_and_dispatch: ";
  g_launched.clear();
  CHECK(Contains(call.Run(0), op + "rank 1 lives on device 0 of process 2, which this process is"));
  Network::Get().Join(FakeNetwork(), {"a", "a", "b", "b"}, 0, false);

  // As two calls, where a node has slots too, each on this node's view and the network's.
  CHECK(call.Run(0).empty() && g_launched.size() == 2);
  for (const Launched& launched : g_launched) {
    CHECK(launched.group.num_ranks == 1 && launched.group.rank == 0);
    CHECK(launched.num_sms == 24 && launched.stream == call.stream);
  }
  CHECK(g_launched[0].kernel == "layout over the network");
  CHECK(g_launched[1].kernel == "dispatch over the network");
  CHECK(g_launched[0].group.operation != g_launched[1].group.operation);
  CheckLayout(g_layout, call);
  CHECK(g_dispatch.x == call.operands[0].data && g_dispatch.tokens == call.results[8].data);
  CHECK(g_dispatch.weights == call.results[9].data && g_dispatch.landing == nullptr);
  const gpu::NodesView& nodes = g_launched[0].group.nodes;
  CHECK(nodes.rank == 0 && nodes.num_ranks == kRanks && nodes.given_up != nullptr);
  CHECK(g_network.dispatch.node == 0 && g_network.dispatch.ranks_per_node == 1);
  CHECK(g_network.pe[0] == 0 && g_network.pe[1] == 2);
  // The other axis lies on a node, whose other process this one has not met here.
  g_launched.clear();
  CHECK(Contains(on(LayoutAndDispatchCallOf(4, 2), dp_ep).Run(0), op + "rank 1 lives on device 0"));

  // What kernels over the network do not take. A layout comes before its dispatch.
  const auto refusal = [&](Call refused) { return on(std::move(refused), ep_dp).Run(0); };
  const std::string over = op + "over the network ";
  CHECK(Contains(refusal(LayoutAndDispatchCallOf(4, 2, {ffi::BF16, 2, 1})),
                 op + "the program quantises rows for a group on one node: compile it where"));
  CHECK(g_launched.size() == 1);
  for (const Launched& launched : g_launched) CHECK(launched.kernel == "layout over the network");
  // Rows with scales do, and not expanded.
  CHECK(refusal(LayoutAndDispatchCallOf(4, 2, {ffi::F8E4M3FN, 3, 0, 0, 1, 4})).empty());
  CHECK(g_dispatch.mode == gpu::DispatchMode::kScaled && !g_dispatch.expand);
  CHECK(g_dispatch.scales != nullptr && g_dispatch.x_scales != nullptr);

  // Combine, whose program says how many ranks of a node it sums first, and has scratch for that.
  g_launched.clear();
  const auto combine_of = [&](int64_t ranks_per_node, bool expand = true) {
    Call made = on(CombineCallOf(4, 2, expand), ep_dp);
    made.attributes["ranks_per_node"] = ranks_per_node;
    if (ranks_per_node < kRanks) {  // sums, values, and whether there is one, of each node
      made.results.back() = made.At(ffi::U8, {2 * 4 * 32 + 2 * 4 * 2 * 4 + 2 * 4 + 8});
    }
    return made;
  };
  Call combine = combine_of(1);
  CHECK(combine.Run(0).empty() && g_launched.size() == 1);
  CHECK(g_launched[0].kernel == "combine over the network" && g_launched[0].group.num_ranks == 1);
  CHECK(g_combine.partial == combine.results.back().data);
  CHECK(g_combine.y == combine.operands[0].data && g_combine.out == combine.results[0].data);
  CHECK(g_network.combine.node == 0 && g_network.combine.at.num_nodes == 2);
  CHECK(g_network.combine.memory.bytes != g_network.dispatch.memory.bytes);
  CHECK(g_network.combine.chunks != g_network.dispatch.chunks);
  CHECK(Contains(combine_of(2).Run(0),
                 "jax_ep_combine: the program sums over nodes of 2 ranks, but the group has 1 on"));
  g_launched.clear();
  g_status = cudaErrorInvalidValue;
  CHECK(call.Run(0) == op + "a fake error" && g_launched.size() == 1);
  g_status = cudaSuccess;

  // In place of a call of a broken group the other nodes are told.
  Memory().SetHosts({"a", "a", "b", "b"});
  gpu::ErrorRecord& record = *g_launched[0].group.error;
  record.kind = static_cast<uint32_t>(OpKind::kDispatch);
  record.phase = gpu::kStart;
  record.peer_slot = gpu::slot_of_process(2);
  record.valid = 1;
  g_launched.clear();
  CHECK(Contains(call.Run(0),
                 "jax_ep_dispatch: device 0 (process 0) waited for rank 1 of the group "
                 "across nodes (process 2 on b) to come until the timeout"));
  CHECK(g_launched.size() == 1 && g_launched[0].kernel == "telling the other nodes");
  CHECK(g_launched[0].group.nodes.given_up != nullptr && g_launched[0].stream == call.stream);
  record.valid = 0;

  // With slots between nodes small calls go through those, in every form, on any number of SMs; calls
  // that do not fit go as without.
  Network::Get().Leave();
  Network::Get().Join(FakeNetwork(), {"a", "a", "b", "b"}, 0, true);
  const auto kernels_of = [&](Call made) {
    g_launched.clear();
    CHECK(on(std::move(made), ep_dp).Run(0).empty());
    std::string names;
    for (const Launched& launched : g_launched) {
      names += (names.empty() ? "" : ", ") + launched.kernel;
    }
    return names;
  };
  const std::string both = "layout and dispatch in slots over the network";
  CHECK(kernels_of(LayoutAndDispatchCallOf(4, 2)) == both && g_both.expand);
  CHECK(g_network.slots.at.num_far == 1 && g_network.pe[1] == 2);
  CHECK(g_launched[0].group.num_ranks == 1 && g_launched[0].group.nodes.num_ranks == 2);
  CHECK(kernels_of(LayoutAndDispatchCallOf(4, 2, {ffi::BF16, 2, 1})) == both);
  CHECK(g_both.mode == gpu::DispatchMode::kDequantize);
  CHECK(kernels_of(LayoutAndDispatchCallOf(4, 2, {ffi::F8E4M3FN, 3, 0, 0, 1, 4})) == both);
  CHECK(g_both.mode == gpu::DispatchMode::kScaled && !g_both.expand);
  Call few = LayoutAndDispatchCallOf(4, 2);
  few.attributes["num_sms"] = int64_t{1};
  CHECK(kernels_of(std::move(few)) == both);
  CHECK(kernels_of(combine_of(1)) == "combine in slots over the network" && g_combine.expand);
  CHECK(kernels_of(combine_of(1, /*expand=*/false)) == "combine in slots over the network");
  CHECK(!g_combine.expand);
  CHECK(kernels_of(LayoutAndDispatchCallOf(513, 2)) ==
        "layout over the network, dispatch over the network");
  CHECK(Contains(refusal(LayoutAndDispatchCallOf(513, 2, {ffi::BF16, 2, 1})),
                 op + "JAX_EP_NETWORK_SLOTS=1 demands slots between nodes for fp8, but they,"));

  // A heap that has room for the general way alone.
  Network::Get().Leave();
  gpu::NetworkPart small_heap = FakeNetwork();
  small_heap.region_bytes = gpu::least_region_bytes(4, 2);
  Network::Get().Join(small_heap, {"a", "a", "b", "b"}, 0, true);
  CHECK(Contains(refusal(LayoutAndDispatchCallOf(4, 2, {ffi::BF16, 2, 1})),
                 op + "JAX_EP_NETWORK_SLOTS=1 demands slots between nodes for fp8, but they,"));

  // Ranks of one host that count as nodes.
  Network::Get().Leave();
  Network::Get().Join(FakeNetwork(), {"a", "a", "a", "a"}, 1, false);
  g_launched.clear();
  CHECK(on(LayoutAndDispatchCallOf(4, 2), dp_ep).Run(0).empty() && g_launched.size() == 2);
  CHECK(g_network.pe[0] == 0 && g_network.pe[1] == 1 && g_network.dispatch.at.num_nodes == 2);
  Network::Get().Leave();
  Memory().Release(true);
}

// Rows of this device alone, whether or not it is set up.
void Quantize() {
  alignas(16) char memory[2048];
  Array x{ffi::BF16, {3, 144}, memory}, values{ffi::F8E4M3FN, {3, 144}, memory + 1024},
      scales{ffi::F32, {3, 2}, memory + 1536};
  const auto run = [&] {
    return CallHandler(kQuantizeCuda, nullptr, 0, nullptr, {x}, {values, scales},
                       {{"num_sms", int64_t{12}}, {"power_of_two_scales", int64_t{1}}});
  };
  g_launched.clear();
  CHECK(run().empty() && g_launched.size() == 1 && g_launched[0].num_sms == 12);
  CHECK(g_quantize.x == x.data && g_quantize.values == values.data);
  CHECK(g_quantize.scales == scales.data && g_quantize.power_of_two_scales);
  CHECK(g_quantize.num_rows == 3 && g_quantize.num_channels == 144);
  CHECK(g_quantize.type == FloatType::kBF16);
  const std::string op = "jax_ep_quantize: ";
  x.type = ffi::S32;
  CHECK(run() == op + "x must be bf16, f16 or f32");
  x.type = ffi::F32;
  CHECK(run().empty() && g_quantize.type == FloatType::kF32);
  scales.shape = {3, 1};
  CHECK(run() == op + "scales has shape [3, 1], expected [3, 2]");
  scales.shape = {3, 2};
  values.type = ffi::F8E5M2;
  CHECK(Contains(run(), op + "values has element type"));
  values.type = ffi::F8E4M3FN;
  values.data = memory + 1025;
  CHECK(run() == op + "rows must lie at a multiple of 16 bytes");
  values.data = memory + 1024;
  x.shape = values.shape = {3, 136};
  CHECK(Contains(run(), op + "x must have a multiple of 16 channels, at most 32768"));
  x.shape = {3};
  CHECK(Contains(run(), op + "x has shape [3], expected [any, any]"));
}

// In slots too a launch that fails is an error, and a broken group's call is refused and told of.
void Failures() {
  SetUp(kSlotBytes);
  Call call = CombineCallOf(4, 2);
  g_status = cudaErrorInvalidValue;
  CHECK(call.Run(0) == "jax_ep_combine: a fake error");
  g_status = cudaSuccess;
  const View first({0, 1}, 0), second({0, 1}, 1);
  first.error->kind = static_cast<uint32_t>(OpKind::kLayoutAndDispatch);
  first.error->phase = gpu::kEnd;
  first.error->expected_epoch = 3;
  first.error->seen_epoch = 2;
  first.error->peer_slot = 1;
  first.error->valid = 1;
  g_launched.clear();
  CHECK(Contains(call.Run(0),
                 "jax_ep_layout_and_dispatch: device 0 waited for device 1 to finish until the "
                 "timeout (expected epoch 3, seen 2); the group is broken"));
  CHECK(g_launched.empty() && second.control->given_up == gpu::given_up_of(0, 1));
  Memory().Release(true);
  CHECK(Contains(call.Run(0), "jax_ep.finalize() has been called"));
}

}  // namespace
}  // namespace jax_ep::test

int main() {
  using namespace jax_ep::test;
  jax_ep::CudaSiteState::id.type_id = 1;  // as if it were registered
  Run("combine", Combine);
  Run("layout and dispatch", LayoutAndDispatch);
  Run("wrong calls", WrongCalls);
  Run("no bytes", NoBytes);
  Run("across nodes", AcrossNodes);
  Run("quantize", Quantize);
  Run("failures", Failures);
  return 0;
}
