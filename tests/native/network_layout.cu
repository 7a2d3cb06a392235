// Part of network_simulated: layouts over the simulated network, call after call in the same memory,
// against the tables by the book.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "tests/native/network_layouts.h"
#include "tests/native/network_ranks.h"
#include "tests/native/network_simulated.h"

namespace jax_ep::gpu::test {
namespace {

constexpr int kNumSms = 4;  // of each rank, at most: copies need some, too

// Wrong on purpose: does not wait for what is sent to this rank.
struct WithoutWait : SimulatedHop {
  template <typename MayGoOn>
  __device__ bool wait_signal(const uint64_t*, uint64_t, MayGoOn&) const {
    return true;
  }
};
// Likewise: the signal of a put goes by another queue pair.
struct SignalApart : SimulatedHop {
  template <typename MayGoOn>
  __device__ bool put_signal(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& may_go_on) const {
    return put(queue, rank, dst, src, num_bytes, may_go_on) &&
           SimulatedHop::put_signal(queue + 1, rank, dst, src, 0, signal, value, may_go_on);
  }
};

// Likewise: who gives up adds to words of other ranks, but they do not hear of it.
struct NotTold : SimulatedHop {
  template <typename MayGoOn>
  __device__ bool add_signal(int, int, uint64_t*, uint64_t, MayGoOn&) const {
    return true;
  }
};

// Buffers, view and launch of a rank's call.
template <typename Hop>
void Launch(const SimulatedNetwork& network, const NetworkLayoutMemory& memory, int rank,
            int num_ranks, LoneRank& own, const LayoutBuffers& buffers, const Data& d) {
  Hop hop;
  static_cast<SimulatedHop&>(hop) = network.hop(rank);
  const HopMemory at = network.memory(rank);
  const NodesView nodes{at.signals + memory.num_signals(), nullptr, rank, num_ranks};
  CHECK_CUDA(LaunchNetworkLayout(own.View(nodes), {at, memory, own.epoch()}, hop,
                                 buffers.Arguments(d), kNumSms, own.stream()));
}

Case CaseOfControls() {
  Case c{};
  c.num_tokens = 300;
  c.top_k = 4;
  c.experts_per_rank = 8;
  c.alignment = 1;
  c.num_channels = 8;
  c.type = FloatType::kBF16;
  c.routing = Routing::kUniform;
  c.capacity_percent = 100;
  return c;
}

// The last rank does not come. The first one's timeout is near, those of the others are far off: they
// end with it, and know who has given up on whom. False if that is not so.
template <typename Hop>
bool TestWithoutOne(const NetworkModel& model, int num_ranks) {
  constexpr uint64_t kNearNs = 300 * 1000 * 1000, kFarNs = 5 * kNearNs;
  constexpr double kMostSeconds = 1;
  constexpr bool kIsWrong = !std::is_same_v<Hop, SimulatedHop>;
  const NetworkLayoutMemory memory = LayoutMemory(num_ranks);
  const SimulatedNetwork network(num_ranks, 4, static_cast<size_t>(memory.num_bytes()),
                                 static_cast<size_t>(memory.num_signals() + num_ranks), model);
  const Data d = MakeData(CaseOfControls(), num_ranks, model.seed);
  const int missing = num_ranks - 1;
  std::vector<std::unique_ptr<LoneRank>> ranks;
  std::vector<std::unique_ptr<LayoutBuffers>> buffers;
  for (int r = 0; r < missing; ++r) {
    ranks.push_back(std::make_unique<LoneRank>(r == 0 ? kNearNs : kFarNs));
    buffers.push_back(std::make_unique<LayoutBuffers>(d, r, false));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto start = std::chrono::steady_clock::now();
  for (int r = 0; r < missing; ++r) {
    Launch<Hop>(network, memory, r, num_ranks, *ranks[r], *buffers[r], d);
  }
  for (const auto& rank : ranks) CHECK_CUDA(cudaStreamSynchronize(rank->stream()));
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  int num_wrong = 0;
  for (int r = 0; r < missing; ++r) {
    const ErrorRecord& error = ranks[r]->error();
    const int teller = slot_of_process(0), blamed = slot_of_process(missing);
    const bool is_named = r == 0 ? error.phase == kStart && error.peer_slot == blamed
                                 : error.phase == kToldByPeer && error.peer_slot == teller &&
                                       error.seen_epoch == static_cast<uint64_t>(blamed);
    const std::vector<int32_t> send_row = buffers[r]->Read(0);
    const bool is_filled =
        std::all_of(send_row.begin(), send_row.end(), [](int32_t row) { return row == kNoRow; });
    num_wrong += error.valid == 0 || !is_named || !is_filled;
  }
  const bool is_right = num_wrong == 0 && seconds.count() < kMostSeconds;
  std::printf(
      "%s: layout, %s, a rank that does not come, %s%d ranks: %d not as expected, %.2f s%s\n",
      is_right == kIsWrong ? "FAILED" : "ok", model.name, kIsWrong ? "others are not told, " : "",
      num_ranks, num_wrong, seconds.count(), kIsWrong ? " (wrong on purpose)" : "");
  std::fflush(stdout);
  return is_right != kIsWrong;
}

// Calls of random cases, of wrong hops all of one shape: how many numbers are wrong, how many ranks
// have recorded an error.
template <typename Hop>
void RunCalls(const NetworkModel& model, int num_ranks, int num_calls, uint64_t timeout_ns,
              uint64_t& num_wrong, uint64_t& num_ended) {
  constexpr bool kIsWrong = !std::is_same_v<Hop, SimulatedHop>;
  const NetworkLayoutMemory memory = LayoutMemory(num_ranks);
  std::vector<std::unique_ptr<LoneRank>> ranks;
  for (int r = 0; r < num_ranks; ++r) ranks.push_back(std::make_unique<LoneRank>(timeout_ns));
  const SimulatedNetwork network(num_ranks, 4, static_cast<size_t>(memory.num_bytes()),
                                 static_cast<size_t>(memory.num_signals() + num_ranks), model);
  std::mt19937_64 rng(model.seed);
  num_wrong = num_ended = 0;
  for (int call = 0; call < num_calls && num_ended == 0; ++call) {
    const Data d =
        kIsWrong ? MakeData(CaseOfControls(), num_ranks, rng()) : AnyLayoutData(num_ranks, rng);
    std::vector<std::unique_ptr<LayoutBuffers>> buffers;
    for (int r = 0; r < num_ranks; ++r) {
      buffers.push_back(std::make_unique<LayoutBuffers>(d, r, kIsWrong));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    for (int r = 0; r < num_ranks; ++r) {
      Launch<Hop>(network, memory, r, num_ranks, *ranks[r], *buffers[r], d);
    }
    for (int r = 0; r < num_ranks; ++r) {
      CHECK_CUDA(cudaStreamSynchronize(ranks[r]->stream()));
      num_ended += ranks[r]->error().valid;
      num_wrong += buffers[r]->NumWrong(d, r);
    }
  }
}

bool Report(const NetworkModel& model, const char* what, int num_ranks, int num_calls,
            uint64_t num_wrong, uint64_t num_ended, bool is_expected_right) {
  const bool is_right = num_wrong + num_ended == 0;
  const bool is_failure = is_right != is_expected_right;
  std::printf(
      "%s: layout, %s, seed %llu, %s, %d ranks, %d calls: %llu numbers wrong, %llu errors%s\n",
      is_failure ? "FAILED" : "ok", model.name, static_cast<unsigned long long>(model.seed), what,
      num_ranks, num_calls, static_cast<unsigned long long>(num_wrong),
      static_cast<unsigned long long>(num_ended), is_expected_right ? "" : " (wrong on purpose)");
  std::fflush(stdout);
  return !is_failure;
}

}  // namespace

int TestLayouts(const NetworkModel& model, bool is_small) {
  constexpr uint64_t kSecond = 1000000000;
  int num_failed = 0;
  uint64_t wrong = 0, ended = 0;
  for (int num_ranks : {2, 4, 8}) {
    const int num_calls = is_small ? 8 : 40;
    RunCalls<SimulatedHop>(model, num_ranks, num_calls, 20 * kSecond, wrong, ended);
    num_failed += !Report(model, "as it is", num_ranks, num_calls, wrong, ended, true);
  }
  num_failed += !TestWithoutOne<SimulatedHop>(model, 4);
  if (model.departure == NetworkModel::Departure::kAtOnce) return num_failed;
  if (model.seed == 1) num_failed += !TestWithoutOne<NotTold>(model, 4);
  RunCalls<WithoutWait>(model, 4, 8, 2 * kSecond, wrong, ended);
  num_failed += !Report(model, "without waits", 4, 8, wrong, ended, false);
  RunCalls<SignalApart>(model, 4, 8, 2 * kSecond, wrong, ended);
  num_failed += !Report(model, "signals apart", 4, 8, wrong, ended, false);
  return num_failed;
}

}  // namespace jax_ep::gpu::test
