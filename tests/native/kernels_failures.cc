// Calls that cannot end well: a rank that never comes, one that stops on the way, one that is still
// inside when a call has failed.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/memory/control.h"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_forms.h"
#include "tests/native/kernels_test.h"
#include "tests/native/kernels_waits.h"

namespace jax_ep::gpu::test {
namespace {

bool AllOnes(const std::vector<uint8_t>& bytes, FloatType type) {
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

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Ends the program if a stream does not come to its end: a hang would end nothing.
void SynchronizeOrDie(cudaStream_t stream) {
  const auto start = Clock::now();
  cudaError_t status;
  while ((status = cudaStreamQuery(stream)) == cudaErrorNotReady) {
    if (Clock::now() - start > std::chrono::seconds(30)) {
      std::printf("a kernel does not end\n");
      std::_Exit(1);
    }
  }
  CHECK_CUDA(status);
}

// By the host, while kernels run.
template <typename T>
T Load(const Group& group, const T* from) {
  const cudaStream_t stream = group.stream(kMaxRanks - 1);
  T value;
  CHECK_CUDA(cudaMemcpyAsync(&value, from, sizeof value, cudaMemcpyDeviceToHost, stream));
  CHECK_CUDA(cudaStreamSynchronize(stream));
  return value;
}
template <typename T>
void Store(const Group& group, T* to, const T& value) {
  const cudaStream_t stream = group.stream(kMaxRanks - 1);
  CHECK_CUDA(cudaMemcpyAsync(to, &value, sizeof value, cudaMemcpyHostToDevice, stream));
  CHECK_CUDA(cudaStreamSynchronize(stream));
}

// By the host: until a word of a control block is as it is to be, which it must become soon.
template <typename IsRight>
void AwaitOnHost(const Group& group, const uint64_t* word, const IsRight& is_right) {
  const auto start = Clock::now();
  while (Clock::now() - start < std::chrono::seconds(10)) {
    if (is_right(Load(group, word))) return;
  }
  REQUIRE(false, "a word of a control block");
}
const auto kIsSet = [](uint64_t value) { return value != 0; };

// What the host writes when the process of a slot's device has died.
void MarkGone(ErrorRecord& record, int slot) {
  __atomic_fetch_or(&record.gone[word_of(slot)], bit_of(slot), __ATOMIC_RELEASE);
}

// The slots of peers that may still write when a call has ended.
std::vector<int> NotLeft(const ErrorRecord& record) {
  std::vector<int> slots;
  for (int slot = 0; slot < kMaxPeers; ++slot) {
    if (record.not_left[slot] != 0) slots.push_back(slot);
  }
  return slots;
}

const OpKind kOperations[] = {OpKind::kLayout, OpKind::kDispatch, OpKind::kCombine,
                              OpKind::kCombineGradient};

void Launch(OpKind op, const GroupView& view, Buffers& b, const Data& d, int num_sms,
            cudaStream_t stream) {
  CHECK_CUDA(op == OpKind::kLayout     ? LaunchLayout(view, b.Layout(d), num_sms, stream)
             : op == OpKind::kCombine  ? LaunchCombine(view, b.Combine(d), num_sms, stream)
             : op == OpKind::kDispatch ? LaunchDispatch(view, b.Dispatch(d), num_sms, stream)
                                       : LaunchDispatch(view, b.Gradient(d), num_sms, stream));
}

// What a rank that has these buffers sends its peers in its first call.
StartMail MailOf(OpKind op, Buffers& b, uint64_t operation) {
  StartMail mail{};
  for (Shown& shown : mail.shown) shown.epoch = 1;
  const auto show = [&](int i, const void* address) {
    mail.shown[i].value = reinterpret_cast<uint64_t>(address);
  };
  switch (op) {
    case OpKind::kLayout:
      show(0, b.ids.get());
      break;
    case OpKind::kDispatch:
      show(0, b.tokens.get());
      show(1, b.weights.get());
      break;
    case OpKind::kCombine:
      show(0, b.partial.get());
      show(1, b.collected.get());
      break;
    case OpKind::kCombineGradient:
      show(0, b.d_y.get());
      break;
    case OpKind::kLayoutAndDispatch:
      break;  // sends none
  }
  mail.shown[kNumAddresses].value = operation;
  return mail;
}

// The outputs of a call that has failed.
void RequireFilled(OpKind op, const Buffers& b, const Data& d) {
  switch (op) {
    case OpKind::kLayout:
      REQUIRE(AllAre(b.recv_src.Read(), -1) && AllAre(b.expert_load.Read(), 0), "layout");
      break;
    case OpKind::kDispatch:
      REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "dispatch: not NaN");
      break;
    case OpKind::kCombine:
      REQUIRE(AllOnes(b.out.Read(), d.type) && AllNan(b.collected.Read()), "combine: not NaN");
      break;
    case OpKind::kCombineGradient:
      REQUIRE(AllOnes(b.d_y.Read(), d.type) && AllNan(b.d_weights.Read()), "gradient: not NaN");
      break;
    case OpKind::kLayoutAndDispatch:
      break;  // kernels_slots.cc
  }
}

// All that peers may write in a call.
void OverwriteWhatPeersWrite(Buffers& b, cudaStream_t stream) {
  for (Buffer<uint8_t>* rows : {&b.tokens, &b.partial, &b.d_y}) rows->Fill(kOverwritten, stream);
  for (Buffer<float>* values : {&b.weights, &b.collected, &b.d_weights}) {
    values->Fill(kOverwritten, stream);
  }
}
void RequireStillOverwritten(OpKind op, const Buffers& b) {
  const auto is_still = [](const void* data, size_t num_bytes) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    return std::all_of(bytes, bytes + num_bytes, [](uint8_t v) { return v == kOverwritten; });
  };
  const int number = static_cast<int>(op);
  for (const Buffer<uint8_t>* each : {&b.tokens, &b.partial, &b.d_y}) {
    const std::vector<uint8_t> rows = each->Read();
    REQUIRE(is_still(rows.data(), rows.size()), "operation %d: a peer has written rows", number);
  }
  for (const Buffer<float>* each : {&b.weights, &b.collected, &b.d_weights}) {
    const std::vector<float> values = each->Read();
    REQUIRE(is_still(values.data(), values.size() * sizeof(float)),
            "operation %d: a peer has written values", number);
  }
}

// Dispatch in any form, on the tables of a rank's buffers, with guards behind its results.
class GuardedDispatch {
 public:
  GuardedDispatch(const Data& d, Buffers& tables, const Form& form)
      : data_(d),
        buffers_(d, form, std::vector<uint8_t>(d.num_tokens * form.x_row_bytes(d)),
                 std::vector<float>(d.num_tokens * form.num_scales), kGuardBytes),
        arguments_(tables.Dispatch(d)) {
    Overwrite(buffers_);
    buffers_.Set(d, arguments_);
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  void Launch(const GroupView& view, int num_sms, cudaStream_t stream) {
    CHECK_CUDA(LaunchDispatch(view, arguments_, num_sms, stream));
  }

  // What a rank that has these results sends its peers in its first call.
  StartMail Mail(uint64_t operation) const {
    StartMail mail{};
    for (Shown& shown : mail.shown) shown.epoch = 1;
    mail.shown[0].value = reinterpret_cast<uint64_t>(arguments_.tokens);
    mail.shown[1].value = reinterpret_cast<uint64_t>(arguments_.weights);
    mail.shown[2].value = reinterpret_cast<uint64_t>(arguments_.scales);
    mail.shown[kNumAddresses].value = operation;
    return mail;
  }

  void RequireFilled() const { RequireFormFilled(data_, buffers_); }

 private:
  const Data& data_;
  FormBuffers buffers_;
  DispatchArguments arguments_;
};

const Case kSmall{16, 2, 2, 1, 64, FloatType::kBF16, Routing::kUniform, 100, true, true};
// With these a rank has fewer rows than it gets when they are not expanded, and more.
const int kCapacityPercents[] = {50, 200};
constexpr uint64_t kOperation = 5;  // any

}  // namespace

// Rank 1 comes to the call of rank 0, as its start mail says, does the first `num_units` units, as
// its progress says, and then nothing more: the kernel, which is in the middle of its work, ends by
// the progress timeout, far before the arrival timeout, and leaves NaN, a layout -1 and 0. One
// block has all units, which is more than its rings and tables hold at once.
void TestBreakOnTheWay(int num_tokens, uint64_t num_units) {
  // Launches by launch(view, stream); `mail` is rank 1's.
  const auto break_call = [&](OpKind op, const StartMail& mail, const auto& launch) {
    const Group group;  // of its own: it will be broken
    const GroupView view = group.View(0, 2, kOperation, kSecond / 2);
    group.error(0).arrival_timeout_ns = 60 * kSecond;
    Store(group, &view.control->start[1], mail);
    Store(group, &view.control->progress[1][0], progress_of(1, num_units));
    const auto start = Clock::now();
    launch(view, group.stream(0));
    SynchronizeOrDie(group.stream(0));
    const double waited = SecondsSince(start);
    REQUIRE(waited > 0.4 && waited < 20, "operation %d: %.2f s, the progress timeout is 0.5 s",
            static_cast<int>(op), waited);
    const ErrorRecord& e = group.error(0);
    const uint32_t phase = op == OpKind::kLayout ? kEnd : kProgress;
    REQUIRE(
        e.valid == 1 && e.peer_slot == 1 && e.phase == phase && e.kind == static_cast<uint32_t>(op),
        "operation %d: kind %u, peer %d, phase %u", static_cast<int>(op), e.kind, e.peer_slot,
        e.phase);
  };

  Case c{num_tokens, 2, 2, 1, 64, FloatType::kBF16, Routing::kUniform, 100, true, true};
  {
    const Data d = MakeData(c, 2, 11);
    Buffers b(d, 0), other(d, 1);
    for (const OpKind op : kOperations) {
      b.WriteTables(d, 0);
      b.ClearResults();
      CHECK_CUDA(cudaDeviceSynchronize());
      break_call(
          op, MailOf(op, other, kOperation),
          [&](const GroupView& view, cudaStream_t stream) { Launch(op, view, b, d, 1, stream); });
      RequireFilled(op, b, d);
    }
  }
  for (const int capacity_percent : kCapacityPercents) {
    c.capacity_percent = capacity_percent;
    const Data d = MakeData(c, 2, 11);
    Buffers b(d, 0), other(d, 1);
    b.WriteTables(d, 0);
    for (const Form& form : {Form{DispatchMode::kCopy, /*expand=*/false},
                             Quantizing(d, DispatchMode::kQuantize, /*expand=*/false, false)}) {
      GuardedDispatch call(d, b, form), at_other(d, other, form);
      break_call(OpKind::kDispatch, at_other.Mail(kOperation),
                 [&](const GroupView& view, cudaStream_t stream) { call.Launch(view, 1, stream); });
      call.RequireFilled();
    }
  }
}

// Rank 0 calls, rank 1 never does: the kernel ends by the arrival timeout, far before the progress
// timeout, says for whom it waited, and leaves NaN; calls after that, in every form, end at once.
void TestStall(int num_sms) {
  const Group group;  // of its own: it will be broken
  const Case c{16, 2, 2, 1, 64, FloatType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 2, 7);
  Buffers b(d, 0);
  CHECK_CUDA(cudaDeviceSynchronize());
  b.WriteTables(d, 0);
  b.ClearResults();
  CHECK_CUDA(cudaDeviceSynchronize());

  const GroupView view = group.View(0, 2, 1, kSecond / 2);
  group.error(0).progress_timeout_ns = 60 * kSecond;
  const auto start = Clock::now();
  Launch(OpKind::kDispatch, view, b, d, num_sms, group.stream(0));
  SynchronizeOrDie(group.stream(0));
  const double waited = SecondsSince(start);
  REQUIRE(waited > 0.4 && waited < 20, "%.2f s, the arrival timeout is 0.5 s", waited);
  const ErrorRecord& e = group.error(0);
  REQUIRE(e.valid == 1, "no error record");
  REQUIRE(e.kind == 1 && e.slot == 0 && e.peer_slot == 1 && e.phase == 0,
          "kind %u, slot %d, peer %d, phase %u", e.kind, e.slot, e.peer_slot, e.phase);
  REQUIRE(e.expected_epoch == 1 && e.seen_epoch == 0, "epochs");
  REQUIRE(NotLeft(e).empty(), "who has not come needs not leave");
  RequireFilled(OpKind::kDispatch, b, d);

  const auto again = Clock::now();
  const OpKind later[] = {OpKind::kCombine, OpKind::kCombineGradient, OpKind::kLayout};
  for (const OpKind op : later) {
    Launch(op, group.View(0, 2, 2, 60 * kSecond), b, d, num_sms, group.stream(0));
  }
  SynchronizeOrDie(group.stream(0));
  for (const OpKind op : later) RequireFilled(op, b, d);
  for (const int capacity_percent : kCapacityPercents) {
    // Five scales of blocks a row, no multiple of 16 bytes.
    const Data wide = MakeData(
        {16, 2, 2, 1, 640, FloatType::kBF16, Routing::kUniform, capacity_percent, true, true}, 2,
        7);
    Buffers tables(wide, 0);
    tables.WriteTables(wide, 0);
    for (const Form& form : FormsToFail(wide)) {
      GuardedDispatch call(wide, tables, form);
      call.Launch(group.View(0, 2, 2, 60 * kSecond), num_sms, group.stream(0));
      SynchronizeOrDie(group.stream(0));
      call.RequireFilled();
    }
  }
  REQUIRE(SecondsSince(again) < 20, "calls after the timeout waited");
  std::printf("NOTE: a missing rank was reported after %.2f s (timeout 0.5 s)\n", waited);
}

// Rank 2 comes just after rank 0 has given up on it, while rank 1 still waits for both. Rank 0's
// buffers are used for something else as soon as its call has ended, and must stay as they are
// then.
void TestMemoryAfterTheEnd() {
  const Case c{20000, 2, 2, 1, 64, FloatType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 3, 13);
  std::vector<std::unique_ptr<Buffers>> buffers;
  for (int r = 0; r < 3; ++r) buffers.push_back(std::make_unique<Buffers>(d, r));
  for (const OpKind op : {OpKind::kDispatch, OpKind::kCombine, OpKind::kCombineGradient}) {
    const Group group;  // of its own: it will be broken
    const auto launch = [&](int r, uint64_t timeout) {
      Launch(op, group.View(r, 3, 5, timeout), *buffers[r], d, 2, group.stream(r));
    };
    for (int r = 0; r < 3; ++r) buffers[r]->WriteTables(d, r);
    CHECK_CUDA(cudaDeviceSynchronize());
    launch(1, 60 * kSecond);
    launch(0, kSecond / 5);
    OverwriteWhatPeersWrite(*buffers[0], group.stream(0));
    LaunchAwait(&group.control(2)->given_up, group.stream(2));
    launch(2, 60 * kSecond);
    for (int r = 0; r < 3; ++r) SynchronizeOrDie(group.stream(r));

    RequireStillOverwritten(op, *buffers[0]);
    for (int r = 1; r < 3; ++r) {
      RequireFilled(op, *buffers[r], d);
      const ErrorRecord& e = group.error(r);
      REQUIRE(e.valid == 1 && e.phase == kToldByPeer && e.slot == r && e.peer_slot == 0 &&
                  e.seen_epoch == 2,
              "operation %d: slot %d, phase %u, peer %d", static_cast<int>(op), e.slot, e.phase,
              e.peer_slot);
    }
    const ErrorRecord& e = group.error(0);
    REQUIRE(e.valid == 1 && e.phase == kStart && e.peer_slot == 2, "phase %u", e.phase);
    for (int r = 0; r < 3; ++r) REQUIRE(NotLeft(group.error(r)).empty(), "rank %d", r);
  }
}

// Rank 0 has left its failed call and shut its door, of which rank 1 has heard nothing else: rank
// 0's start mail is there, and `given_up` is not set. Rank 1 writes nothing, and ends at once.
void TestShutDoor() {
  const Data d = MakeData(kSmall, 2, 31);
  Buffers b(d, 1), other(d, 0);
  for (const OpKind op : kOperations) {
    const Group group;  // of its own: it will be broken
    const int number = static_cast<int>(op);
    const GroupView view = group.View(1, 2, 5, kSecond / 2);
    b.WriteTables(d, 1);
    b.ClearResults();
    OverwriteWhatPeersWrite(other, group.stream(0));
    CHECK_CUDA(cudaDeviceSynchronize());
    Store(group, &view.control->start[0], MailOf(op, other, view.operation));
    Store(group, &view.control->entry[0].entered, kShut);
    Launch(op, view, b, d, 4, group.stream(1));
    SynchronizeOrDie(group.stream(1));
    RequireStillOverwritten(op, other);
    RequireFilled(op, b, d);
    const ErrorRecord& e = group.error(1);
    REQUIRE(e.valid == 1 && e.phase == kToldByPeer && e.slot == 1 && e.peer_slot == 0,
            "operation %d: slot %d, phase %u, peer %d", number, e.slot, e.phase, e.peer_slot);
    REQUIRE(NotLeft(e).empty(), "operation %d: rank 0 has not been inside", number);
  }
}

// Rank 1 has entered rank 0's call, as its entry says, when that fails by its timeout: the kernel
// ends, and fills its outputs, only when rank 1 is out, by one of its signs; when the host says
// that it has died; or when it has waited for long, and says so.
void TestWaitForWhoIsInside() {
  enum Sign { kEndMail, kAllUnits, kGone, kNone };
  const Data d = MakeData(kSmall, 2, 37);
  Buffers b(d, 0);
  for (const OpKind op : kOperations) {
    for (const Sign sign : {kEndMail, kAllUnits, kGone, kNone}) {
      const bool tells_units = op != OpKind::kLayout;
      if (sign == kAllUnits && !tells_units) continue;
      const Group group;  // of its own: it will be broken
      const int number = static_cast<int>(op);
      const cudaStream_t stream = group.stream(0);
      ControlBlock *own = group.control(0), *peer = group.control(1);
      ErrorRecord& e = group.error(0);
      b.WriteTables(d, 0);
      b.ClearResults();
      CHECK_CUDA(cudaDeviceSynchronize());
      Store(group, &peer->entry[0].entered, uint64_t{1});
      const auto start = Clock::now();
      Launch(op, group.View(0, 2, 5, kSecond / 5), b, d, 4, stream);
      AwaitOnHost(group, &peer->entry[0].entered, [](uint64_t v) { return v == (kShut | 1); });
      // Before it waits it has entered rank 1's memory, told why it ends, and left.
      REQUIRE(Load(group, &own->entry[1].entered) == 1, "operation %d: [V1]", number);
      REQUIRE(Load(group, &peer->given_up) == given_up_of(0, 1), "operation %d: told", number);
      REQUIRE(Load(group, &peer->end[0].epoch) == 1, "operation %d: [L1]", number);
      REQUIRE(__atomic_load_n(&e.valid, __ATOMIC_ACQUIRE) == 1 && e.phase == kStart &&
                  e.slot == 0 && e.peer_slot == 1,
              "operation %d: phase %u, peer %d", number, e.phase, e.peer_slot);

      MarkGone(e, 2);                               // which is not waited for
      OverwriteWhatPeersWrite(b, group.stream(1));  // as rank 1 may
      const auto waits = Clock::now();
      bool has_waited = true;
      while (has_waited && SecondsSince(waits) < 0.3) {
        has_waited = cudaStreamQuery(stream) == cudaErrorNotReady;
      }
      REQUIRE(has_waited, "operation %d: has ended while a peer was inside", number);
      CHECK_CUDA(cudaStreamSynchronize(group.stream(1)));
      if (sign == kEndMail) {
        Store(group, &own->end[1].epoch, uint64_t{1});
      } else if (sign == kAllUnits) {
        const std::vector<uint64_t> all(kMaxBlocks, progress_of(1, kMaxUnitsPerBlock));
        CHECK_CUDA(cudaMemcpyAsync(own->progress[1], all.data(), kMaxBlocks * sizeof(uint64_t),
                                   cudaMemcpyHostToDevice, group.stream(1)));
        CHECK_CUDA(cudaStreamSynchronize(group.stream(1)));
      } else if (sign == kGone) {
        MarkGone(e, 1);
      }
      SynchronizeOrDie(stream);
      const double took = SecondsSince(start);
      const double least = (kSecond / 5 + kLeaveTimeoutNs) / 1e9;
      REQUIRE(sign != kNone || (took > 0.95 * least && took < least + 10),
              "operation %d: took %.2f s, the timeouts are %.2f s", number, took, least);
      // Nobody, if the wait has ended by the sign, and not by its timeout.
      const std::vector<int> not_left = sign == kNone ? std::vector<int>{1} : std::vector<int>{};
      REQUIRE(NotLeft(e) == not_left, "operation %d, sign %d: %zu have not left", number, sign,
              NotLeft(e).size());
      RequireFilled(op, b, d);
    }
  }
}

// The group breaks, here or at a peer, while a call works that waits for nobody: its end looks
// once more.
void TestBreakBeforeTheEnd() {
  const Case c{20000, 2, 2, 1, 64, FloatType::kBF16, Routing::kUniform, 100, true, true};
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
    Store(group, word, given_up_of(3, 4));
    REQUIRE(cudaStreamQuery(group.stream(0)) == cudaErrorNotReady, "the call was too short");
    SynchronizeOrDie(group.stream(0));
    REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "not NaN");
    const ErrorRecord& e = group.error(0);
    REQUIRE(!is_told || (e.valid == 1 && e.phase == kToldByPeer && e.peer_slot == 3), "told");
  }
}

// The host is shown that a wait is long, and says that who is waited for has died: the wait ends at
// once. That others have died before is nothing to it.
void TestDeath() {
  const Group group;  // of its own: it will be broken
  const Data d = MakeData(kSmall, 2, 19);
  Buffers b(d, 0);
  b.WriteTables(d, 0);
  b.ClearResults();
  CHECK_CUDA(cudaDeviceSynchronize());
  const GroupView view = group.View(0, 2, 7, 600 * kSecond);
  ErrorRecord& e = group.error(0);
  MarkGone(e, 2);
  MarkGone(e, 65);  // the bit of slot 1 in the other word
  CHECK_CUDA(LaunchDispatch(view, b.Dispatch(d), 4, group.stream(0)));
  const auto start = Clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  while (__atomic_load_n(&e.waiting.since, __ATOMIC_ACQUIRE) == 0 && seconds() < 20) {
  }
  REQUIRE(seconds() > 0.9 && seconds() < 20, "shown after %.2f s", seconds());
  REQUIRE(e.waiting.peer_slot == 1 && e.waiting.phase == kStart && e.waiting.operation == 7 &&
              e.waiting.kind == static_cast<uint32_t>(OpKind::kDispatch),
          "peer %d, phase %u", e.waiting.peer_slot, e.waiting.phase);
  const double before = seconds();
  MarkGone(e, 1);
  SynchronizeOrDie(group.stream(0));
  REQUIRE(seconds() - before < 5, "ended after %.2f s", seconds() - before);
  REQUIRE(e.valid == 1 && e.phase == kPeerDied && e.peer_slot == 1, "phase %u", e.phase);
  REQUIRE(e.waiting.since == 0 && NotLeft(e).empty(), "a wait is still shown");
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
              e.seen_epoch == 1 && NotLeft(e).empty(),
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
