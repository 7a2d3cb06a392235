// The kernels through cuda/launch.h, without XLA or Python, against a plain oracle on the host.
//
//   kernels_test [--ranks=1,2,4,8] [--small] [--control]
//
// The ranks of a group are streams of this process on one GPU. Each has its own control block and
// buffers; all lie in one address space, so PeerView.shift is 0. Kernels of different ranks wait
// for each other, so the grids of all ranks together must fit the GPU: each gets its share of the
// SMs, and a first test finds out whether kernels of different streams run together at all (under a
// tool that serialises them only one rank can be tested).
//
// Exit codes: 0 all right; 3 a result was wrong, as it must be with --control, which spoils one
// number of each result before it is compared; 1 anything else.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_oracle.h"

namespace {

using namespace jax_ep::gpu::test;

using jax_ep::gpu::CombineArguments;
using jax_ep::gpu::ControlBlock;
using jax_ep::gpu::DispatchArguments;
using jax_ep::gpu::DispatchMode;
using jax_ep::gpu::ErrorRecord;
using jax_ep::gpu::GroupView;
using jax_ep::gpu::LayoutArguments;
using jax_ep::gpu::RowType;

constexpr int kMaxRanks = 8;
constexpr uint64_t kSecond = 1000000000;

bool g_control = false;
int g_num_wrong = 0;
int g_num_compared = 0;

#define REQUIRE(condition, ...)                                           \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                           \
      std::printf("\n");                                                  \
      ++g_num_wrong;                                                      \
    }                                                                     \
  } while (0)

// Device memory of one allocation, so that a tool sees every access beyond its end.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    CHECK_CUDA(cudaMalloc(&data_, std::max<size_t>(1, size) * sizeof(T)));
    Fill(0xff);
  }
  explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) {
    CHECK_CUDA(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void Fill(int byte) { CHECK_CUDA(cudaMemset(data_, byte, size_ * sizeof(T))); }
  void Fill(int byte, cudaStream_t stream) {
    CHECK_CUDA(cudaMemsetAsync(data_, byte, size_ * sizeof(T), stream));
  }
  T* get() { return data_; }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    CHECK_CUDA(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// The group ------------------------------------------------------------------------------------

// All ranks of one GPU: streams, control blocks, error records.
class Group {
 public:
  Group() {
    for (int r = 0; r < kMaxRanks; ++r) {
      CHECK_CUDA(cudaStreamCreateWithFlags(&stream_[r], cudaStreamNonBlocking));
      CHECK_CUDA(cudaMalloc(&control_[r], sizeof(ControlBlock)));
      CHECK_CUDA(cudaMemset(control_[r], 0, sizeof(ControlBlock)));
      CHECK_CUDA(cudaHostAlloc(&error_[r], sizeof(ErrorRecord), cudaHostAllocMapped));
      std::memset(error_[r], 0, sizeof(ErrorRecord));
    }
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  ~Group() {
    for (int r = 0; r < kMaxRanks; ++r) {
      cudaStreamDestroy(stream_[r]);
      cudaFree(control_[r]);
      cudaFreeHost(error_[r]);
    }
  }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  // Ranks are numbered as they lie here; the slot of each is its rank.
  GroupView View(int rank, int num_ranks, uint64_t operation, uint64_t timeout_ns) const {
    GroupView view{};
    view.control = control_[rank];
    CHECK_CUDA(cudaHostGetDevicePointer(&view.error, error_[rank], 0));
    view.operation = operation;
    error_[rank]->arrival_timeout_ns = error_[rank]->progress_timeout_ns = timeout_ns;
    view.rank = rank;
    view.num_ranks = num_ranks;
    for (int q = 0; q < num_ranks; ++q) {
      view.peer[q].control = control_[q];
      view.peer[q].shift = 0;
      view.peer[q].slot_here = q;
      view.peer[q].slot_there = rank;
    }
    return view;
  }
  cudaStream_t stream(int rank) const { return stream_[rank]; }
  const ErrorRecord& error(int rank) const { return *error_[rank]; }

 private:
  cudaStream_t stream_[kMaxRanks];
  ControlBlock* control_[kMaxRanks];
  ErrorRecord* error_[kMaxRanks];
};

// One rank's buffers for one case, all poisoned but the operands.
struct Buffers {
  explicit Buffers(const Data& d, int r)
      : ids(d.ids[r]),
        same_ids(d.ids[r]),
        send_row(d.num_tokens * d.top_k),
        recv_src(d.capacity),
        recv_order(d.capacity),
        recv_offsets(d.num_ranks * d.num_tokens + 1),
        group_sizes(d.num_local),
        expert_counts(d.num_local),
        expert_load(d.num_experts),
        counters(3),
        x(d.x[r]),
        g(d.g[r]),
        tokens(d.capacity * d.row_bytes),
        d_y(d.capacity * d.row_bytes),
        landing(d.num_ranks * d.num_tokens * d.row_bytes),
        y(d.y[r]),
        partial(d.num_ranks * d.num_tokens * d.row_bytes),
        out(d.num_tokens * d.row_bytes),
        topk_weights(d.topk_weights[r]),
        weights(d.capacity),
        row_weights(d.row_weights[r]),
        values(d.values[r]),
        collected(d.num_tokens * d.top_k),
        d_weights(d.capacity) {}

  // To zeros, so that a kernel's own NaN is seen.
  void ClearResults() {
    for (Buffer<uint8_t>* rows : {&tokens, &d_y, &out}) rows->Fill(0);
    for (Buffer<float>* values : {&weights, &collected, &d_weights}) values->Fill(0);
  }

  LayoutArguments Layout(const Data& d) {
    LayoutArguments a{};
    a.topk_idx = ids.get();
    a.num_tokens = d.num_tokens;
    a.top_k = d.top_k;
    a.num_experts = d.num_experts;
    a.capacity = d.capacity;
    a.expert_alignment = d.alignment;
    a.send_row = send_row.get();
    a.recv_src = recv_src.get();
    a.recv_order = recv_order.get();
    a.recv_offsets = recv_offsets.get();
    a.group_sizes = group_sizes.get();
    a.expert_counts = expert_counts.get();
    a.expert_load = expert_load.get();
    a.counters = counters.get();
    return a;
  }
  // With a landing area, as where peers cannot reach `tokens`; otherwise without.
  DispatchArguments Dispatch(const Data& d, bool lands = false) {
    DispatchArguments a{};
    a.x = x.get();
    a.topk_weights = d.weighted ? topk_weights.get() : nullptr;
    a.topk_idx = ids.get();
    a.send_row = send_row.get();
    a.landing = lands ? landing.get() : nullptr;
    a.mode = DispatchMode::kCopy;
    a.recv_src = recv_src.get();
    a.recv_order = recv_order.get();
    a.recv_offsets = recv_offsets.get();
    a.group_sizes = group_sizes.get();
    a.tokens = tokens.get();
    a.weights = d.weighted ? weights.get() : nullptr;
    a.num_tokens = d.num_tokens;
    a.top_k = d.top_k;
    a.capacity = d.capacity;
    a.num_local_experts = d.num_local;
    a.num_channels = d.num_channels;
    a.row_bytes = d.row_bytes;
    a.zero_tail = d.zero_tail;
    return a;
  }
  // The gradient of combine: dispatch's weighted form.
  DispatchArguments Gradient(const Data& d, bool lands = false) {
    DispatchArguments a = Dispatch(d, lands);
    a.mode = DispatchMode::kWeighted;
    a.type = d.type;
    a.x = g.get();
    a.tokens = d_y.get();
    a.topk_weights = nullptr;
    a.weights = nullptr;
    a.y = y.get();
    a.row_weights = row_weights.get();
    a.dots = d_weights.get();
    return a;
  }
  CombineArguments Combine(const Data& d) {
    CombineArguments a{};
    a.y = y.get();
    a.weights = d.weighted ? row_weights.get() : nullptr;
    a.values = d.weighted ? values.get() : nullptr;
    a.topk_idx = ids.get();
    a.send_row = send_row.get();
    a.recv_src = recv_src.get();
    a.recv_order = recv_order.get();
    a.recv_offsets = recv_offsets.get();
    a.partial = partial.get();
    a.out = out.get();
    a.collected = d.weighted ? collected.get() : nullptr;
    a.num_tokens = d.num_tokens;
    a.top_k = d.top_k;
    a.num_local_experts = d.num_local;
    a.num_channels = d.num_channels;
    a.type = d.type;
    return a;
  }

  // Writes the ids again, after something else.
  void Rewrite(const Data& d, int r, cudaStream_t stream) {
    ids.Fill(0xee, stream);
    CHECK_CUDA(cudaMemcpyAsync(ids.get(), same_ids.get(), d.ids[r].size() * sizeof(int32_t),
                               cudaMemcpyDeviceToDevice, stream));
  }

  // Everything that a round writes, in the order of the stream.
  void Poison(cudaStream_t stream) {
    for (Buffer<int32_t>* table : {&send_row, &recv_src, &recv_order, &recv_offsets, &group_sizes,
                                   &expert_counts, &expert_load, &counters}) {
      table->Fill(0xee, stream);
    }
    tokens.Fill(0xff, stream);
    landing.Fill(0xff, stream);
    partial.Fill(0xff, stream);
    out.Fill(0xff, stream);
    weights.Fill(0xff, stream);
    collected.Fill(0xff, stream);
    d_y.Fill(0xff, stream);
    d_weights.Fill(0xff, stream);
  }

  Buffer<int32_t> ids, same_ids, send_row, recv_src, recv_order, recv_offsets, group_sizes,
      expert_counts, expert_load, counters;
  Buffer<uint8_t> x, g, tokens, d_y, landing, y, partial, out;
  Buffer<float> topk_weights, weights, row_weights, values, collected, d_weights;
};

// Comparing --------------------------------------------------------------------------------------

void Report(const char* name, int rank, size_t at, size_t num_wrong, size_t size) {
  ++g_num_wrong;
  if (g_num_wrong <= 20) {
    std::printf("WRONG: %s of rank %d: %zu of %zu, first at %zu\n", name, rank, num_wrong, size,
                at);
  }
}

template <typename T>
void Compare(const char* name, int rank, std::vector<T> actual, const std::vector<T>& expected,
             size_t num_specified) {
  ++g_num_compared;
  if (g_control && num_specified > 0) {
    reinterpret_cast<uint8_t*>(&actual[num_specified / 2])[0] ^= 0x10;
  }
  size_t num_wrong = 0, first = 0;
  for (size_t i = 0; i < num_specified; ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) == 0) continue;
    if (num_wrong++ == 0) first = i;
  }
  if (num_wrong > 0) Report(name, rank, first, num_wrong, num_specified);
}

template <typename T>
void Compare(const char* name, int rank, const std::vector<T>& actual,
             const std::vector<T>& expected) {
  Compare(name, rank, actual, expected, expected.size());
}

void CompareNumbers(const char* name, int rank, RowType type, std::vector<uint8_t> actual,
                    const std::vector<uint8_t>& expected) {
  ++g_num_compared;
  const size_t bytes = TypeBytes(type), size = expected.size() / bytes;
  if (g_control && size > 0) actual[size / 2 * bytes] ^= 0x10;
  size_t num_wrong = 0, first = 0;
  for (size_t i = 0; i < size; ++i) {
    const uint8_t *a = &actual[i * bytes], *b = &expected[i * bytes];
    if (std::memcmp(a, b, bytes) == 0) continue;
    if (std::isnan(ReadNumber(type, a)) && std::isnan(ReadNumber(type, b))) continue;
    if (num_wrong++ == 0) first = i;
  }
  if (num_wrong > 0) Report(name, rank, first, num_wrong, size);
}

void CompareWithin(const char* name, int rank, std::vector<float> actual,
                   const std::vector<double>& expected, const std::vector<double>& bound) {
  ++g_num_compared;
  const size_t middle = actual.size() / 2;
  if (g_control) actual[middle] += 1.0f + 3.0f * static_cast<float>(bound[middle]);
  size_t num_wrong = 0, first = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::abs(actual[i] - expected[i]) <= bound[i]) continue;  // false for NaN
    if (num_wrong++ == 0) first = i;
  }
  if (num_wrong > 0) Report(name, rank, first, num_wrong, actual.size());
}

// Layout, dispatch, combine and combine's gradient of one case, queued on all ranks without waiting in
// between; twice, so that the second time meets what the first one left in the control blocks.
void RunCase(const Group& group, const Case& c, const Data& d, int num_sms, uint64_t seed) {
  const int num_wrong_before = g_num_wrong, num_ranks = d.num_ranks;
  std::vector<std::unique_ptr<Buffers>> buffers;
  for (int r = 0; r < num_ranks; ++r) buffers.push_back(std::make_unique<Buffers>(d, r));
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < num_ranks; ++r) {
      buffers[r]->Poison(group.stream(r));  // stale rows of the first round would look right
      const GroupView view = group.View(r, num_ranks, seed * 8 + 1, 60 * kSecond);
      CHECK_CUDA(jax_ep::gpu::LaunchLayout(view, buffers[r]->Layout(d), num_sms, group.stream(r)));
      buffers[r]->Rewrite(d, r, group.stream(r));  // nobody may read the ids any more
    }
    for (int r = 0; r < num_ranks; ++r) {
      const GroupView view = group.View(r, num_ranks, seed * 8 + 2, 10 * kSecond);
      const bool lands = (r + seed) % 2 == 0;  // every case mixes them
      CHECK_CUDA(jax_ep::gpu::LaunchDispatch(view, buffers[r]->Dispatch(d, lands), num_sms,
                                             group.stream(r)));
    }
    for (int r = 0; r < num_ranks; ++r) {
      const GroupView view = group.View(r, num_ranks, seed * 8 + 3, 60 * kSecond);
      CHECK_CUDA(
          jax_ep::gpu::LaunchCombine(view, buffers[r]->Combine(d), num_sms, group.stream(r)));
    }
    for (int r = 0; r < num_ranks; ++r) {
      const GroupView view = group.View(r, num_ranks, seed * 8 + 4, 10 * kSecond);
      const bool lands = (r + seed) % 2 != 0;
      CHECK_CUDA(jax_ep::gpu::LaunchDispatch(view, buffers[r]->Gradient(d, lands), num_sms,
                                             group.stream(r)));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int r = 0; r < num_ranks; ++r) {
    const ErrorRecord& e = group.error(r);
    if (e.valid != 0) {
      std::printf("rank %d: kind %u waited for rank %d, phase %u, expected %llu, seen %llu\n", r,
                  e.kind, e.peer, e.phase, static_cast<unsigned long long>(e.expected_epoch),
                  static_cast<unsigned long long>(e.seen_epoch));
      std::exit(1);  // a broken group: nothing after this means anything
    }
    Buffers& b = *buffers[r];
    Compare("send_row", r, b.send_row.Read(), d.send_row[r]);
    Compare("recv_src", r, b.recv_src.Read(), d.recv_src[r]);
    Compare("recv_order", r, b.recv_order.Read(), d.recv_order[r]);
    Compare("recv_offsets", r, b.recv_offsets.Read(), d.recv_offsets[r]);
    Compare("group_sizes", r, b.group_sizes.Read(), d.group_sizes[r]);
    Compare("expert_counts", r, b.expert_counts.Read(), d.expert_counts[r]);
    Compare("expert_load", r, b.expert_load.Read(), d.expert_load);
    Compare("counters", r, b.counters.Read(), d.counters[r]);
    int64_t num_specified = d.capacity;
    if (!d.zero_tail) {
      num_specified = 0;
      for (const int32_t size : d.group_sizes[r]) num_specified += size;
    }
    Compare("tokens", r, b.tokens.Read(), d.tokens[r], num_specified * d.row_bytes);
    CompareNumbers("out", r, d.type, b.out.Read(), d.out[r]);
    Compare("d_y", r, b.d_y.Read(), d.d_y[r], num_specified * d.row_bytes);
    CompareWithin("d_weights", r, b.d_weights.Read(), d.d_weights[r], d.d_weights_bound[r]);
    if (d.weighted) {
      Compare("weights", r, b.weights.Read(), d.weights[r], num_specified);
      Compare("collected", r, b.collected.Read(), d.collected[r]);
    }
    // Operands are not written.
    Compare("x", r, b.x.Read(), d.x[r]);
    Compare("g", r, b.g.Read(), d.g[r]);
    Compare("ids", r, b.ids.Read(), d.ids[r]);
  }
  if (g_num_wrong != num_wrong_before) {
    std::printf(
        "  in: R %d, T %lld, K %lld, E %lld, A %lld, C %lld, H %lld %s, routing %d, %s, %s, "
        "%d SMs\n",
        num_ranks, static_cast<long long>(d.num_tokens), static_cast<long long>(d.top_k),
        static_cast<long long>(d.num_experts), static_cast<long long>(d.alignment),
        static_cast<long long>(d.capacity), static_cast<long long>(d.num_channels),
        TypeName(d.type), static_cast<int>(c.routing), d.weighted ? "weighted" : "plain",
        d.zero_tail ? "zero tail" : "any tail", num_sms);
  }
}

// A rank that does not come ---------------------------------------------------------------------

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

// A real layout's tables for rank 0, so that the other calls have something to do.
void WriteTables(const Data& d, Buffers& b) {
  const auto write = [](Buffer<int32_t>& to, const std::vector<int32_t>& from) {
    CHECK_CUDA(cudaMemcpy(to.get(), from.data(), from.size() * 4, cudaMemcpyHostToDevice));
  };
  write(b.send_row, d.send_row[0]);
  write(b.recv_src, d.recv_src[0]);
  write(b.recv_order, d.recv_order[0]);
  write(b.recv_offsets, d.recv_offsets[0]);
  write(b.group_sizes, d.group_sizes[0]);
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
    WriteTables(d, b);
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
    REQUIRE(e.valid == 1 && e.peer == 1 && e.phase == phase && e.kind == static_cast<uint32_t>(op),
            "operation %d: kind %u, peer %d, phase %u", op, e.kind, e.peer, e.phase);
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
  WriteTables(d, b);
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
  REQUIRE(e.kind == 1 && e.rank == 0 && e.peer == 1 && e.phase == 0,
          "kind %u, rank %d, peer %d, phase %u", e.kind, e.rank, e.peer, e.phase);
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

// Do kernels of two streams run together? -------------------------------------------------------

__global__ void WaitFor(volatile int* flag, int* seen) {
  const long long start = clock64();
  while (*flag == 0 && clock64() - start < (1ll << 32)) {
  }
  *seen = *flag;
}
__global__ void Set(volatile int* flag) { *flag = 1; }

bool KernelsRunTogether(const Group& group) {
  Buffer<int> flag(1), seen(1);
  flag.Fill(0);
  CHECK_CUDA(cudaDeviceSynchronize());
  cudaFuncAttributes attributes;
  CHECK_CUDA(cudaFuncGetAttributes(&attributes, WaitFor));  // loads them: no launch waits for that
  CHECK_CUDA(cudaFuncGetAttributes(&attributes, Set));
  WaitFor<<<1, 1, 0, group.stream(0)>>>(flag.get(), seen.get());
  Set<<<1, 1, 0, group.stream(1)>>>(flag.get());
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaDeviceSynchronize());
  return seen.Read()[0] == 1;
}

std::vector<Case> Cases(bool small) {
  using R = Routing;
  constexpr auto kF32 = RowType::kF32, kF16 = RowType::kF16, kBF16 = RowType::kBF16;
  std::vector<Case> cases = {
      // T, K, L, A, H, type, routing, capacity, weighted, zero_tail
      {1, 1, 1, 1, 8, kBF16, R::kUniform, 100, true, true},
      {5, 2, 2, 1, 8, kF16, R::kUniform, 300, true, true},
      {33, 3, 5, 16, 24, kF32, R::kHoles, 80, true, true},
      {17, 4, 4, 4, 520, kBF16, R::kSilentRank, 120, false, false},
      {40, 2, 2, 1, 264, kF16, R::kOneExpert, 60, true, false},
      {8, 2, 2, 8, 16, kF32, R::kNowhere, 100, true, true},
      // Enough units that the blocks of a grid of five share some.
      {330, 2, 2, 1, 64, kBF16, R::kSilentRank, 100, true, true},
      {350, 2, 2, 1, 64, kF16, R::kNowhere, 100, true, false},
      {340, 24, 24, 1, 24, kBF16, R::kHoles, 70, true, true},
  };
  if (!small) {
    const std::vector<Case> more = {
        {65, 8, 16, 8, 7168, kBF16, R::kUniform, 100, true, true},
        {200, 4, 8, 1, 1000, kF32, R::kHoles, 70, true, true},
        {64, 32, 48, 1, 264, kF16, R::kUniform, 110, true, true},
        {33, 2, 128, 16, 20000, kBF16, R::kUniform, 100, false, true},
        {700, 8, 32, 1, 64, kBF16, R::kHoles, 100, true, false},
        // A sum of more rows than combine has stages for.
        {65, 32, 2, 1, 7168, kBF16, R::kOneExpert, 100, true, true},
        {1000, 1, 1, 128, 4, kF32, R::kOneExpert, 50, true, true},
        // With one block, more ids than a layout's block keeps.
        {20000, 2, 4, 1, 8, kBF16, R::kUniform, 100, false, true},
    };
    cases.insert(cases.end(), more.begin(), more.end());
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // a queue for every stream
  std::vector<int> ranks = {1, 2, 3, 4, 8};
  bool small = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--small") {
      small = true;
    } else if (argument == "--control") {
      g_control = true;
    } else if (argument.rfind("--ranks=", 0) == 0) {
      ranks.clear();
      for (const char* at = argument.c_str() + 8; *at != '\0';) {
        char* end = nullptr;
        ranks.push_back(static_cast<int>(std::strtol(at, &end, 10)));
        if (end == at || ranks.back() < 1 || ranks.back() > kMaxRanks) {
          std::printf("ranks are 1 to %d, with commas\n", kMaxRanks);
          return 1;
        }
        at = *end == ',' ? end + 1 : end;
      }
    } else {
      std::printf("unknown argument %s\n", argv[i]);
      return 1;
    }
  }
  int num_sms = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  CHECK_CUDA(jax_ep::gpu::PrepareKernels());
  CHECK_CUDA(cudaDeviceSynchronize());
  const Group group;
  if (!KernelsRunTogether(group)) {
    std::printf("NOTE: kernels of different streams do not run together here: one rank only\n");
    ranks = {1};
  }
  uint64_t seed = 1;
  int num_runs = 0;
  for (const int num_ranks : ranks) {
    for (const Case& c : Cases(small)) {
      const Data d = MakeData(c, num_ranks, seed);
      // All ranks' blocks fit, with SMs to spare; few, odd, and as many as there are.
      for (const int sms : {1, 5, num_sms / num_ranks - 1}) {
        if (small && sms != 5) continue;
        RunCase(group, c, d, sms, seed++);
        ++num_runs;
      }
    }
  }
  TestStall(4);
  TestBreakOnTheWay(700, 0);
  TestBreakOnTheWay(700, 100);
  TestBreakOnTheWay(20000, 100);  // and a layout that reads ids again
  if (g_num_wrong > 0) {
    std::printf("%d wrong of %d comparisons\n", g_num_wrong, g_num_compared);
    return 3;
  }
  if (g_control) {
    std::printf("nothing was seen to be wrong\n");
    return 1;
  }
  std::printf("OK: %d results of %d runs of the kernels, of up to %d ranks\n", g_num_compared,
              num_runs, *std::max_element(ranks.begin(), ranks.end()));
  return 0;
}
