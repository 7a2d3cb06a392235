// network_dispatch: dispatch over rails and the simulated network, ranks as streams of one process on
// one GPU: random cases, call after call in the same memory, with late ranks, against the oracle; a
// rank that does not come; hops that are wrong, which have to be caught.
//   network_dispatch [--small]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/network/rail/dispatch.cuh"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_oracle.h"
#include "tests/native/kernels_ranks.h"
#include "tests/native/simulated_network.h"

namespace jax_ep::gpu::test {
namespace {

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

int g_num_failed = 0;
constexpr int kEnoughFailures = 4;  // to see what is wrong: the rest would take its timeouts

// Wrong on purpose: the signal comes with the head of a chunk, not with all of it, so that rows are
// forwarded before they are whole.
struct HeadFirst : SimulatedHop {
  template <typename MayGoOn>
  __device__ bool put_signal(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& may_go_on) const {
    constexpr size_t kHead = sizeof(ChunkHead);
    if (!SimulatedHop::put_signal(queue, rank, dst, src, kHead, signal, value, may_go_on)) {
      return false;
    }
    return num_bytes == kHead ||
           put(queue, rank, static_cast<char*>(dst) + kHead, static_cast<const char*>(src) + kHead,
               num_bytes - kHead, may_go_on);
  }
};
// Likewise: staging is used again before there is credit for it.
struct WithoutCredit : SimulatedHop {
  const uint64_t* first_credit;
  template <typename MayGoOn>
  __device__ bool wait_signal(const uint64_t* signal, uint64_t at_least, MayGoOn& may_go_on) const {
    return signal >= first_credit || SimulatedHop::wait_signal(signal, at_least, may_go_on);
  }
};

template <typename Hop>
constexpr bool kIsWrong = !std::is_same_v<Hop, SimulatedHop>;

struct JobShape {
  int num_ranks, ranks_per_node, num_channels, num_slots;
  int64_t slot_bytes;

  int num_nodes() const { return num_ranks / ranks_per_node; }
  RailMemory rail() const { return {num_nodes(), num_channels, num_slots, slot_bytes}; }
  std::string name() const {
    char text[96];
    std::snprintf(text, sizeof text, "%d ranks, %d a node, %d channels, %d slots of %lld bytes",
                  num_ranks, ranks_per_node, num_channels, num_slots,
                  static_cast<long long>(slot_bytes));
    return text;
  }
};

__global__ void SpinFor(uint64_t ns) {
  const uint64_t start = globaltimer_ns();
  while (globaltimer_ns() - start < ns) {
  }
}

// One rank's operands, the tables of its layout, and its results, which are poisoned.
struct DispatchBuffers {
  DispatchBuffers(const Data& d, int r)
      : ids(d.ids[r]),
        send_row(d.send_row[r]),
        recv_src(d.recv_src[r]),
        group_sizes(d.group_sizes[r]),
        x(d.x[r]),
        tokens(d.capacity * d.row_bytes),
        topk_weights(d.topk_weights[r]),
        weights(d.capacity) {}

  DispatchArguments Arguments(const Data& d) {
    CallBuffers<uint8_t> b{};
    b.ids = ids.get();
    b.send_row = send_row.get();
    b.recv_src = recv_src.get();
    b.group_sizes = group_sizes.get();
    b.x = x.get();
    b.tokens = tokens.get();
    b.topk_weights = d.weighted ? topk_weights.get() : nullptr;
    b.weights = d.weighted ? weights.get() : nullptr;
    return DispatchOf(Buffers::Sizes(d), b, DispatchMode::kCopy);
  }

  Buffer<int32_t> ids, send_row, recv_src, group_sizes;
  Buffer<uint8_t> x, tokens;
  Buffer<float> topk_weights, weights;
};

// The ranks of a group on several nodes.
class Job {
 public:
  Job(Group& group, const JobShape& shape, const NetworkModel& model, uint64_t timeout_ns)
      : group_(group),
        shape_(shape),
        timeout_ns_(timeout_ns),
        network_(shape.num_ranks, shape.num_channels, static_cast<size_t>(shape.rail().num_bytes()),
                 static_cast<size_t>(shape.rail().num_signals()), model) {
    group_.SetUpAgain();
    for (int r = 0; r < shape.num_ranks; ++r) {
      chunks_.push_back(std::make_unique<Buffer<RailChunks>>(
          static_cast<size_t>(shape.num_nodes() * shape.num_channels)));
      chunks_.back()->Fill(0);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  template <typename Hop = SimulatedHop>
  void Launch(int rank, DispatchBuffers& buffers, const Data& d, uint64_t operation) {
    const int node = rank / shape_.ranks_per_node, index = rank % shape_.ranks_per_node;
    std::vector<int> slots(shape_.ranks_per_node);
    for (int i = 0; i < shape_.ranks_per_node; ++i) slots[i] = node * shape_.ranks_per_node + i;
    const GroupView view = group_.View(index, slots, operation, timeout_ns_);
    const RailView rail{shape_.rail(), network_.memory(rank), chunks_[rank]->get(), node,
                        shape_.ranks_per_node};
    Hop hop;
    static_cast<SimulatedHop&>(hop) = network_.hop(rank);
    if constexpr (std::is_same_v<Hop, WithoutCredit>) {
      hop.first_credit = rail.at.credit(rail.memory, 0, 0);
    }
    CHECK_CUDA(LaunchRailDispatch(view, rail, hop, buffers.Arguments(d), shape_.num_channels,
                                  group_.stream(rank)));
  }

  // Whether a rank's calls have ended. Ends the program if they should have by now.
  bool IsIdle(int rank, Clock::time_point start) {
    const cudaError_t status = cudaStreamQuery(group_.stream(rank));
    if (status == cudaSuccess) return true;
    if (status != cudaErrorNotReady) CHECK_CUDA(status);
    if (SecondsSince(start) < 20) return false;
    std::printf("FAILED: rank %d does not end\n", rank);
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
        for (int b = 0; b < shape_.num_channels && p != r; ++b) {
          std::printf(" %llu/%llu", static_cast<unsigned long long>(epoch_of(progress[b])),
                      static_cast<unsigned long long>(progress[b] & 0xffffff));
        }
        std::printf("\n");
      }
      const HopMemory memory = network_.memory(r);
      for (int m = 0; m < shape_.num_nodes(); ++m) {
        for (int q = 0; q < shape_.num_channels && m != r / shape_.ranks_per_node; ++q) {
          RailChunks chunks;
          read(&chunks, chunks_[r]->get() + m * shape_.num_channels + q, sizeof chunks);
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

 private:
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
  const uint64_t timeout_ns_;
  SimulatedNetwork network_;
  std::vector<std::unique_ptr<Buffer<RailChunks>>> chunks_;  // by rank
};

// How many rows of a rank's result are wrong; says what the first ones of a run hold.
int NumWrongRows(const JobShape& shape, const Data& d, int rank, int call, const DispatchBuffers& b,
                 int& num_to_print) {
  const std::vector<uint8_t> tokens = b.tokens.Read();
  const std::vector<float> weights = b.weights.Read();
  int num_wrong = 0;
  for (int64_t row = 0; row < NumSpecified(d, rank); ++row) {
    const uint8_t* got = tokens.data() + row * d.row_bytes;
    const uint8_t* right = d.tokens[rank].data() + row * d.row_bytes;
    const bool is_wrong_row = std::memcmp(got, right, d.row_bytes) != 0;
    const bool is_wrong_weight =
        d.weighted && std::memcmp(&weights[row], &d.weights[rank][row], sizeof(float)) != 0;
    if (!is_wrong_row && !is_wrong_weight) continue;
    ++num_wrong;
    if (num_to_print-- <= 0) continue;
    const int64_t flat = d.recv_src[rank][row], ids_per_rank = d.num_tokens * d.top_k;
    const auto src = static_cast<int>(flat < 0 ? -1 : flat / ids_per_rank);
    const int64_t token = flat < 0 ? -1 : flat % ids_per_rank / d.top_k;
    int channel = 0;
    while (token >= 0 && d.num_tokens * (channel + 1) / shape.num_channels <= token) ++channel;
    size_t first = 0, num_bytes = 0;
    for (size_t i = 0; i < static_cast<size_t>(d.row_bytes); ++i) {
      if (got[i] != right[i] && num_bytes++ == 0) first = i;
    }
    const bool is_untouched =
        std::all_of(got, got + d.row_bytes, [](uint8_t v) { return v == 0xff; });
    std::string holds = is_untouched ? "nothing" : "something else";
    for (int s = 0; s < d.num_ranks && is_wrong_row; ++s) {
      for (int64_t t = 0; t < d.num_tokens; ++t) {
        if (std::memcmp(got, d.x[s].data() + t * d.row_bytes, d.row_bytes) != 0) continue;
        holds = "token " + std::to_string(t) + " of rank " + std::to_string(s);
      }
    }
    std::printf("  call %d, rank %d, row %lld: of rank %d (%s), token %lld, k %lld, channel %d: ",
                call, rank, static_cast<long long>(row), src,
                src < 0                                                     ? "none"
                : src / shape.ranks_per_node == rank / shape.ranks_per_node ? "own node"
                : src % shape.ranks_per_node == rank % shape.ranks_per_node ? "same rail"
                                                                            : "two hops",
                static_cast<long long>(token),
                static_cast<long long>(flat < 0 ? -1 : flat % d.top_k), channel);
    if (is_wrong_row) {
      std::printf("%zu of %lld bytes wrong from %zu on, holds %s; ", num_bytes,
                  static_cast<long long>(d.row_bytes), first, holds.c_str());
    }
    std::printf("weight %s (%g, right %g)\n", is_wrong_weight ? "wrong" : "right",
                d.weighted ? weights[row] : 0.0f, d.weighted ? d.weights[rank][row] : 0.0f);
  }
  return num_wrong;
}

// As MakeData, without what combine and the gradients take.
Data MakeDispatchData(const Case& c, int num_ranks, uint64_t seed) {
  std::mt19937_64 rng(seed);
  Data d{};
  d.num_ranks = num_ranks;
  d.num_tokens = c.num_tokens;
  d.top_k = c.top_k;
  d.num_local = c.experts_per_rank;
  d.num_experts = c.experts_per_rank * num_ranks;
  d.alignment = c.alignment;
  d.num_channels = c.num_channels;
  d.type = c.type;
  d.row_bytes = c.num_channels * TypeBytes(c.type);
  d.routing = c.routing;
  d.weighted = c.weighted;
  d.zero_tail = c.zero_tail;
  MakeIds(c, rng, d);
  MakeTables(c, d);
  for (int r = 0; r < num_ranks; ++r) {
    std::vector<uint8_t> x(d.num_tokens * d.row_bytes);
    for (size_t i = 0; i < x.size(); i += sizeof(uint64_t)) {
      const uint64_t bits = rng();
      std::memcpy(&x[i], &bits, sizeof bits);
    }
    std::vector<float> topk_weights(d.num_tokens * d.top_k);
    for (float& weight : topk_weights) weight = static_cast<float>(rng() >> 40) * 0x1p-24f;
    d.x.push_back(x);
    d.topk_weights.push_back(topk_weights);
  }
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  for (int r = 0; r < num_ranks; ++r) {
    std::vector<uint8_t> tokens(d.capacity * d.row_bytes, 0);
    std::vector<float> weights(d.capacity, 0.0f);
    for (int64_t row = 0; row < d.capacity; ++row) {
      const int64_t flat = d.recv_src[r][row];
      if (flat < 0) continue;
      const int64_t src = flat / ids_per_rank, token = flat % ids_per_rank / d.top_k;
      std::memcpy(tokens.data() + row * d.row_bytes, d.x[src].data() + token * d.row_bytes,
                  d.row_bytes);
      weights[row] = d.topk_weights[src][flat % ids_per_rank];
    }
    d.tokens.push_back(tokens);
    d.weights.push_back(weights);
  }
  return d;
}

Case AnyCase(std::mt19937_64& rng, int64_t slot_bytes) {
  const auto choose = [&](std::vector<int64_t> of) { return of[rng() % of.size()]; };
  Case c{};
  c.type = rng() % 3 == 0 ? FloatType::kF32 : FloatType::kBF16;
  c.top_k = choose({1, 2, 4, 8});
  do {
    c.num_channels = choose({8, 24, 264, 520, 1152, 7168});
  } while (ChunkFormat{static_cast<int32_t>(c.top_k), c.num_channels * TypeBytes(c.type)}.num_rows(
               slot_bytes) < 1);
  c.num_tokens = c.num_channels > 2000  ? choose({3, 9})
                 : c.num_channels > 200 ? choose({1, 30, 70})
                                        : choose({5, 130, 300});
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
Case CaseOfControls() {
  Case c{96, 4, 8, 1, 520, FloatType::kBF16, Routing::kUniform, 100, true, true};
  return c;
}

// Calls one behind the other on each rank's stream.
template <typename Hop>
void RunCalls(Group& group, const JobShape& shape, const NetworkModel& model, int num_calls,
              const char* what) {
  if (g_num_failed >= kEnoughFailures) return;
  constexpr bool kControl = kIsWrong<Hop>;
  const auto start = Clock::now();
  std::mt19937_64 rng(model.seed * 7919 + static_cast<uint64_t>(shape.num_ranks) * 31 +
                      static_cast<uint64_t>(shape.ranks_per_node));
  Job job(group, shape, model, kControl ? kSecond : 8 * kSecond);
  std::vector<Data> data;
  std::vector<std::vector<std::unique_ptr<DispatchBuffers>>> buffers(
      static_cast<size_t>(num_calls));
  for (int call = 0; call < num_calls; ++call) {
    if (kControl && call > 0) {
      data.push_back(data[0]);  // what comes in the wrong call may be anything, but stays in bounds
    } else {
      const Case c = kControl ? CaseOfControls() : AnyCase(rng, shape.slot_bytes);
      data.push_back(MakeDispatchData(c, shape.num_ranks, rng()));
    }
    for (int r = 0; r < shape.num_ranks; ++r) {
      buffers[call].push_back(std::make_unique<DispatchBuffers>(data[call], r));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto launched = Clock::now();
  // A rank's next call as soon as it has ended the one before. Not all of them at once: one that waits
  // in its stream may hold up the copies of others behind it, for streams share queues.
  std::vector<int> num_launched(static_cast<size_t>(shape.num_ranks), 0);
  for (int num_left = num_calls * shape.num_ranks; num_left > 0;) {
    for (int r = 0; r < shape.num_ranks; ++r) {
      int& call = num_launched[r];
      if (call == num_calls || !job.IsIdle(r, launched)) continue;
      if (rng() % static_cast<uint64_t>(shape.num_ranks) == 0) {  // late
        SpinFor<<<1, 1, 0, job.stream(r)>>>(rng() % 4 * 1000 * 1000);
      }
      job.Launch<Hop>(r, *buffers[call][r], data[call],
                      model.seed * 1000 + static_cast<uint64_t>(call));
      ++call;
      --num_left;
    }
  }
  job.Synchronize();
  const double seconds = SecondsSince(launched);
  int num_wrong = 0, num_to_print = kControl ? 0 : 12;
  for (int call = 0; call < num_calls; ++call) {
    const int before = num_wrong;
    for (int r = 0; r < shape.num_ranks; ++r) {
      num_wrong += NumWrongRows(shape, data[call], r, call, *buffers[call][r], num_to_print);
    }
    if (num_wrong == before || kControl) continue;
    const Data& d = data[call];
    std::printf(
        "  call %d: %d rows wrong; T %lld, K %lld, L %lld, A %lld, C %lld, row %lld bytes, "
        "routing %d, %s, %s\n",
        call, num_wrong - before, static_cast<long long>(d.num_tokens),
        static_cast<long long>(d.top_k), static_cast<long long>(d.num_local),
        static_cast<long long>(d.alignment), static_cast<long long>(d.capacity),
        static_cast<long long>(d.row_bytes), static_cast<int>(d.routing),
        d.weighted ? "weighted" : "plain", d.zero_tail ? "zero tail" : "any tail");
  }
  const int num_errors = job.NumErrors();
  const bool is_right = num_wrong + num_errors == 0, is_failure = is_right == kControl;
  g_num_failed += is_failure;
  std::printf(
      "%s: %s, seed %llu, %s, %s, %d calls: %d rows wrong, %d errors, %llu out of order, "
      "%.2f s (%.2f with data)%s\n",
      is_failure ? "FAILED" : "ok", model.name, static_cast<unsigned long long>(model.seed), what,
      shape.name().c_str(), num_calls, num_wrong, num_errors,
      static_cast<unsigned long long>(job.num_out_of_order()), seconds, SecondsSince(start),
      kControl ? " (wrong on purpose)" : "");
  if (is_failure && !kControl) job.Print();
  std::fflush(stdout);
}

// A rank that never comes: all others end within the timeout, and their results say so.
void RunWithoutOne(Group& group, const JobShape& shape, const NetworkModel& model) {
  if (g_num_failed >= kEnoughFailures) return;
  constexpr uint64_t kTimeoutNs = kSecond / 2;
  constexpr double kMostSeconds = 2.5;  // the timeout, and leave.cuh's for who stands still
  const int missing = shape.num_ranks - 1;
  Job job(group, shape, model, kTimeoutNs);
  const Data d = MakeDispatchData(CaseOfControls(), shape.num_ranks, model.seed);
  std::vector<std::unique_ptr<DispatchBuffers>> buffers;
  for (int r = 0; r < shape.num_ranks; ++r) {
    buffers.push_back(std::make_unique<DispatchBuffers>(d, r));
    buffers[r]->tokens.Fill(0);
    buffers[r]->weights.Fill(0);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto start = Clock::now();
  for (int r = 0; r < missing; ++r) job.Launch(r, *buffers[r], d, model.seed);
  job.Synchronize();
  const double seconds = SecondsSince(start);
  int num_wrong = 0;
  for (int r = 0; r < missing; ++r) {
    const std::vector<float> weights = buffers[r]->weights.Read();
    const std::vector<uint8_t> tokens = buffers[r]->tokens.Read();
    bool is_right = job.error(r).valid != 0;
    is_right = is_right &&
               std::all_of(weights.begin(), weights.end(), [](float v) { return std::isnan(v); });
    for (size_t i = 0; i < tokens.size() && is_right; i += TypeBytes(d.type)) {
      is_right = std::isnan(ReadNumber(d.type, tokens.data() + i));
    }
    // The peer on its rail finds it missing by itself.
    if (r % shape.ranks_per_node == missing % shape.ranks_per_node &&
        job.error(r).phase != kToldByPeer) {
      is_right = is_right && job.error(r).peer_slot == slot_of_rail_rank(missing) &&
                 job.error(r).phase == kStart;
    }
    num_wrong += !is_right;
  }
  const bool is_failure = num_wrong > 0 || seconds > kMostSeconds;
  g_num_failed += is_failure;
  std::printf("%s: %s, a rank that does not come, %s: %d of %d ranks not as expected, %.2f s\n",
              is_failure ? "FAILED" : "ok", model.name, shape.name().c_str(), num_wrong, missing,
              seconds);
  if (is_failure) job.Print();
  std::fflush(stdout);
}

// Calls of which one is another on one rank: both ends of its rail say so, or are told.
void RunOtherCall(Group& group, const JobShape& shape, const NetworkModel& model) {
  if (g_num_failed >= kEnoughFailures) return;
  Job job(group, shape, model, kSecond / 2);
  const Data d = MakeDispatchData(CaseOfControls(), shape.num_ranks, model.seed);
  std::vector<std::unique_ptr<DispatchBuffers>> buffers;
  for (int r = 0; r < shape.num_ranks; ++r) {
    buffers.push_back(std::make_unique<DispatchBuffers>(d, r));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const int first_of_last = shape.num_ranks - shape.ranks_per_node;
  for (int r = 0; r < shape.num_ranks; ++r) {
    job.Launch(r, *buffers[r], d, r < first_of_last ? 1 : 2);
  }
  job.Synchronize();
  int num_wrong = 0;
  for (int r = 0; r < shape.num_ranks; ++r) num_wrong += job.error(r).valid == 0;
  bool is_named = false;
  for (int r = 0; r < shape.num_ranks; ++r) is_named |= job.error(r).phase == kOtherCall;
  const bool is_failure = num_wrong > 0 || !is_named;
  g_num_failed += is_failure;
  std::printf("%s: %s, another call on one node, %s: %d ranks without an error\n",
              is_failure ? "FAILED" : "ok", model.name, shape.name().c_str(), num_wrong);
  if (is_failure) job.Print();
  std::fflush(stdout);
}

int Main(bool is_small) {
  using Order = NetworkModel::Order;
  using Departure = NetworkModel::Departure;
  CHECK_CUDA(PrepareRailDispatch<SimulatedHop>());
  CHECK_CUDA(PrepareRailDispatch<HeadFirst>());
  CHECK_CUDA(PrepareRailDispatch<WithoutCredit>());
  Group group;
  const int num_seeds = is_small ? 1 : 3, num_calls = is_small ? 4 : 8;
  for (uint64_t seed = 1; seed <= static_cast<uint64_t>(num_seeds); ++seed) {
    const NetworkModel models[] = {
        {"rc, at once", Order::kPair, Departure::kAtOnce, 0, 0, seed},
        {"rc, random", Order::kPair, Departure::kRandom, 1000, 2048, seed},
        {"srd, random", Order::kNone, Departure::kRandom, 1000, 2048, seed},
        {"srd, youngest first", Order::kNone, Departure::kYoungestFirst, 1000, 2048, seed}};
    for (const NetworkModel& model : models) {
      const JobShape shapes[] = {{2, 1, 1, 1, 16384}, {2, 1, 3, 2, 4096}, {4, 2, 1, 1, 4096},
                                 {4, 2, 3, 3, 32768}, {4, 1, 2, 2, 4096}, {8, 2, 2, 2, 16384},
                                 {8, 4, 4, 3, 32768}, {8, 1, 2, 2, 16384}};
      for (const JobShape& shape : shapes) {
        RunCalls<SimulatedHop>(group, shape, model, num_calls, "dispatch");
      }
      if (model.departure == Departure::kAtOnce || (is_small && model.order == Order::kPair))
        continue;
      for (const JobShape& shape : {JobShape{2, 1, 2, 2, 4096}, JobShape{4, 2, 2, 2, 4096}}) {
        RunCalls<HeadFirst>(group, shape, model, 4, "signal with the head");
        RunCalls<WithoutCredit>(group, shape, model, 4, "without credit");
      }
    }
    if (seed > 1) continue;
    for (const JobShape& shape :
         {JobShape{2, 1, 2, 2, 4096}, JobShape{4, 2, 2, 2, 4096}, JobShape{8, 4, 2, 2, 4096}}) {
      RunWithoutOne(group, shape, models[1]);
      RunOtherCall(group, shape, models[1]);
    }
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
