// The CUDA handlers from a call of XLA's to the launch of a kernel, without XLA, a GPU or kernels:
// which kernels take a call, with what, and what is said where none does.
#include "xla_ffi/cuda/handlers.h"

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/memory/slots.h"
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

  Call(XLA_FFI_Handler* execute, int64_t num_tokens, int64_t top_k, int64_t capacity)
      : handler(execute), site(Site({0, 1}, kRanks)) {
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
  Call call(kCombineCuda, num_tokens, top_k, capacity);
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
  CHECK(flat.Kernels() == "combine");
  const uint64_t with_slots = flat.last_operations;
  Memory().Release(true);
  SetUp(0);
  CHECK(flat.Kernels() == "combine" && flat.last_operations == with_slots);
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
  Run("failures", Failures);
  return 0;
}
