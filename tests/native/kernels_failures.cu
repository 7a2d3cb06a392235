// Calls that cannot end well: a rank that never comes, and one that stops on the way.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/sync/give_up.cuh"
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

// Ends when a word of a control block is not 0, or after some seconds.
__global__ void AwaitWord(const volatile uint64_t* word) {
  const long long start = clock64();
  while (*word == 0 && clock64() - start < (1ll << 34)) {
  }
}

// By the host: until a word of a control block is as it is to be, which it must become soon.
template <typename IsRight>
void AwaitOnHost(const Group& group, const uint64_t* word, const IsRight& is_right) {
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - start < std::chrono::seconds(20)) {
    uint64_t value = 0;
    CHECK_CUDA(cudaMemcpyAsync(&value, word, sizeof value, cudaMemcpyDeviceToHost,
                               group.stream(kMaxRanks - 1)));
    CHECK_CUDA(cudaStreamSynchronize(group.stream(kMaxRanks - 1)));
    if (is_right(value)) return;
  }
  REQUIRE(false, "a word of a control block");
}
const auto kIsSet = [](uint64_t value) { return value != 0; };

const Case kSmall{16, 2, 2, 1, 64, RowType::kBF16, Routing::kUniform, 100, true, true};

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
    group.error(0).arrival_timeout_ns = 60 * kSecond;  // it has come
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
    REQUIRE(
        e.valid == 1 && e.peer_slot == 1 && e.phase == phase && e.kind == static_cast<uint32_t>(op),
        "operation %d: kind %u, peer %d, phase %u", op, e.kind, e.peer_slot, e.phase);
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
  REQUIRE(e.kind == 1 && e.slot == 0 && e.peer_slot == 1 && e.phase == 0,
          "kind %u, slot %d, peer %d, phase %u", e.kind, e.slot, e.peer_slot, e.phase);
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

// Rank 2 comes just after rank 0 has given up on it, while rank 1 still waits for both. Rank 0's
// buffers are used for something else as soon as its call has ended, and must stay as they are then.
void TestMemoryAfterTheEnd() {
  const Case c{20000, 2, 2, 1, 64, RowType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 3, 13);
  std::vector<std::unique_ptr<Buffers>> buffers;
  for (int r = 0; r < 3; ++r) buffers.push_back(std::make_unique<Buffers>(d, r));
  for (const OpKind op : {OpKind::kDispatch, OpKind::kCombine, OpKind::kCombineGradient}) {
    const Group group;  // of its own: it will be broken
    const auto launch = [&](int r, uint64_t timeout) {
      Buffers& b = *buffers[r];
      const GroupView view = group.View(r, 3, 5, timeout);
      CHECK_CUDA(op == OpKind::kCombine ? LaunchCombine(view, b.Combine(d), 2, group.stream(r))
                 : op == OpKind::kDispatch
                     ? LaunchDispatch(view, b.Dispatch(d), 2, group.stream(r))
                     : LaunchDispatch(view, b.Gradient(d), 2, group.stream(r)));
    };
    for (int r = 0; r < 3; ++r) buffers[r]->WriteTables(d, r);
    CHECK_CUDA(cudaDeviceSynchronize());
    launch(1, 60 * kSecond);
    launch(0, kSecond / 5);
    Buffers& mine = *buffers[0];
    Buffer<uint8_t>* const rows[] = {&mine.tokens, &mine.partial, &mine.d_y};
    Buffer<float>* const values[] = {&mine.weights, &mine.collected, &mine.d_weights};
    for (Buffer<uint8_t>* each : rows) each->Fill(0x5a, group.stream(0));
    for (Buffer<float>* each : values) each->Fill(0x5a, group.stream(0));
    AwaitWord<<<1, 1, 0, group.stream(2)>>>(&group.control(2)->given_up);
    CHECK_CUDA(cudaGetLastError());
    launch(2, 60 * kSecond);
    for (int r = 0; r < 3; ++r) SynchronizeOrDie(group.stream(r));

    const int number = static_cast<int>(op);
    for (Buffer<uint8_t>* each : rows) {
      const std::vector<uint8_t> bytes = each->Read();
      REQUIRE(std::all_of(bytes.begin(), bytes.end(), [](uint8_t v) { return v == 0x5a; }),
              "operation %d: rows were written after the call's end", number);
    }
    for (Buffer<float>* each : values) {
      std::vector<float> all = each->Read();
      const auto* bytes = reinterpret_cast<const uint8_t*>(all.data());
      REQUIRE(std::all_of(bytes, bytes + all.size() * 4, [](uint8_t v) { return v == 0x5a; }),
              "operation %d: values were written after the call's end", number);
    }
    for (int r = 1; r < 3; ++r) {
      Buffers& b = *buffers[r];
      REQUIRE(AllOnes(op == OpKind::kDispatch  ? b.tokens.Read()
                      : op == OpKind::kCombine ? b.out.Read()
                                               : b.d_y.Read(),
                      d.type),
              "operation %d: rank %d: not NaN", number, r);
      const ErrorRecord& e = group.error(r);
      REQUIRE(e.valid == 1 && e.phase == kToldByPeer && e.slot == r && e.peer_slot == 0 &&
                  e.seen_epoch == 2,
              "operation %d: slot %d, phase %u, peer %d", number, e.slot, e.phase, e.peer_slot);
    }
    const ErrorRecord& e = group.error(0);
    REQUIRE(e.valid == 1 && e.phase == kStart && e.peer_slot == 2, "phase %u", e.phase);
    for (int r = 0; r < 3; ++r) REQUIRE(group.error(r).not_left == 0, "rank %d", r);
  }
}

// The group breaks, here or at a peer, while a call works that waits for nobody: its end looks again.
void TestBreakBeforeTheEnd() {
  const Case c{20000, 2, 2, 1, 64, RowType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 1, 17);
  Buffers b(d, 0);
  for (const bool is_told : {false, true}) {
    const Group group;  // of its own: it will be broken
    b.WriteTables(d, 0);
    b.ClearResults();
    CHECK_CUDA(cudaDeviceSynchronize());
    Local& local = group.control(0)->local;
    uint64_t* word = is_told ? &group.control(0)->given_up : &local.broken;
    const GroupView view = group.View(0, 1, 1, 60 * kSecond);
    CHECK_CUDA(LaunchDispatch(view, b.Dispatch(d), 1, group.stream(0)));
    AwaitOnHost(group, &local.running, kIsSet);
    const uint64_t given_up = given_up_of(3, 4);
    CHECK_CUDA(
        cudaMemcpyAsync(word, &given_up, sizeof given_up, cudaMemcpyHostToDevice, group.stream(1)));
    CHECK_CUDA(cudaStreamSynchronize(group.stream(1)));
    REQUIRE(cudaStreamQuery(group.stream(0)) == cudaErrorNotReady, "the call was too short");
    SynchronizeOrDie(group.stream(0));
    REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "not NaN");
    const ErrorRecord& e = group.error(0);
    REQUIRE(!is_told || (e.valid == 1 && e.phase == kToldByPeer && e.peer_slot == 3), "told");
  }
}

// The host shows that a wait is long, and that who is waited for has died: the wait ends at once.
void TestDeath() {
  const Group group;  // of its own: it will be broken
  const Data d = MakeData(kSmall, 2, 19);
  Buffers b(d, 0);
  b.WriteTables(d, 0);
  b.ClearResults();
  CHECK_CUDA(cudaDeviceSynchronize());
  const GroupView view = group.View(0, 2, 7, 600 * kSecond);
  CHECK_CUDA(LaunchDispatch(view, b.Dispatch(d), 4, group.stream(0)));
  const auto start = std::chrono::steady_clock::now();
  const auto seconds = [&] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  ErrorRecord& e = group.error(0);
  while (__atomic_load_n(&e.waiting.since, __ATOMIC_ACQUIRE) == 0 && seconds() < 20) {
  }
  REQUIRE(seconds() > 0.9 && seconds() < 20, "shown after %.2f s", seconds());
  REQUIRE(e.waiting.peer_slot == 1 && e.waiting.phase == kStart && e.waiting.operation == 7 &&
              e.waiting.kind == static_cast<uint32_t>(OpKind::kDispatch),
          "peer %d, phase %u", e.waiting.peer_slot, e.waiting.phase);
  const double before = seconds();
  __atomic_store_n(&e.abort, 2, __ATOMIC_RELEASE);
  SynchronizeOrDie(group.stream(0));
  REQUIRE(seconds() - before < 5, "ended after %.2f s", seconds() - before);
  REQUIRE(e.valid == 1 && e.phase == kPeerDied && e.peer_slot == 1, "phase %u", e.phase);
  REQUIRE(e.waiting.since == 0 && e.not_left == 0, "a wait is still shown");
  REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "not NaN");
}

// Device 0 gives up on device 1 in one group. Device 2, which is in another group with it, hears of
// that by the next call there.
void TestOtherGroup() {
  const Group group;  // of its own: it will be broken
  const Data d = MakeData(kSmall, 2, 23);
  Buffers here(d, 0), there(d, 1);
  here.WriteTables(d, 0);
  there.WriteTables(d, 1);
  there.ClearResults();
  CHECK_CUDA(cudaDeviceSynchronize());
  const std::vector<int> slots = {0, 2};
  const GroupView view = group.View(1, slots, 9, 600 * kSecond);
  CHECK_CUDA(LaunchDispatch(view, there.Dispatch(d), 4, group.stream(2)));
  const GroupView first = group.View(0, 2, 8, kSecond / 5);
  CHECK_CUDA(LaunchDispatch(first, here.Dispatch(d), 4, group.stream(0)));
  const GroupView second = group.View(0, slots, 9, kSecond / 5);
  CHECK_CUDA(LaunchDispatch(second, here.Dispatch(d), 4, group.stream(0)));
  SynchronizeOrDie(group.stream(0));
  SynchronizeOrDie(group.stream(2));
  const ErrorRecord& e = group.error(2);
  REQUIRE(e.valid == 1 && e.phase == kToldByPeer && e.slot == 2 && e.peer_slot == 0 &&
              e.seen_epoch == 1 && e.not_left == 0,
          "slot %d, phase %u, peer %d", e.slot, e.phase, e.peer_slot);
  REQUIRE(AllOnes(there.tokens.Read(), d.type) && AllNan(there.weights.Read()), "not NaN");
}

void TestTwoAtOnce(const Group& group) {
  const Data d = MakeData(kSmall, 2, 29);
  Buffers first(d, 0), second(d, 0), peer(d, 1);
  for (Buffers* b : {&first, &second, &peer}) {
    b->WriteTables(d, b == &peer ? 1 : 0);
    b->ClearResults();
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto launch = [&](int r, Buffers& b, cudaStream_t stream) {
    CHECK_CUDA(LaunchDispatch(group.View(r, 2, 3, 60 * kSecond), b.Dispatch(d), 4, stream));
  };
  launch(0, first, group.stream(0));
  // It has shown its peer where it is.
  const ControlBlock* control = group.control(1);
  AwaitOnHost(group, &control->start[0].shown[kNumAddresses].epoch, kIsSet);
  launch(0, second, group.stream(2));
  SynchronizeOrDie(group.stream(2));
  SynchronizeOrDie(group.stream(0));
  launch(1, peer, group.stream(1));
  SynchronizeOrDie(group.stream(1));
  Shown shown;
  CHECK_CUDA(cudaMemcpy(&shown, &control->start[0].shown[0], sizeof shown, cudaMemcpyDeviceToHost));
  REQUIRE(shown.value == reinterpret_cast<uint64_t>(first.tokens.get()), "the second sent mail");
  for (Buffers* b : {&first, &second, &peer}) {
    REQUIRE(AllOnes(b->tokens.Read(), d.type) && AllNan(b->weights.Read()), "not NaN");
  }
  const ErrorRecord &own = group.error(0), &told = group.error(1);
  REQUIRE(own.valid == 1 && own.phase == kTwoAtOnce && own.slot == 0, "phase %u", own.phase);
  REQUIRE(told.valid == 1 && told.phase == kToldByPeer && told.peer_slot == 0, "phase %u",
          told.phase);
}

}  // namespace jax_ep::gpu::test
