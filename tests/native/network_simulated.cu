// network_simulated: the exchange and layouts over the simulated network, ranks as streams of one
// process on one GPU; each model with each protocol, several seeds. Wrong protocols have to be
// caught, or nothing that is right here says anything.
//   network_simulated [--small]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "tests/native/network_exchange.cuh"
#include "tests/native/network_simulated.h"
#include "tests/native/simulated_network.h"

namespace jax_ep::gpu::test {
namespace {

constexpr uint64_t kTimeoutNs = uint64_t{20} * 1000 * 1000 * 1000;
constexpr uint64_t kControlTimeoutNs = uint64_t{2} * 1000 * 1000 * 1000;

int g_num_failed = 0;

// What a model makes of a protocol.
enum class Outcome { kRight, kCaught, kAny };

Outcome Expected(const NetworkModel& model, Protocol protocol) {
  const bool is_calm = model.departure == NetworkModel::Departure::kAtOnce;
  switch (protocol) {
    case Protocol::kPutSignal:
    case Protocol::kFlushAndSignal:
      return Outcome::kRight;
    case Protocol::kWithoutFlush:  // hop.cuh forbids it, reliable connections happen to order it
      if (model.order == NetworkModel::Order::kPair) return Outcome::kRight;
      return is_calm ? Outcome::kAny : Outcome::kCaught;
    case Protocol::kOtherQueue:
      return is_calm ? Outcome::kAny : Outcome::kCaught;
    default:
      return Outcome::kCaught;
  }
}

void Run(const NetworkModel& model, Protocol protocol, int num_ranks, int num_rounds) {
  const ExchangeShape shape{num_ranks, 4, 3, 4, 7168};
  const Outcome expected = Expected(model, protocol);
  const uint64_t timeout = expected == Outcome::kRight ? kTimeoutNs : kControlTimeoutNs;
  std::vector<std::unique_ptr<ExchangeRank>> ranks;
  for (int r = 0; r < num_ranks; ++r) ranks.push_back(std::make_unique<ExchangeRank>(timeout));
  const SimulatedNetwork network(num_ranks, shape.num_channels, shape.num_bytes(),
                                 shape.num_signals(), model);
  const auto start = std::chrono::steady_clock::now();
  constexpr int kNumChunks = 8;
  ExchangeResults sum{};
  for (int round = 0; round < num_rounds && sum.ended_waits == 0; ++round) {
    for (int r = 0; r < num_ranks; ++r) {
      const Exchange x{shape,      network.memory(r),
                       nullptr,    static_cast<uint64_t>(round) * kNumChunks,
                       kNumChunks, r,
                       protocol,   uint64_t{1000} * 1000};
      ranks[r]->Launch(network.hop(r), x);
    }
    sum = {};
    for (const auto& rank : ranks) {
      const ExchangeResults results = rank->Wait();
      sum.wrong_rows += results.wrong_rows;
      sum.ended_waits += results.ended_waits;
    }
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const bool is_right = sum.wrong_rows + sum.ended_waits == 0;
  const bool is_failure =
      (expected == Outcome::kRight && !is_right) || (expected == Outcome::kCaught && is_right);
  g_num_failed += is_failure;
  std::printf(
      "%s: %s, seed %llu, %s, %d ranks: %llu rows wrong, %llu waits ended, %llu out of order, "
      "%.2f s%s\n",
      is_failure ? "FAILED" : "ok", model.name, static_cast<unsigned long long>(model.seed),
      kProtocolNames[static_cast<int>(protocol)], num_ranks, sum.wrong_rows, sum.ended_waits,
      static_cast<unsigned long long>(network.num_out_of_order()), seconds.count(),
      expected == Outcome::kCaught ? " (wrong on purpose)" : "");
  std::fflush(stdout);
}

// A rank that does not come: the others' waits end, and their records say for whom they waited.
void RunWithoutOne(const NetworkModel& model) {
  const ExchangeShape shape{2, 4, 3, 4, 7168};
  ExchangeRank rank(kControlTimeoutNs / 2);
  const SimulatedNetwork network(2, shape.num_channels, shape.num_bytes(), shape.num_signals(),
                                 model);
  rank.Launch(network.hop(0),
              {shape, network.memory(0), nullptr, 0, 8, 0, Protocol::kPutSignal, 0});
  const ExchangeResults results = rank.Wait();
  const ErrorRecord& error = rank.error();
  const bool is_right = results.ended_waits == 8 && error.valid == 1 && error.peer_slot == 1 &&
                        error.phase == kProgress;
  g_num_failed += !is_right;
  std::printf("%s: %s, a rank that does not come: %llu of 8 waits ended, for slot %d\n",
              is_right ? "ok" : "FAILED", model.name, results.ended_waits, error.peer_slot);
}

int Main(bool is_small) {
  using Order = NetworkModel::Order;
  using Departure = NetworkModel::Departure;
  const int num_seeds = is_small ? 1 : 4, num_rounds = is_small ? 2 : 4;
  for (uint64_t seed = 1; seed <= static_cast<uint64_t>(num_seeds); ++seed) {
    const NetworkModel models[] = {
        {"rc, at once", Order::kPair, Departure::kAtOnce, 0, 0, seed},
        {"rc, random", Order::kPair, Departure::kRandom, 2000, 2048, seed},
        {"rc, youngest first", Order::kPair, Departure::kYoungestFirst, 2000, 2048, seed},
        {"srd, random", Order::kNone, Departure::kRandom, 2000, 2048, seed},
        {"srd, youngest first", Order::kNone, Departure::kYoungestFirst, 2000, 2048, seed}};
    for (const NetworkModel& model : models) {
      for (Protocol protocol :
           {Protocol::kPutSignal, Protocol::kFlushAndSignal, Protocol::kWithoutFlush,
            Protocol::kOtherQueue, Protocol::kWithoutCredit}) {
        Run(model, protocol, 2, num_rounds);
      }
      if (is_small && model.departure != Departure::kYoungestFirst) continue;
      Run(model, Protocol::kPutSignal, 4, 2);
      Run(model, Protocol::kFlushAndSignal, 4, 1);
      if (seed == 1) Run(model, Protocol::kPutSignal, 8, 1);
      g_num_failed += TestLayouts(model, is_small);
    }
    if (seed == 1) RunWithoutOne(models[1]);
  }
  if (g_num_failed > 0) std::printf("%d FAILED\n", g_num_failed);
  if (g_num_failed == 0) std::printf("OK: all as expected\n");
  return g_num_failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace jax_ep::gpu::test

int main(int argc, char** argv) {
  // Before CUDA starts: a queue of its own for each stream, or copies wait behind kernels that wait
  // for them; and all kernels at once.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  return jax_ep::gpu::test::Main(argc > 1 && std::strcmp(argv[1], "--small") == 0);
}
