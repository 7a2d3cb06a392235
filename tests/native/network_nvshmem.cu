// network_nvshmem: the exchange and layouts over NVSHMEM, a process for each rank.
//   network_nvshmem RANK NUM_RANKS ORDINAL FOLDER [reordered]
// The processes find each other by files in FOLDER, which begins empty. `reordered`: what is between
// them brings things in any order that it may (tests/native/wire), so that all wrong protocols must be
// seen.
#include <nvshmem.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/network/nvshmem_hop.cuh"
#include "tests/native/network_exchange.cuh"
#include "tests/native/network_layouts.h"
#include "tests/native/network_ranks.h"
#include "xla_ffi/network/nvshmem.h"

namespace jax_ep::gpu::test {
namespace {

constexpr uint64_t kTimeoutNs = uint64_t{20} * 1000 * 1000 * 1000;
constexpr int kNumChunks = 32;

std::string AwaitFile(const std::string& path) {
  for (int i = 0; i < 3000; ++i) {
    if (std::ifstream file(path, std::ios::binary); file) {
      std::ostringstream text;
      text << file.rdbuf();
      return text.str();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  throw std::runtime_error("no " + path + " within 30 s");
}

std::string ShareId(int rank, const std::string& folder) {
  const std::string path = folder + "/unique_id";
  if (rank != 0) return AwaitFile(path);
  const std::string id = Nvshmem::UniqueId();
  std::ofstream(path + ".part", std::ios::binary) << id;
  if (std::rename((path + ".part").c_str(), path.c_str()) != 0) {
    throw std::runtime_error("cannot write " + path);
  }
  return id;
}

// Part of the symmetric heap.
class Heap {
 public:
  Heap(size_t num_bytes, size_t num_signals)
      : memory_{static_cast<char*>(nvshmem_malloc(num_bytes)),
                static_cast<uint64_t*>(nvshmem_calloc(num_signals, sizeof(uint64_t)))} {
    if (memory_.bytes == nullptr || memory_.signals == nullptr) {
      throw std::runtime_error("the heap is too small");
    }
  }
  ~Heap() {
    nvshmem_free(memory_.signals);
    nvshmem_free(memory_.bytes);
  }
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;
  const HopMemory& memory() const { return memory_; }

 private:
  const HopMemory memory_;
};

class Program {
 public:
  Program(int rank, int num_ranks)
      : rank_(rank),
        shape_{num_ranks, 4, 3, 4, 14336},
        heap_(shape_.num_bytes(), shape_.num_signals()),
        exchange_rank_(kTimeoutNs) {
    cudaFuncAttributes attributes;
    CHECK_CUDA(cudaFuncGetAttributes(&attributes, &exchange<NvshmemHop>));
  }

  // Wrong rows and ended waits of this rank, in `num_rounds` launches.
  ExchangeResults Run(Protocol protocol, int num_rounds) {
    exchange_rank_.Clear();
    nvshmem_barrier_all();
    const auto start = std::chrono::steady_clock::now();
    for (int round = 0; round < num_rounds; ++round, first_chunk_ += kNumChunks) {
      exchange_rank_.Launch(
          NvshmemHop{}, {shape_, heap_.memory(), nullptr, first_chunk_, kNumChunks, rank_, protocol,
                         round == 0 ? uint64_t{1000} * 1000 : 0});
    }
    const ExchangeResults results = exchange_rank_.Wait();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    const double bytes = static_cast<double>(shape_.chunk_bytes()) * kNumChunks * num_rounds *
                         shape_.num_channels * (shape_.num_ranks - 1);
    if (rank_ == 0) {
      std::printf("NOTE: %s: %.2f GB/s sent by a rank, %d launches\n",
                  kProtocolNames[static_cast<int>(protocol)], bytes / seconds.count() / 1e9,
                  num_rounds);
    }
    nvshmem_barrier_all();
    return results;
  }

 private:
  const int rank_;
  const ExchangeShape shape_;
  const Heap heap_;
  ExchangeRank exchange_rank_;
  uint64_t first_chunk_ = 0;
};

// Numbers of this rank's tables that are wrong, in layouts one after the other.
uint64_t RunLayouts(int rank, int num_ranks, int num_calls) {
  const NetworkLayoutMemory memory = LayoutMemory(num_ranks);
  const Heap heap(static_cast<size_t>(memory.num_bytes()),
                  static_cast<size_t>(memory.num_signals() + num_ranks));
  LoneRank own(kTimeoutNs);
  CHECK_CUDA(PrepareNetworkLayout<NvshmemHop>());
  std::mt19937_64 rng(1);  // the same on all ranks
  uint64_t num_wrong = 0;
  for (int call = 0; call < num_calls && own.error().valid == 0; ++call) {
    const Data d = AnyLayoutData(num_ranks, rng);
    LayoutBuffers buffers(d, rank, false);
    const NetworkView view{heap.memory(), memory, own.epoch()};
    const NodesView nodes{heap.memory().signals + memory.num_signals(), nullptr, rank, num_ranks};
    CHECK_CUDA(LaunchNetworkLayout(own.View(nodes), view, NvshmemHop{}, buffers.Arguments(d), 4,
                                   own.stream()));
    CHECK_CUDA(cudaStreamSynchronize(own.stream()));
    num_wrong += buffers.NumWrong(d, rank);
  }
  nvshmem_barrier_all();
  return num_wrong + own.error().valid;
}

// Whether a protocol does as it must: leaves no row wrong; or, if it is wrong on purpose, some.
bool Try(Program& program, Protocol protocol, int rank, int num_ranks, int num_rounds) {
  const ExchangeResults results = program.Run(protocol, num_rounds);
  const bool is_control = protocol != Protocol::kPutSignal && protocol != Protocol::kFlushAndSignal;
  const bool is_right = results.wrong_rows + results.ended_waits == 0;
  const bool is_failure = num_ranks > 1 && is_right == is_control;
  std::printf("%s: %s, rank %d of %d: %llu rows wrong, %llu waits ended%s\n",
              is_failure ? "FAILED" : "ok", kProtocolNames[static_cast<int>(protocol)], rank,
              num_ranks, results.wrong_rows, results.ended_waits,
              is_control ? " (wrong on purpose)" : "");
  std::fflush(stdout);
  return !is_failure;
}

int Main(int rank, int num_ranks, int ordinal, const std::string& folder, bool is_reordered) {
  Nvshmem& nvshmem = Nvshmem::Get();
  nvshmem.Start(ShareId(rank, folder), rank, num_ranks, ordinal);
  int num_failed = 0;
  for (int round = 0; round < 3; ++round) {
    for (LinkResult link : nvshmem.CheckLinks(std::chrono::seconds(10))) {
      num_failed += link != kLinkGood;
    }
    nvshmem_barrier_all();
  }
  std::printf("%s: links of rank %d\n", num_failed > 0 ? "FAILED" : "ok", rank);
  const uint64_t num_wrong = RunLayouts(rank, num_ranks, 40);
  num_failed += num_wrong > 0;
  std::printf("%s: 40 layouts, rank %d of %d: %llu numbers wrong\n",
              num_wrong > 0 ? "FAILED" : "ok", rank, num_ranks,
              static_cast<unsigned long long>(num_wrong));
  {
    Program program(rank, num_ranks);
    for (Protocol protocol : {Protocol::kPutSignal, Protocol::kFlushAndSignal}) {
      num_failed += !Try(program, protocol, rank, num_ranks, is_reordered ? 3 : 20);
    }
  }
  // Peer-mapped memory orders more than a network: of the wrong protocols one alone is seen there. Each
  // in memory of its own, since they leave signals in disorder.
  std::vector<Protocol> controls{Protocol::kWithoutCredit};
  if (is_reordered) controls = {Protocol::kWithoutFlush, Protocol::kOtherQueue, controls[0]};
  for (Protocol protocol : controls) {
    Program program(rank, num_ranks);
    num_failed += !Try(program, protocol, rank, num_ranks, 1);
  }
  nvshmem.Finalize();
  if (num_failed == 0) std::printf("OK: all as expected\n");
  return num_failed > 0 ? 1 : 0;
}

}  // namespace
}  // namespace jax_ep::gpu::test

int main(int argc, char** argv) {
  const bool is_reordered = argc == 6 && std::string(argv[5]) == "reordered";
  if (argc != 5 && !is_reordered) return 2;
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  try {
    return jax_ep::gpu::test::Main(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]),
                                   argv[4], is_reordered);
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    std::fflush(stdout);
    _exit(1);  // NVSHMEM's own end would wait for the others
  }
}
