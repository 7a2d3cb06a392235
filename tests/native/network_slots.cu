// network_slots: layout_and_dispatch and combine in slots across nodes, over the simulated network:
// ranks as streams of one process on one GPU, those of a node by their slots. Random cases in every
// form of rows, call after call in the same memory, with late ranks; a rank that does not come; hops and
// memory that are wrong, which has to be seen.
//   network_slots [--small]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/network/simulated_hop.cuh"
#include "cuda/network/slots.cuh"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_forms.h"
#include "tests/native/kernels_ranks.h"
#include "tests/native/simulated_network.h"

namespace jax_ep::gpu::test {
namespace {

constexpr int64_t kFarBytes = 24 << 20;  // of a rank, for its far ranks
constexpr int kEnoughFailures = 4;       // the rest would take its timeouts
int g_num_failed = 0;

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What is wrong, on purpose; the first two with units alone, so that it is not the ids that show it.
enum class Fault {
  kNone,
  kSignalApart,  // a unit's signal goes by another queue pair
  kWithoutWait,  // a unit is not waited for
  kOneParity,    // staging and landing of a call are those of the one before
};
constexpr const char* kFaultNames[] = {"as it is", "signals apart", "without waits",
                                       "without parity"};

struct FaultyHop : SimulatedHop {
  Fault fault;
  FarSlots at;

  __device__ bool is_of_unit(const uint64_t* signal) const {
    return (signal - own.signals) % (1 + at.max_units) != 0;
  }
  template <typename MayGoOn>
  __device__ bool put_signal(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& may_go_on) const {
    if (fault != Fault::kSignalApart || !is_of_unit(signal)) {
      return SimulatedHop::put_signal(queue, rank, dst, src, num_bytes, signal, value, may_go_on);
    }
    return put(queue, rank, dst, src, num_bytes, may_go_on) &&
           SimulatedHop::put_signal(queue + 1, rank, dst, src, 0, signal, value, may_go_on);
  }
  template <typename MayGoOn>
  __device__ bool wait_signal(const uint64_t* signal, uint64_t at_least, MayGoOn& may_go_on) const {
    return (fault == Fault::kWithoutWait && is_of_unit(signal)) ||
           SimulatedHop::wait_signal(signal, at_least, may_go_on);
  }
};

struct Shape {
  int num_ranks, ranks_per_node;

  std::string name() const {
    return std::to_string(num_ranks) + " ranks, " + std::to_string(ranks_per_node) + " a node";
  }
  // Of each rank, so that all and the network's copies find room.
  int num_sms() const { return num_ranks > 4 ? 6 : 10; }
};

// The ranks of a group on several nodes.
class Job {
 public:
  Job(Group& group, const Shape& shape, const NetworkModel& model, uint64_t timeout_ns, Fault fault)
      : group_(group),
        shape_(shape),
        timeout_ns_(timeout_ns),
        fault_(fault),
        at_(MakeFarSlots(kFarBytes, shape.num_ranks, shape.ranks_per_node)),
        network_(shape.num_ranks, 4, static_cast<size_t>(at_.num_bytes()),
                 static_cast<size_t>(at_.num_signals() + shape.num_ranks), model) {
    if (fault == Fault::kOneParity) at_.parity_bytes = 0;
    group_.SetUpAgain();
    for (int r = 0; r < shape.num_ranks; ++r) {
      words_.push_back(std::make_unique<Buffer<uint64_t>>(2));
      words_.back()->Fill(0);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }

  GroupView View(int rank, uint64_t operation) const {
    const int node = rank / shape_.ranks_per_node;
    std::vector<int> slots;
    for (int i = 0; i < shape_.ranks_per_node; ++i) {
      slots.push_back(node * shape_.ranks_per_node + i);
    }
    GroupView view = group_.View(rank % shape_.ranks_per_node, slots, operation, timeout_ns_);
    view.nodes = {network_.memory(rank).signals + at_.num_signals(), words_[rank]->get(), rank,
                  shape_.num_ranks};
    return view;
  }
  FarView Far(int rank) const { return {at_, network_.memory(rank), words_[rank]->get() + 1}; }
  FaultyHop Hop(int rank) const { return {network_.hop(rank), fault_, at_}; }
  bool Fits(const Data& d, const SlotRow& row) const {
    const SlotSizes sizes{d.num_ranks, d.num_tokens, d.top_k, d.num_experts, row};
    return fits_slots(sizes, kSlotAreaBytes) && fits_far_slots(at_, sizes);
  }

  // Whether a rank's calls have ended. Ends the program if they should have by now.
  bool IsIdle(int rank, Clock::time_point start) const {
    const cudaError_t status = cudaStreamQuery(group_.stream(rank));
    if (status == cudaSuccess) return true;
    if (status != cudaErrorNotReady) CHECK_CUDA(status);
    if (SecondsSince(start) < 20) return false;
    std::printf("FAILED: rank %d does not end, %s\n", rank, shape_.name().c_str());
    for (int r = 0; r < shape_.num_ranks; ++r) {
      const ErrorRecord& e = error(r);
      std::printf("  rank %d: error %d, kind %u, for slot %d, phase %u\n", r, e.valid != 0, e.kind,
                  e.peer_slot, e.phase);
    }
    std::_Exit(1);
  }
  int NumErrors() const {
    int num_errors = 0;
    for (int r = 0; r < shape_.num_ranks; ++r) num_errors += error(r).valid != 0;
    return num_errors;
  }
  const Shape& shape() const { return shape_; }
  cudaStream_t stream(int rank) const { return group_.stream(rank); }
  const ErrorRecord& error(int rank) const { return group_.error(rank); }
  uint64_t num_out_of_order() const { return network_.num_out_of_order(); }

 private:
  Group& group_;
  const Shape shape_;
  const uint64_t timeout_ns_;
  const Fault fault_;
  FarSlots at_;
  SimulatedNetwork network_;
  std::vector<std::unique_ptr<Buffer<uint64_t>>> words_;  // by rank: has_told, epoch
};

// A call of each kind, on every rank. Combine has the tables by the book.
struct Calls {
  Data data;
  FormData form_data;
  std::vector<std::unique_ptr<Buffers>> dispatched, summed;
  std::vector<std::unique_ptr<FormBuffers>> rows;
};

Case AnyCase(std::mt19937_64& rng, const Shape& shape) {
  const auto choose = [&](std::vector<int64_t> of) { return of[rng() % of.size()]; };
  const FloatType types[] = {FloatType::kBF16, FloatType::kBF16, FloatType::kF32, FloatType::kF16};
  Case c{};
  c.type = types[rng() % 4];
  c.num_channels = choose({16, 64, 528, 1152, 7168});
  c.num_tokens = c.num_channels > 2000 ? choose({1, 4}) : choose({1, 5, 24, 60});
  c.top_k = choose({1, 2, 4, 8});
  c.experts_per_rank = choose({1, 2, 8});
  c.alignment = choose({1, 1, 8});
  c.routing = static_cast<Routing>(rng() % 5);
  c.capacity_percent = static_cast<int>(choose({40, 100, 130}));
  c.has_own_room = rng() % 4 == 0;
  c.weighted = rng() % 4 != 0;
  c.zero_tail = rng() % 2 == 0;
  // Plain loops over every number take a while.
  if (shape.num_ranks > 4 && c.num_channels > 600)
    c.num_tokens = std::min<int64_t>(c.num_tokens, 5);
  return c;
}
// Every rank has rows for every other, of several fragments each.
Case CaseOfControls() {
  return {48, 4, 8, 1, 2048, FloatType::kBF16, Routing::kUniform, 100, true, true};
}

// Of rows whose last units, as they are quantised, have no vectors.
Case CaseOfEmptyUnits() {
  return {1, 4, 2, 1, 6160, FloatType::kF32, Routing::kUniform, 100, true, true};
}

Form AnyForm(std::mt19937_64& rng, const Data& d) {
  const bool expand = rng() % 3 != 0;
  switch (rng() % 5) {
    case 0:
      return Quantizing(d, DispatchMode::kQuantize, expand, rng() % 2 == 0);
    case 1:
      return Quantizing(d, DispatchMode::kDequantize, expand, rng() % 2 == 0);
    case 2:
      return {DispatchMode::kScaled, expand, 4};
    default:
      return {DispatchMode::kCopy, expand};
  }
}

std::unique_ptr<Calls> MakeCalls(const Data& data, const Form& form, uint64_t seed) {
  auto calls = std::make_unique<Calls>();
  calls->data = data;
  calls->form_data = FormOracle(data, seed).Make(form);
  for (int r = 0; r < data.num_ranks; ++r) {
    calls->dispatched.push_back(std::make_unique<Buffers>(data, r));
    calls->summed.push_back(std::make_unique<Buffers>(data, r));
    calls->summed.back()->WriteTables(data, r);
    calls->rows.push_back(std::make_unique<FormBuffers>(data, calls->form_data, r));
  }
  return calls;
}

// The first or the second one of a rank.
void Launch(Job& job, Calls& calls, int rank, bool is_second, uint64_t operation) {
  const Data& d = calls.data;
  const GroupView view = job.View(rank, operation);
  const int num_sms = job.shape().num_sms();
  if (is_second) {
    CHECK_CUDA(LaunchNetworkCombineInSlots(view, job.Far(rank), job.Hop(rank),
                                           calls.summed[rank]->Combine(d), num_sms,
                                           job.stream(rank)));
    return;
  }
  LayoutAndDispatchArguments a = calls.dispatched[rank]->LayoutAndDispatch(d);
  calls.rows[rank]->Set(d, a);
  CHECK_CUDA(LaunchNetworkLayoutAndDispatchInSlots(view, job.Far(rank), job.Hop(rank), a, num_sms,
                                                   job.stream(rank)));
}

void CompareCalls(const Calls& calls) {
  const Data& d = calls.data;
  for (int r = 0; r < d.num_ranks; ++r) {
    const Buffers& b = *calls.dispatched[r];
    Compare("send_row", r, b.send_row.Read(), d.send_row[r]);
    Compare("recv_src", r, b.recv_src.Read(), d.recv_src[r]);
    Compare("recv_order", r, b.recv_order.Read(), d.recv_order[r]);
    Compare("recv_offsets", r, b.recv_offsets.Read(), d.recv_offsets[r]);
    Compare("group_sizes", r, b.group_sizes.Read(), d.group_sizes[r]);
    Compare("expert_counts", r, b.expert_counts.Read(), d.expert_counts[r]);
    Compare("expert_load", r, b.expert_load.Read(), d.expert_load);
    Compare("counters", r, b.counters.Read(), d.counters[r]);
    CompareForm(d, r, calls.form_data, *calls.rows[r], "across nodes");
    const Buffers& sums = *calls.summed[r];
    CompareNumbers("out", r, d.type, sums.out.Read(), d.out[r]);
    if (d.weighted) Compare("collected", r, sums.collected.Read(), d.collected[r]);
  }
}

__global__ void SpinFor(uint64_t ns) {
  const uint64_t start = globaltimer_ns();
  while (globaltimer_ns() - start < ns) {
  }
}

void Run(Group& group, const Shape& shape, const NetworkModel& model, int num_calls,
         Fault fault = Fault::kNone) {
  if (g_num_failed >= kEnoughFailures) return;
  const bool is_control = fault != Fault::kNone;
  std::mt19937_64 rng(model.seed * 7919 + static_cast<uint64_t>(shape.num_ranks * 31) +
                      static_cast<uint64_t>(shape.ranks_per_node));
  Job job(group, shape, model, is_control ? kSecond : 8 * kSecond, fault);
  std::vector<std::unique_ptr<Calls>> calls;
  for (int i = 0; i < num_calls; ++i) {
    for (;;) {
      const Case c = is_control ? CaseOfControls()
                     : i == 0   ? CaseOfEmptyUnits()
                                : AnyCase(rng, shape);
      const Data d = MakeData(c, shape.num_ranks, rng(), shape.ranks_per_node);
      Form form = is_control ? Form{} : AnyForm(rng, d);
      if (!is_control && i == 0) form = Quantizing(d, DispatchMode::kQuantize, true, false);
      const SlotRow row = slot_row(form.mode, d.type, form.x_row_bytes(d), form.num_scales);
      if (!job.Fits(d, row) || !job.Fits(d, {d.row_bytes})) continue;
      calls.push_back(MakeCalls(d, form, rng()));
      break;
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  // Each rank's next call as soon as it has ended the one before, some of them late. Not more of them:
  // one that waits in its stream may hold up the network's copies behind it, for streams share queues.
  const auto start = Clock::now();
  std::vector<int> num_launched(static_cast<size_t>(shape.num_ranks), 0);
  for (int num_left = 2 * num_calls * shape.num_ranks; num_left > 0;) {
    for (int r = 0; r < shape.num_ranks; ++r) {
      int& next = num_launched[r];
      if (next == 2 * num_calls || !job.IsIdle(r, start)) continue;
      if (rng() % static_cast<uint64_t>(4 * shape.num_ranks) == 0) {
        SpinFor<<<1, 1, 0, job.stream(r)>>>(rng() % 4 * 1000 * 1000);
      }
      Launch(job, *calls[next / 2], r, next % 2 == 1,
             model.seed * 1000 + static_cast<uint64_t>(next));
      ++next;
      --num_left;
    }
  }
  for (int r = 0; r < shape.num_ranks; ++r) {
    while (!job.IsIdle(r, start)) {
    }
  }
  const double seconds = SecondsSince(start);
  const Tally before = g_tally;
  if (is_control) g_tally.num_wrong = 1000;  // what is wrong is not printed
  const int num_before = g_tally.num_wrong;
  for (int i = 0; i < num_calls; ++i) {
    const int num_wrong = g_tally.num_wrong;
    CompareCalls(*calls[i]);
    const Data& d = calls[i]->data;
    if (g_tally.num_wrong == num_wrong || is_control) continue;
    std::printf("  call %d: T %lld, K %lld, L %lld, C %lld, H %lld %s, routing %d%s\n", i,
                static_cast<long long>(d.num_tokens), static_cast<long long>(d.top_k),
                static_cast<long long>(d.num_local), static_cast<long long>(d.capacity),
                static_cast<long long>(d.num_channels), TypeName(d.type),
                static_cast<int>(d.routing), calls[i]->form_data.form.name().c_str());
  }
  for (int r = 0; r < shape.num_ranks && !is_control; ++r) {  // of the last call that had any
    uint64_t invalid_ids = 0;
    for (const auto& call : calls) {
      const Data& d = call->data;
      if (d.counters[r][2] == 0) continue;
      invalid_ids = invalid_ids_of(r, static_cast<int32_t>(d.num_experts), d.counters[r][2]);
    }
    Compare("invalid_ids", r, std::vector<uint64_t>{job.error(r).invalid_ids}, {invalid_ids});
  }
  const int num_wrong = g_tally.num_wrong - num_before, num_errors = job.NumErrors();
  g_tally = before;
  const bool is_failure = (num_wrong + num_errors == 0) == is_control;
  g_num_failed += is_failure;
  std::printf(
      "%s: %s, seed %llu, %s, %s, %d calls: %d results wrong, %d errors, %llu out of order, "
      "%.2f s%s\n",
      is_failure ? "FAILED" : "ok", model.name, static_cast<unsigned long long>(model.seed),
      kFaultNames[static_cast<int>(fault)], shape.name().c_str(), 2 * num_calls, num_wrong,
      num_errors, static_cast<unsigned long long>(job.num_out_of_order()), seconds,
      is_control ? " (wrong on purpose)" : "");
  std::fflush(stdout);
}

// A rank that never comes: all others end within the timeout, and their results say so.
void RunWithoutOne(Group& group, const Shape& shape, const NetworkModel& model, bool is_second) {
  if (g_num_failed >= kEnoughFailures) return;
  constexpr double kMostSeconds = 2.5;
  const int missing = shape.num_ranks - 1;
  Job job(group, shape, model, kSecond / 2, Fault::kNone);
  const Data d = MakeData(CaseOfControls(), shape.num_ranks, model.seed, shape.ranks_per_node);
  const std::unique_ptr<Calls> calls = MakeCalls(d, {}, model.seed);
  for (int r = 0; r < shape.num_ranks; ++r) {
    calls->summed[r]->ClearResults();
    Overwrite(*calls->rows[r]);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto start = Clock::now();
  for (int r = 0; r < missing; ++r) Launch(job, *calls, r, is_second, model.seed);
  for (int r = 0; r < missing; ++r) {
    while (!job.IsIdle(r, start)) {
    }
  }
  const double seconds = SecondsSince(start);
  const auto all_bits_set = [](const std::vector<uint8_t>& bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](uint8_t byte) { return byte == 0xff; });
  };
  int num_wrong = 0;
  for (int r = 0; r < missing; ++r) {
    const std::vector<uint8_t> rows =
        is_second ? calls->summed[r]->out.Read() : calls->rows[r]->tokens.Read();
    // Who is far from it knows it by its process, its neighbours by their slot of it.
    const ErrorRecord& e = job.error(r);
    const bool is_far = r / shape.ranks_per_node != missing / shape.ranks_per_node;
    const int slot = is_far ? slot_of_process(missing) : missing;
    const bool is_told = e.phase == kToldByPeer;  // by one that was sooner
    num_wrong += e.valid == 0 || (!is_told && (e.phase != kStart || e.peer_slot != slot)) ||
                 !all_bits_set(rows);
  }
  const bool is_failure = num_wrong > 0 || seconds > kMostSeconds;
  g_num_failed += is_failure;
  std::printf(
      "%s: %s, a rank that does not come to %s, %s: %d of %d ranks not as expected, %.2f s\n",
      is_failure ? "FAILED" : "ok", model.name, is_second ? "combine" : "layout_and_dispatch",
      shape.name().c_str(), num_wrong, missing, seconds);
  std::fflush(stdout);
}

// Ranks that are in different calls find that out at once.
void RunDifferentCalls(Group& group, const Shape& shape, const NetworkModel& model) {
  if (g_num_failed >= kEnoughFailures) return;
  constexpr double kMostSeconds = 3.0;  // much less than the timeout
  Job job(group, shape, model, 10 * kSecond, Fault::kNone);
  const Data d = MakeData(CaseOfControls(), shape.num_ranks, model.seed, shape.ranks_per_node);
  const std::unique_ptr<Calls> calls = MakeCalls(d, {}, model.seed);
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto start = Clock::now();
  for (int r = 0; r < shape.num_ranks; ++r) {
    const bool is_second = r >= shape.num_ranks / 2;
    Launch(job, *calls, r, is_second, model.seed + is_second);
  }
  int num_wrong = 0;
  for (int r = 0; r < shape.num_ranks; ++r) {
    while (!job.IsIdle(r, start)) {
    }
    const uint32_t phase = job.error(r).phase;
    num_wrong += job.error(r).valid == 0 || (phase != kOtherCall && phase != kToldByPeer);
  }
  const double seconds = SecondsSince(start);
  const bool is_failure = num_wrong > 0 || seconds > kMostSeconds;
  g_num_failed += is_failure;
  std::printf("%s: %s, ranks in different calls, %s: %d of %d not as expected, %.2f s\n",
              is_failure ? "FAILED" : "ok", model.name, shape.name().c_str(), num_wrong,
              shape.num_ranks, seconds);
  std::fflush(stdout);
}

int Main(bool is_small) {
  CHECK_CUDA(PrepareNetworkSlots<FaultyHop>());
  Group group;
  const int num_seeds = is_small ? 1 : 3, num_calls = is_small ? 4 : 10;
  for (uint64_t seed = 1; seed <= static_cast<uint64_t>(num_seeds); ++seed) {
    const std::vector<NetworkModel> models = NetworkModels(seed);
    for (const NetworkModel& model : models) {
      for (const Shape& shape : {Shape{2, 1}, Shape{4, 2}, Shape{4, 1}, Shape{6, 3}, Shape{8, 4},
                                 Shape{8, 2}, Shape{8, 1}}) {
        Run(group, shape, model, num_calls);
      }
      if (model.departure == NetworkModel::Departure::kAtOnce) continue;
      for (const Fault fault : {Fault::kSignalApart, Fault::kWithoutWait, Fault::kOneParity}) {
        Run(group, {4, 2}, model, 3, fault);
      }
    }
    if (seed > 1) continue;
    for (const Shape& shape : {Shape{2, 1}, Shape{8, 4}}) {
      for (const bool is_second : {false, true}) RunWithoutOne(group, shape, models[1], is_second);
      RunDifferentCalls(group, shape, models[1]);
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
