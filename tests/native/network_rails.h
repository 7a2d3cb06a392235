// The parts of network_rails, and what they have in common: ranks of several nodes as streams of one
// process on one GPU, over the simulated network.
#ifndef JAX_EP_TESTS_NATIVE_NETWORK_RAILS_H_
#define JAX_EP_TESTS_NATIVE_NETWORK_RAILS_H_

#include <cuda_runtime.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/network/rail/rail.h"
#include "cuda/network/simulated_hop.cuh"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_oracle.h"
#include "tests/native/kernels_ranks.h"
#include "tests/native/simulated_network.h"

namespace jax_ep::gpu::test {

// Each says what it found, and counts what was not as expected.
void TestRailDispatch(Group& group, bool is_small);
void TestRailCombine(Group& group, bool is_small);
inline int g_num_failed = 0;
constexpr int kEnoughFailures = 4;  // to see what is wrong: the rest would take its timeouts

// What is wrong with a hop, on purpose.
enum class Fault {
  kNone,
  kHeadFirst,      // the signal comes with a chunk's head: rows are forwarded before they are whole
  kWithoutCredit,  // staging is used again before there is credit for it
  kNotTold,        // other nodes do not hear of who has given up
};
inline constexpr const char* kFaultNames[] = {"", ", signal with the head", ", without credit",
                                              ", other nodes are not told"};

// The simulated network's, or one that is wrong.
struct FaultyHop : SimulatedHop {
  Fault fault;
  const uint64_t *first_credit, *given_up;  // of this rank's signals, in their order

  template <typename MayGoOn>
  __device__ bool put_signal(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& may_go_on) const {
    const size_t head = fault == Fault::kHeadFirst ? sizeof(ChunkHead) : num_bytes;
    if (!SimulatedHop::put_signal(queue, rank, dst, src, head, signal, value, may_go_on)) {
      return false;
    }
    return num_bytes == head ||
           put(queue, rank, static_cast<char*>(dst) + head, static_cast<const char*>(src) + head,
               num_bytes - head, may_go_on);
  }
  template <typename MayGoOn>
  __device__ bool wait_signal(const uint64_t* signal, uint64_t at_least, MayGoOn& may_go_on) const {
    return (fault == Fault::kWithoutCredit && signal >= first_credit) ||
           SimulatedHop::wait_signal(signal, at_least, may_go_on);
  }
  template <typename MayGoOn>
  __device__ bool add_signal(int queue, int rank, uint64_t* signal, uint64_t value,
                             MayGoOn& may_go_on) const {
    return (fault == Fault::kNotTold && signal >= given_up) ||
           SimulatedHop::add_signal(queue, rank, signal, value, may_go_on);
  }
};

using Clock = std::chrono::steady_clock;
inline double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

struct JobShape {
  int num_ranks, ranks_per_node, num_blocks, num_slots;
  int64_t slot_bytes;

  int num_nodes() const { return num_ranks / ranks_per_node; }
  int num_channels() const { return num_blocks * channels_per_block(num_nodes()); }
  RailMemory rail() const { return {num_nodes(), num_channels(), num_slots, slot_bytes}; }
  std::string name() const {
    char text[96];
    std::snprintf(text, sizeof text, "%d ranks, %d a node, %d blocks, %d slots of %lld bytes",
                  num_ranks, ranks_per_node, num_blocks, num_slots,
                  static_cast<long long>(slot_bytes));
    return text;
  }
};

// Of a call: all there are, or, in some, one less. All ranks have the same.
inline int BlocksOf(const JobShape& shape, uint64_t operation) {
  return shape.num_blocks - (shape.num_blocks > 1 && operation % 3 == 0);
}

inline Case AnyCase(std::mt19937_64& rng, int64_t slot_bytes) {
  const auto choose = [&](std::vector<int64_t> of) { return of[rng() % of.size()]; };
  Case c{};
  c.type = rng() % 3 == 0 ? FloatType::kF32 : FloatType::kBF16;
  c.top_k = choose({1, 2, 4, 8});
  do {
    c.num_channels = choose({8, 24, 64, 264, 520, 640, 1152, 7168});
  } while (dispatch_chunks(c.top_k, c.num_channels * TypeBytes(c.type)).num_rows(slot_bytes) < 1);
  c.num_tokens = c.num_channels > 2000  ? choose({3, 12})
                 : c.num_channels > 200 ? choose({1, 40, 80})
                                        : choose({5, 130, 600});
  c.experts_per_rank = choose({1, 2, 8});
  c.alignment = choose({1, 1, 8});
  c.routing = static_cast<Routing>(rng() % 5);
  c.capacity_percent = static_cast<int>(choose({40, 100, 130}));
  c.has_own_room = rng() % 4 == 0;
  c.weighted = rng() % 4 != 0;
  c.zero_tail = rng() % 2 == 0;
  return c;
}

// Every call has rows for all, and several times as many chunks as a channel has slots.
inline Case CaseOfControls() {
  return {192, 4, 8, 1, 520, FloatType::kBF16, Routing::kUniform, 100, true, true};
}

// The ranks of a group on several nodes.
class Job {
 public:
  // `others_timeout_ns`, if not 0, is of all ranks but the first.
  Job(Group& group, const JobShape& shape, const NetworkModel& model, uint64_t timeout_ns,
      uint64_t others_timeout_ns = 0)
      : group_(group),
        shape_(shape),
        timeout_ns_(timeout_ns),
        others_timeout_ns_(others_timeout_ns == 0 ? timeout_ns : others_timeout_ns),
        network_(shape.num_ranks, shape.num_channels(),
                 static_cast<size_t>(shape.rail().num_bytes()),
                 static_cast<size_t>(shape.rail().num_signals() + shape.num_ranks), model) {
    group_.SetUpAgain();
    for (int r = 0; r < shape.num_ranks; ++r) {
      chunks_.push_back(std::make_unique<Buffer<RailChunks>>(
          static_cast<size_t>(shape.num_nodes() * shape.num_channels())));
      chunks_.back()->Fill(0);
      has_told_.push_back(std::make_unique<Buffer<uint64_t>>(size_t{1}));
      has_told_.back()->Fill(0);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  // For a rank's next call.
  GroupView View(int rank, uint64_t operation) const {
    const int node = rank / shape_.ranks_per_node, index = rank % shape_.ranks_per_node;
    std::vector<int> slots(static_cast<size_t>(shape_.ranks_per_node));
    for (int i = 0; i < shape_.ranks_per_node; ++i) slots[i] = node * shape_.ranks_per_node + i;
    GroupView view =
        group_.View(index, slots, operation, rank == 0 ? timeout_ns_ : others_timeout_ns_);
    view.nodes = {GivenUp(rank), has_told_[rank]->get(), rank, shape_.num_ranks};
    return view;
  }
  RailView Rail(int rank) const {
    return {shape_.rail(), network_.memory(rank), chunks_[rank]->get(),
            rank / shape_.ranks_per_node, shape_.ranks_per_node};
  }
  FaultyHop HopOf(int rank, Fault fault) const {
    return {network_.hop(rank), fault, shape_.rail().credit(network_.memory(rank), 0, 0),
            GivenUp(rank)};
  }

  // Whether a rank's calls have ended. Ends the program if they should have by now.
  bool IsIdle(int rank, Clock::time_point start) {
    const cudaError_t status = cudaStreamQuery(group_.stream(rank));
    if (status == cudaSuccess) return true;
    if (status != cudaErrorNotReady) CHECK_CUDA(status);
    if (SecondsSince(start) < 20) return false;
    std::printf("FAILED: rank %d does not end, %s\n", rank, shape_.name().c_str());
    Print();
    std::_Exit(1);
  }
  // Until all ranks have ended.
  void Synchronize() {
    const auto start = Clock::now();
    for (int r = 0; r < shape_.num_ranks; ++r) {
      while (!IsIdle(r, start)) {
      }
    }
  }

  int NumErrors() const {
    int num_errors = 0;
    for (int r = 0; r < shape_.num_ranks; ++r) num_errors += group_.error(r).valid != 0;
    return num_errors;
  }
  const JobShape& shape() const { return shape_; }
  const ErrorRecord& error(int rank) const { return group_.error(rank); }

  // All that says how far ranks have come.
  void Print() {
    const RailMemory at = shape_.rail();
    const cudaStream_t stream = Other();
    const auto read = [&](void* to, const void* from, size_t num_bytes) {
      CHECK_CUDA(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDefault, stream));
      CHECK_CUDA(cudaStreamSynchronize(stream));
    };
    for (int r = 0; r < shape_.num_ranks; ++r) {
      const ErrorRecord& e = group_.error(r);
      const ControlBlock& control = *group_.control(r);
      Local local;
      read(&local, &control.local, sizeof local);
      std::printf(
          "  rank %d: error %d: slot %d waits for slot %d, phase %u, expected %llu, seen "
          "%llu; running %llx, broken %llx\n",
          r, e.valid != 0, e.slot, e.peer_slot, e.phase,
          static_cast<unsigned long long>(e.expected_epoch),
          static_cast<unsigned long long>(e.seen_epoch),
          static_cast<unsigned long long>(local.running),
          static_cast<unsigned long long>(local.broken));
      const int first = r / shape_.ranks_per_node * shape_.ranks_per_node;
      for (int p = first; p < first + shape_.ranks_per_node; ++p) {
        uint64_t progress[kMaxBlocks];
        read(progress, control.progress[p], sizeof progress);
        std::printf("    with rank %d: calls %llu; its blocks, call and units:", p,
                    static_cast<unsigned long long>(local.epoch[p]));
        for (int b = 0; b < shape_.num_blocks && p != r; ++b) {
          std::printf(" %llu/%llu", static_cast<unsigned long long>(epoch_of(progress[b])),
                      static_cast<unsigned long long>(progress[b] & 0xffffff));
        }
        std::printf("\n");
      }
      const HopMemory memory = network_.memory(r);
      for (int m = 0; m < shape_.num_nodes(); ++m) {
        for (int q = 0; q < shape_.num_channels() && m != r / shape_.ranks_per_node; ++q) {
          RailChunks chunks;
          read(&chunks, chunks_[r]->get() + m * shape_.num_channels() + q, sizeof chunks);
          std::printf(
              "    with node %d, channel %d: before the call sent %llu, received %llu; credit "
              "%llu; landing, flag and number (call, rows, last):",
              m, q, static_cast<unsigned long long>(chunks.sent),
              static_cast<unsigned long long>(chunks.received),
              static_cast<unsigned long long>(
                  __atomic_load_n(at.credit(memory, m, q), __ATOMIC_ACQUIRE)));
          for (int s = 0; s < shape_.num_slots; ++s) {
            ChunkHead head;
            read(&head, at.landing(memory, m, q, static_cast<uint64_t>(s)), sizeof head);
            std::printf(" %llu:%llu(%llu, %u, %u)",
                        static_cast<unsigned long long>(__atomic_load_n(
                            at.filled(memory, m, q, static_cast<uint64_t>(s)), __ATOMIC_ACQUIRE)),
                        static_cast<unsigned long long>(head.number),
                        static_cast<unsigned long long>(head.operation), head.num_rows,
                        head.is_last);
          }
          std::printf("\n");
        }
      }
    }
    std::fflush(stdout);
  }

  cudaStream_t stream(int rank) const { return group_.stream(rank); }
  uint64_t num_out_of_order() const { return network_.num_out_of_order(); }
  // That ranks have received in all calls.
  uint64_t num_chunks() const {
    uint64_t sum = 0;
    for (const auto& of_rank : chunks_) {
      for (const RailChunks& chunks : of_rank->Read()) sum += chunks.received;
    }
    return sum;
  }

 private:
  uint64_t* GivenUp(int rank) const {
    return network_.memory(rank).signals + shape_.rail().num_signals();
  }
  cudaStream_t Other() const {
    static cudaStream_t stream = [] {
      cudaStream_t made;
      CHECK_CUDA(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking));
      return made;
    }();
    return stream;
  }

  Group& group_;
  const JobShape shape_;
  const uint64_t timeout_ns_, others_timeout_ns_;
  SimulatedNetwork network_;
  std::vector<std::unique_ptr<Buffer<RailChunks>>> chunks_;  // by rank
  std::vector<std::unique_ptr<Buffer<uint64_t>>> has_told_;  // likewise
};

// Calls run(shape, model, num_calls) for all that is tried, run_controls(shape, model) for hops that
// are wrong.
template <typename Run, typename RunControls>
void RunJobs(bool is_small, const Run& run, const RunControls& run_controls) {
  const int num_seeds = is_small ? 1 : 3, num_calls = is_small ? 6 : 12;
  for (uint64_t seed = 1; seed <= static_cast<uint64_t>(num_seeds); ++seed) {
    for (const NetworkModel& model : NetworkModels(seed)) {
      for (const JobShape& shape :
           {JobShape{2, 1, 1, 1, 16384}, JobShape{2, 1, 3, 2, 4096}, JobShape{4, 2, 1, 1, 4096},
            JobShape{4, 2, 3, 3, 32768}, JobShape{4, 1, 2, 2, 4096}, JobShape{8, 2, 2, 2, 16384},
            JobShape{8, 4, 4, 3, 32768}, JobShape{8, 1, 2, 2, 16384}, JobShape{3, 1, 2, 2, 4096}}) {
        run(shape, model, num_calls);
      }
      if (model.departure == NetworkModel::Departure::kAtOnce) continue;
      for (const JobShape& shape : {JobShape{2, 1, 2, 2, 4096}, JobShape{4, 2, 2, 2, 4096}}) {
        run_controls(shape, model);
      }
    }
  }
}
// On which ranks fail.
inline std::vector<JobShape> FailureJobs() {
  return {{2, 1, 2, 2, 4096}, {4, 2, 2, 2, 4096}, {8, 4, 2, 2, 4096}};
}
// There the last rank does not come. The first one's timeout is near, those of the others are far off,
// so they have to be told.
constexpr uint64_t kNearTimeoutNs = kSecond / 2, kFarTimeoutNs = 4 * kSecond;
constexpr double kMostSeconds = 2.5;  // the first one's, and leave.cuh's for who stands still
// What is known of a rank that ended so by itself, or was told.
inline bool HasHeard(const Job& job, int rank) {
  const ErrorRecord& error = job.error(rank);
  const int on_node = job.shape().ranks_per_node;
  if (error.valid == 0) return false;
  if (rank == 0) return error.phase == kStart && error.peer_slot >= kMaxPeers;
  const int teller = rank < on_node ? 0 : slot_of_process(0);
  return error.phase == kToldByPeer && error.peer_slot == teller &&
         error.seen_epoch >= static_cast<uint64_t>(kMaxPeers);
}
// A line for all of them: `num_wrong` ranks are not as they should be.
void ReportWithoutOne(Job& job, const NetworkModel& model, const char* what, Fault fault,
                      int num_wrong, double seconds);

// Of one call, on a rank's stream.
using LaunchCall = std::function<void(int rank, int call)>;
// Calls of all ranks, each as soon as the rank has ended the one before, some of them late. Not all of
// them at once: one that waits in its stream may hold up the copies of others behind it, for streams
// share queues.
void RunCalls(Job& job, int num_calls, std::mt19937_64& rng, const LaunchCall& launch);

// A line that says how calls went.
void ReportCalls(Job& job, const NetworkModel& model, const char* what, Fault fault, int num_calls,
                 int num_wrong, double seconds);

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_NETWORK_RAILS_H_
