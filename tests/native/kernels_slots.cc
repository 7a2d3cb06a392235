// Calls in slots: results, many calls in a row, and calls that fail.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_forms.h"
#include "tests/native/kernels_test.h"
#include "tests/native/kernels_waits.h"

namespace jax_ep::gpu::test {
namespace {

constexpr uint64_t kTimeout = 10 * kSecond;  // so that a broken protocol ends soon

// A case of a group of some of the devices, in what form rows are dispatched, and how its calls are
// made.
struct Call {
  Data data;
  FormData form_data;
  std::vector<int> slots;  // of the devices, by rank
  bool dispatches_in_slots, combines_in_slots;
  int num_sms;
  std::vector<std::unique_ptr<Buffers>> buffers;
  std::vector<std::unique_ptr<FormBuffers>> form_buffers;
};

// Of rows that may be dispatched in that mode.
Case DrawCase(std::mt19937_64& rng, int num_ranks, DispatchMode mode) {
  const auto draw = [&](int64_t n) { return static_cast<int64_t>(rng() % n); };
  const FloatType types[] = {FloatType::kF32, FloatType::kF16, FloatType::kBF16};
  const int64_t alignments[] = {1, 1, 4, 16, 128};
  const int percents[] = {100, 100, 140, 70, 40};
  Case c{};
  c.num_tokens = 1 + draw(int64_t{1} << draw(9));  // small ones as often as large ones
  c.experts_per_rank = 1 + draw(int64_t{1} << draw(7));
  c.top_k = 1 + draw(draw(4) == 0 ? kMaxTopK : 8);
  c.alignment = alignments[draw(5)];
  c.type = types[draw(3)];
  const int64_t vector =
      mode == DispatchMode::kCopy ? kRowAlignment / TypeBytes(c.type) : kRowAlignment;
  // So many numbers in all the oracle gets through soon.
  const int64_t ids = num_ranks * c.num_tokens * c.top_k;
  c.has_own_room = draw(2) == 0 && c.experts_per_rank * ids <= 4096;
  const int64_t rows =
      (c.has_own_room ? c.experts_per_rank : 1) * ids + c.experts_per_rank * c.alignment;
  const int64_t most = (int64_t{1} << 18) / (num_ranks * rows);
  const int64_t wanted = draw(4) == 0 ? 7168 : int64_t{8} << draw(10);
  c.num_channels = std::max<int64_t>(1, std::min(wanted, most) / vector) * vector;
  c.routing = static_cast<Routing>(draw(5));
  c.capacity_percent = percents[draw(5)];
  c.weighted = draw(3) != 0;
  c.zero_tail = draw(3) != 0;
  return c;
}

Form DrawForm(std::mt19937_64& rng, const Data& d, DispatchMode mode) {
  const bool expand = rng() % 3 != 0;
  if (mode == DispatchMode::kCopy) return {mode, expand};
  if (mode != DispatchMode::kScaled) return Quantizing(d, mode, expand, rng() % 2 == 0);
  // Mostly numbers that slots take.
  const int64_t num_scales[] = {4, d.num_channels / 4, d.num_channels / 16,
                                num_block_scales(d.num_channels)};
  return {mode, expand, num_scales[rng() % 4]};
}

// A call of combine, whose rows are the larger ones.
bool Fits(const Case& c, int num_ranks) {
  return fits_slots({num_ranks,
                     c.num_tokens,
                     c.top_k,
                     c.experts_per_rank * num_ranks,
                     {c.num_channels * TypeBytes(c.type)}},
                    kSlotAreaBytes);
}

Call MakeCall(const Data& data, const Form& form, uint64_t seed, const std::vector<int>& slots,
              int num_sms) {
  Call call{data, FormOracle(data, seed).Make(form), slots, true, true, num_sms, {}, {}};
  for (int r = 0; r < data.num_ranks; ++r) {
    call.buffers.push_back(std::make_unique<Buffers>(data, r));
    call.form_buffers.push_back(std::make_unique<FormBuffers>(data, call.form_data, r));
  }
  return call;
}
Call MakeCall(const Data& data, const std::vector<int>& slots, int num_sms) {
  return MakeCall(data, {}, 0, slots, num_sms);
}

Call DrawCall(std::mt19937_64& rng, int max_ranks, int num_sms) {
  std::vector<int> devices(max_ranks);
  std::iota(devices.begin(), devices.end(), 0);
  std::shuffle(devices.begin(), devices.end(), rng);
  const auto num_ranks = static_cast<int>(1 + rng() % max_ranks);
  devices.resize(num_ranks);
  const DispatchMode modes[] = {DispatchMode::kCopy, DispatchMode::kCopy, DispatchMode::kQuantize,
                                DispatchMode::kDequantize, DispatchMode::kScaled};
  const DispatchMode mode = modes[rng() % 5];
  Case c = DrawCase(rng, num_ranks, mode);
  while (!Fits(c, num_ranks)) c = DrawCase(rng, num_ranks, mode);
  const Data d = MakeData(c, num_ranks, rng());
  const int sms[] = {1, 5, num_sms, num_sms};
  const Form form = DrawForm(rng, d, mode);
  Call call = MakeCall(d, form, rng(), devices, sms[rng() % 4]);
  call.dispatches_in_slots = rng() % 4 != 0 && FitsSlots(d, form);
  call.combines_in_slots = rng() % 4 != 0;
  return call;
}

// After its calls.
void CompareCall(const Call& call) {
  for (int r = 0; r < call.data.num_ranks; ++r) {
    CompareTablesAndSums(call.data, r, *call.buffers[r]);
    CompareForm(call.data, r, call.form_data, *call.form_buffers[r],
                call.dispatches_in_slots ? "in slots" : "on a layout");
  }
}

void Launch(const Group& group, Call& call, int rank, uint64_t operation) {
  const Data& d = call.data;
  Buffers& b = *call.buffers[rank];
  const cudaStream_t stream = group.stream(call.slots[rank]);
  const auto view = [&] { return group.View(rank, call.slots, ++operation, kTimeout); };
  FormBuffers& rows = *call.form_buffers[rank];
  if (call.dispatches_in_slots) {
    LayoutAndDispatchArguments a = b.LayoutAndDispatch(d);
    rows.Set(d, a);
    CHECK_CUDA(LaunchLayoutAndDispatchInSlots(view(), a, call.num_sms, stream));
    b.Rewrite(d, rank, stream);  // nobody may read the ids any more
  } else {
    CHECK_CUDA(LaunchLayout(view(), b.Layout(d), call.num_sms, stream));
    DispatchArguments a = b.Dispatch(d);
    rows.Set(d, a);
    CHECK_CUDA(LaunchDispatch(view(), a, call.num_sms, stream));
  }
  if (call.combines_in_slots) {
    CHECK_CUDA(LaunchCombineInSlots(view(), b.Combine(d), call.num_sms, stream));
  } else {
    CHECK_CUDA(LaunchCombine(view(), b.Combine(d), call.num_sms, stream));
  }
}

// Rank 0's call in slots, of two ranks, of which rank 1 makes none: layout_and_dispatch in some form, or
// combine.
class LonelyCall {
 public:
  LonelyCall(const Data& d, OpKind op, const Form& form)
      : d_(d),
        op_(op),
        b_(d, 0),
        rows_(d, form, std::vector<uint8_t>(d.num_tokens * form.x_row_bytes(d)),
              std::vector<float>(d.num_tokens * form.num_scales), kGuardBytes) {}

  // With results that are seen to change.
  void Launch(const Group& group, uint64_t operation, uint64_t arrival_timeout_ns,
              uint64_t progress_timeout_ns) {
    const GroupView view = group.View(0, 2, operation, arrival_timeout_ns);
    group.error(0).progress_timeout_ns = progress_timeout_ns;
    const cudaStream_t stream = group.stream(0);
    b_.WriteTables(d_, 0);
    b_.ClearResults();
    b_.expert_counts.Fill(kOverwritten);
    b_.expert_load.Fill(kOverwritten);
    b_.counters.Fill(kOverwritten);
    Overwrite(rows_);
    CHECK_CUDA(cudaDeviceSynchronize());
    if (op_ == OpKind::kCombine) {
      CHECK_CUDA(LaunchCombineInSlots(view, b_.Combine(d_), 4, stream));
      return;
    }
    LayoutAndDispatchArguments a = b_.LayoutAndDispatch(d_);
    rows_.Set(d_, a);
    CHECK_CUDA(LaunchLayoutAndDispatchInSlots(view, a, 4, stream));
  }

  // It has ended, has told the host and rank 1 so, and has left NaN, -1 and 0.
  void RequireFailed(const Group& group, uint32_t phase) const {
    CHECK_CUDA(cudaStreamSynchronize(group.stream(0)));
    const ErrorRecord& e = group.error(0);
    const auto kind = static_cast<uint32_t>(op_);
    REQUIRE(e.valid == 1 && e.kind == kind && e.slot == 0 && e.peer_slot == 1 && e.phase == phase,
            "kind %u, slot %d, peer %d, phase %u; expected kind %u, phase %u", e.kind, e.slot,
            e.peer_slot, e.phase, kind, phase);
    for (int slot = 0; slot < kMaxPeers; ++slot) {
      REQUIRE(e.not_left[slot] == 0, "slot %d: nobody has to be seen out", slot);
    }
    ControlBlock* peer = group.control(1);
    uint64_t told = 0;
    CHECK_CUDA(cudaMemcpy(&told, &peer->given_up, sizeof told, cudaMemcpyDeviceToHost));
    REQUIRE(told == given_up_of(0, 1), "rank 1 has not been told");
    if (op_ == OpKind::kCombine) {
      RequireSumsFilled();
    } else {
      RequireFormFilled(d_, rows_);
      RequireTablesFilled();
    }
  }

 private:
  void RequireSumsFilled() const {
    const std::vector<uint8_t> out = b_.out.Read();
    const std::vector<float> collected = b_.collected.Read();
    int64_t num_nan = 0;
    for (size_t i = 0; i < out.size(); i += TypeBytes(d_.type)) {
      num_nan += std::isnan(ReadNumber(d_.type, &out[i]));
    }
    for (const float value : collected) num_nan += std::isnan(value);
    const int64_t all = d_.num_tokens * (d_.num_channels + d_.top_k);
    REQUIRE(num_nan == all, "%lld of %lld numbers are NaN", static_cast<long long>(num_nan),
            static_cast<long long>(all));
  }
  void RequireTablesFilled() const {
    const auto require = [](const char* name, const Buffer<int32_t>& table, int32_t expected) {
      for (const int32_t value : table.Read()) {
        if (value == expected) continue;
        REQUIRE(false, "%s: %d, not %d", name, value, expected);
        return;
      }
    };
    require("send_row", b_.send_row, kNoRow);
    require("recv_src", b_.recv_src, kNoSource);
    require("recv_order", b_.recv_order, kNoSource);
    require("recv_offsets", b_.recv_offsets, 0);
    require("group_sizes", b_.group_sizes, 0);
    require("expert_counts", b_.expert_counts, 0);
    require("expert_load", b_.expert_load, 0);
    require("counters", b_.counters, 0);
  }

  const Data& d_;
  const OpKind op_;
  Buffers b_;
  FormBuffers rows_;
};

// What rank 1 has sent to rank 0 in its first call.
void SendEntries(const Group& group, const std::vector<SlotEntry>& entries) {
  char* area = reinterpret_cast<char*>(group.control(0)) + slot_area_offset(kSlotAreaBytes, 1, 1);
  CHECK_CUDA(
      cudaMemcpy(area, entries.data(), entries.size() * sizeof(SlotEntry), cudaMemcpyHostToDevice));
}
void SendFlag(const Group& group, uint64_t operation) {
  const SlotFlag flag{operation, 1};
  CHECK_CUDA(
      cudaMemcpy(&group.control(0)->slot_flag[1], &flag, sizeof flag, cudaMemcpyHostToDevice));
}

}  // namespace

void TestSlots(int num_sequences, int max_ranks, int num_sms, uint64_t seed) {
  const Group group;
  std::mt19937_64 rng(seed);
  uint64_t operation = 0;
  for (int sequence = 0; sequence < num_sequences; ++sequence) {
    std::vector<Call> calls;
    for (int i = 0; i < 6; ++i) calls.push_back(DrawCall(rng, max_ranks, num_sms));
    CHECK_CUDA(cudaDeviceSynchronize());
    // Queued on all ranks without waiting in between: some are calls ahead of others.
    for (Call& call : calls) {
      for (int r = 0; r < call.data.num_ranks; ++r) Launch(group, call, r, operation);
      operation += 8;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    RequireNoError(group, kMaxRanks);
    for (Call& call : calls) {
      const int num_wrong_before = g_tally.num_wrong;
      CompareCall(call);
      if (g_tally.num_wrong != num_wrong_before) {
        std::printf("  sequence %d: dispatch%s, %s, combine %s\n", sequence,
                    call.form_data.form.name().c_str(),
                    call.dispatches_in_slots ? "in slots" : "general",
                    call.combines_in_slots ? "in slots" : "general");
        PrintCase(call.data, "slots", call.num_sms);
      }
    }
  }
}

// A rank that has nothing to wait for waits all the same, so that slots are not written before they
// are read.
void TestSlotReuse() {
  {  // Rank 0's tokens are routed nowhere, so rank 1 sends it no sum; and rank 1 comes late.
    const Case c{16, 4, 2, 1, 64, FloatType::kBF16, Routing::kSilentRank, 100, true, true};
    const Group group;
    Buffer<uint64_t> gate(1);
    gate.Fill(0);
    std::vector<Call> calls;
    for (uint64_t seed = 0; seed < 3; ++seed) {
      calls.push_back(MakeCall(MakeData(c, 2, 50 + seed), {0, 1}, 4));
      for (int r = 0; r < 2; ++r) calls.back().buffers[r]->WriteTables(calls.back().data, r);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    LaunchAwait(gate.get(), group.stream(1));
    for (Call& call : calls) {
      for (int r = 0; r < 2; ++r) {
        const GroupView view = group.View(r, 2, 1, kTimeout);
        CHECK_CUDA(
            LaunchCombineInSlots(view, call.buffers[r]->Combine(call.data), 4, group.stream(r)));
      }
    }
    const auto start = std::chrono::steady_clock::now();
    bool has_waited = true;
    while (has_waited &&
           std::chrono::steady_clock::now() - start < std::chrono::milliseconds(200)) {
      has_waited = cudaStreamQuery(group.stream(0)) == cudaErrorNotReady;
    }
    REQUIRE(has_waited, "rank 0 has ended its calls before rank 1 has begun one");
    CHECK_CUDA(cudaMemsetAsync(gate.get(), 1, sizeof(uint64_t), group.stream(2)));
    CHECK_CUDA(cudaDeviceSynchronize());
    RequireNoError(group, 2);
    for (const Call& call : calls) {
      for (int r = 0; r < 2; ++r) {
        const Buffers& b = *call.buffers[r];
        CompareNumbers("out", r, call.data.type, b.out.Read(), call.data.out[r]);
        Compare("collected", r, b.collected.Read(), call.data.collected[r]);
      }
    }
  }
  {  // Rank 1 gets all rows, and has one block to copy them: rank 0 is a call ahead meanwhile.
    const Case c{128, 8, 1, 1, 2048, FloatType::kBF16, Routing::kOneExpert, 100, true, true};
    const Group group;
    std::vector<Call> calls;
    for (uint64_t seed = 60; calls.size() < 4; ++seed) {
      const Data d = MakeData(c, 2, seed);
      if (d.expert_load[1] > 0) calls.push_back(MakeCall(d, {0, 1}, 1));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    uint64_t operation = 0;
    for (Call& call : calls) {
      for (int r = 0; r < 2; ++r) Launch(group, call, r, operation);
      operation += 8;
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    RequireNoError(group, 2);
    for (const Call& call : calls) CompareCall(call);
  }
}

void TestSlotFailures() {
  constexpr uint64_t kOperation = 5;
  constexpr uint64_t kShort = kSecond / 10, kLong = 600 * kSecond;
  for (const bool has_own_room : {false, true}) {
    const Data d = MakeData(
        {16, 2, 2, 1, 640, FloatType::kBF16, Routing::kUniform, 100, true, true, has_own_room}, 2,
        41);
    std::vector<SlotEntry> entries;
    for (size_t i = 0; i < d.ids[1].size(); ++i) {
      entries.push_back({d.ids[1][i], d.topk_weights[1][i], 1});
    }
    std::vector<std::unique_ptr<LonelyCall>> calls;
    calls.push_back(std::make_unique<LonelyCall>(d, OpKind::kCombine, Form{}));
    for (const Form& form : FormsToFail(d)) {
      if (has_own_room && form.mode != DispatchMode::kCopy) continue;
      calls.push_back(std::make_unique<LonelyCall>(d, OpKind::kLayoutAndDispatch, form));
    }
    for (const auto& call : calls) {
      {                     // Rank 1 never comes. Calls after that end at once.
        const Group group;  // of its own: it will be broken
        call->Launch(group, kOperation, kShort, kLong);
        call->RequireFailed(group, kStart);
        REQUIRE(group.error(0).expected_epoch == 1 && group.error(0).seen_epoch == 0, "epochs");
        call->Launch(group, kOperation, kLong, kLong);
        call->RequireFailed(group, kStart);
      }
      {  // It has come: its ids are here, and its flag.
        const Group group;
        SendEntries(group, entries);
        SendFlag(group, kOperation);
        call->Launch(group, kOperation, kLong, kShort);
        call->RequireFailed(group, kEnd);
      }
      for (const bool is_in_slots : {false, true}) {  // It is in another call, of the same sizes.
        const Group group;
        SendEntries(group, entries);
        if (is_in_slots) {
          SendFlag(group, kOperation + 1);
        } else {
          const Shown shown{kOperation + 1, 1};
          CHECK_CUDA(cudaMemcpy(&group.control(0)->start[1].shown[kNumAddresses], &shown,
                                sizeof shown, cudaMemcpyHostToDevice));
        }
        call->Launch(group, kOperation, kLong, kLong);
        call->RequireFailed(group, kOtherCall);
        REQUIRE(group.error(0).expected_epoch == kOperation &&
                    group.error(0).seen_epoch == kOperation + 1,
                "operations");
      }
    }
  }
}

}  // namespace jax_ep::gpu::test
