// Calls that cannot end well: a rank that never comes, and one that stops on the way.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

bool AllOnes(const std::vector<uint8_t>& bytes, RowType type) {
  for (size_t i = 0; i + TypeBytes(type) <= bytes.size(); i += TypeBytes(type)) {
    if (!std::isnan(ReadNumber(type, bytes.data() + i))) return false;
  }
  return true;
}

bool AllNan(const std::vector<float>& numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](float v) { return std::isnan(v); });
}

bool AllAre(const std::vector<int32_t>& numbers, int32_t value) {
  return std::all_of(numbers.begin(), numbers.end(), [&](int32_t v) { return v == value; });
}

// Ends the program if a stream does not come to its end: a hang would end nothing.
void SynchronizeOrDie(cudaStream_t stream) {
  const auto start = std::chrono::steady_clock::now();
  cudaError_t status;
  while ((status = cudaStreamQuery(stream)) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(30)) {
      std::printf("a kernel does not end\n");
      std::_Exit(1);
    }
  }
  CHECK_CUDA(status);
}

}  // namespace

// Rank 1 comes to the call of rank 0, as its start mail says, does the first `num_units` units, as
// its progress says, and then nothing more: the kernel, which is in the middle of its work, ends by
// its timeout and leaves NaN, a layout -1 and 0. One block has all units, which is more than its
// rings and tables hold at once.
void TestBreakOnTheWay(int num_tokens, uint64_t num_units) {
  enum Op { kLayout, kDispatch, kCombine, kGradient };
  const Case c{num_tokens, 2, 2, 1, 64, RowType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 2, 11);
  Buffers b(d, 0), other(d, 1);
  for (const Op op : {kDispatch, kCombine, kGradient, kLayout}) {
    const Group group;  // of its own: it will be broken
    const GroupView view = group.View(0, 2, 5, kSecond / 2);
    b.WriteTables(d, 0);
    b.ClearResults();
    jax_ep::gpu::StartMail mail{};
    for (auto& shown : mail.shown) shown.epoch = 1;
    if (op == kDispatch) {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.tokens.get());
      mail.shown[1].value = reinterpret_cast<uint64_t>(other.weights.get());
    } else if (op == kCombine) {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.partial.get());
      mail.shown[1].value = reinterpret_cast<uint64_t>(other.collected.get());
    } else if (op == kGradient) {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.d_y.get());
    } else {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.ids.get());
    }
    mail.shown[jax_ep::gpu::kNumAddresses].value = view.operation;
    const int slot = view.peer[1].slot_here;
    CHECK_CUDA(cudaMemcpy(&view.control->start[slot], &mail, sizeof(mail), cudaMemcpyHostToDevice));
    const uint64_t progress = jax_ep::gpu::progress_of(1, num_units);
    CHECK_CUDA(cudaMemcpy(&view.control->progress[slot][0], &progress, sizeof(progress),
                          cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaDeviceSynchronize());
    if (op == kLayout) {
      CHECK_CUDA(jax_ep::gpu::LaunchLayout(view, b.Layout(d), 1, group.stream(0)));
    } else if (op == kCombine) {
      CHECK_CUDA(jax_ep::gpu::LaunchCombine(view, b.Combine(d), 1, group.stream(0)));
    } else {
      CHECK_CUDA(jax_ep::gpu::LaunchDispatch(view, op == kDispatch ? b.Dispatch(d) : b.Gradient(d),
                                             1, group.stream(0)));
    }
    SynchronizeOrDie(group.stream(0));
    const ErrorRecord& e = group.error(0);
    const uint32_t phase = op == kLayout ? jax_ep::gpu::kEnd : jax_ep::gpu::kProgress;
    REQUIRE(e.valid == 1 && e.peer == 1 && e.phase == phase && e.kind == static_cast<uint32_t>(op),
            "operation %d: kind %u, peer %d, phase %u", op, e.kind, e.peer, e.phase);
    if (op == kDispatch) {
      REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "dispatch: not NaN");
    } else if (op == kCombine) {
      REQUIRE(AllOnes(b.out.Read(), d.type) && AllNan(b.collected.Read()), "combine: not NaN");
    } else if (op == kGradient) {
      REQUIRE(AllOnes(b.d_y.Read(), d.type) && AllNan(b.d_weights.Read()), "gradient: not NaN");
    } else {
      REQUIRE(AllAre(b.recv_src.Read(), -1) && AllAre(b.expert_load.Read(), 0), "layout");
    }
  }
}

// Rank 0 calls, rank 1 never does: the kernel ends by its timeout, says for whom it waited, and
// leaves NaN; calls after that end at once.
void TestStall(int num_sms) {
  const Group group;  // of its own: it will be broken
  const Case c{16, 2, 2, 1, 64, RowType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 2, 7);
  Buffers b(d, 0);
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto now = [] { return std::chrono::steady_clock::now(); };
  const auto seconds = [](auto duration) {
    return std::chrono::duration<double>(duration).count();
  };
  const uint64_t timeout = kSecond / 2;
  b.WriteTables(d, 0);
  b.ClearResults();
  CHECK_CUDA(cudaDeviceSynchronize());

  const auto start = now();
  CHECK_CUDA(jax_ep::gpu::LaunchDispatch(group.View(0, 2, 1, timeout), b.Dispatch(d), num_sms,
                                         group.stream(0)));
  CHECK_CUDA(cudaStreamSynchronize(group.stream(0)));
  const double waited = seconds(now() - start);
  REQUIRE(waited > 0.4 && waited < 20, "%.2f s, the timeout is 0.5 s", waited);
  const ErrorRecord& e = group.error(0);
  REQUIRE(e.valid == 1, "no error record");
  REQUIRE(e.kind == 1 && e.rank == 0 && e.peer == 1 && e.phase == 0,
          "kind %u, rank %d, peer %d, phase %u", e.kind, e.rank, e.peer, e.phase);
  REQUIRE(e.expected_epoch == 1 && e.seen_epoch == 0, "epochs");
  REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "dispatch: not NaN");

  const auto again = now();
  CHECK_CUDA(jax_ep::gpu::LaunchCombine(group.View(0, 2, 2, 60 * kSecond), b.Combine(d), num_sms,
                                        group.stream(0)));
  CHECK_CUDA(jax_ep::gpu::LaunchDispatch(group.View(0, 2, 3, 60 * kSecond), b.Gradient(d), num_sms,
                                         group.stream(0)));
  CHECK_CUDA(jax_ep::gpu::LaunchLayout(group.View(0, 2, 4, 60 * kSecond), b.Layout(d), num_sms,
                                       group.stream(0)));
  CHECK_CUDA(cudaStreamSynchronize(group.stream(0)));
  REQUIRE(seconds(now() - again) < 20, "calls after the timeout waited");
  REQUIRE(AllOnes(b.out.Read(), d.type) && AllNan(b.collected.Read()), "combine: not NaN");
  REQUIRE(AllOnes(b.d_y.Read(), d.type) && AllNan(b.d_weights.Read()), "gradient: not NaN");
  REQUIRE(AllAre(b.recv_src.Read(), -1) && AllAre(b.expert_load.Read(), 0), "layout");
  std::printf("NOTE: a missing rank was reported after %.2f s (timeout 0.5 s)\n", waited);
}

}  // namespace jax_ep::gpu::test
