// Part of network_simulated: layouts over the simulated network, call after call in the same memory,
// against the tables by the book.
#include <algorithm>
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
    Case c = AnyLayoutCase(rng);
    if (kIsWrong) {
      c.num_tokens = 300;
      c.top_k = 4;
      c.experts_per_rank = 8;
      c.routing = Routing::kUniform;
    }
    const Data d = kIsWrong ? MakeData(c, num_ranks, rng()) : AnyLayoutData(num_ranks, rng);
    std::vector<std::unique_ptr<LayoutBuffers>> buffers;
    for (int r = 0; r < num_ranks; ++r) {
      buffers.push_back(std::make_unique<LayoutBuffers>(d, r, kIsWrong));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    for (int r = 0; r < num_ranks; ++r) {
      Hop hop;
      static_cast<SimulatedHop&>(hop) = network.hop(r);
      const NetworkView view{network.memory(r), memory, ranks[r]->epoch()};
      const NodesView nodes{network.memory(r).signals + memory.num_signals(), nullptr, r,
                            num_ranks};
      CHECK_CUDA(LaunchNetworkLayout(ranks[r]->View(nodes), view, hop, buffers[r]->Arguments(d),
                                     kNumSms, ranks[r]->stream()));
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
  if (model.departure == NetworkModel::Departure::kAtOnce) return num_failed;
  RunCalls<WithoutWait>(model, 4, 8, 2 * kSecond, wrong, ended);
  num_failed += !Report(model, "without waits", 4, 8, wrong, ended, false);
  RunCalls<SignalApart>(model, 4, 8, 2 * kSecond, wrong, ended);
  num_failed += !Report(model, "signals apart", 4, 8, wrong, ended, false);
  return num_failed;
}

}  // namespace jax_ep::gpu::test
