// Times the kernels through cuda/launch.h on the GPUs of this process, one rank a GPU, without XLA
// or Python: what a kernel can do before anything is around it. For development; what users get is
// measured by python -m jax_ep.bench. With more ranks than GPUs these are shared, and with them their
// SMs and memory: good for comparing one build with another, for nothing else.
//
//   kernels_bench [--ranks=2] [--tokens=4096] [--top-k=8] [--hidden=7168] [--experts=256]
//                 [--num-sms=0,24] [--ops=layout,dispatch,...] [--calls=10] [--repeats=9]
//                 [--checks=1]
//
// Rows are bf16, routing is uniform over distinct experts, the capacity is exactly what the fullest
// rank receives. Each number is the time of a CUDA graph of `calls` calls, over their number, of the
// slowest rank; the same graph goes before, so that all ranks begin together. Operations of slots-
// are those that go through slots, up to 256 tokens; round-trip is layout, dispatch and combine,
// slots-round-trip its counterpart of two kernels. Afterwards more calls (`checks`), each of other
// numbers, go into poisoned buffers: rows, weights, sums, collected values and the counts of a layout
// are compared on the devices, bit for bit; tables are taken for right, fp8 is not compared, nor are
// a gradient's sums over channels. In a build with JAX_EP_TIMELINE each operation is followed by when
// its kernels' blocks of rank 0 came where, in the last call of the graph. "of wire" is the time over that of the wire bytes, at the rate at
// which all ranks at once push rows to the next, measured first.
//
// Exit codes: 0 all right, 3 a result was wrong, 1 anything else.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/probe/link_probe.h"
#include "cuda/slots/fits.h"
#include "tests/native/call_arguments.h"
#include "tests/native/check_cuda.h"

namespace {

using namespace jax_ep::gpu;

constexpr int kMaxRanks = 8;
constexpr uint64_t kSlotBytes = 64 << 20;  // of a device
// not-expanded, -fp8: dispatch with a row for each (token, rank); -gradient: combine of such rows.
const char* const kOps[] = {"layout",
                            "dispatch",
                            "layout+dispatch",
                            "combine",
                            "collect",
                            "gradient",
                            "fp8",
                            "fp8-dequantized",
                            "fp8-scaled",
                            "not-expanded",
                            "not-expanded-fp8",
                            "not-expanded-gradient",
                            "slots-dispatch",
                            "slots-fp8",
                            "slots-combine",
                            "slots-round-trip",
                            "slots-round-trip-fp8",
                            "round-trip"};

struct Sizes {
  int ranks = 2, tokens = 4096, top_k = 8, hidden = 7168, experts = 256;
};
struct Options : Sizes {
  int calls = 10, repeats = 9, checks = 1;
  int num_devices = 0, max_sms = 0;  // of a rank; found
  std::vector<int> num_sms = {0, 24};
  std::vector<std::string> ops{std::begin(kOps), std::end(kOps)};
};

std::vector<std::string> Split(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

Options Parse(int argc, char** argv) {
  Options o;
  const struct {
    const char* name;
    int* value;
  } numbers[] = {{"--ranks", &o.ranks},     {"--tokens", &o.tokens},   {"--top-k", &o.top_k},
                 {"--hidden", &o.hidden},   {"--experts", &o.experts}, {"--calls", &o.calls},
                 {"--repeats", &o.repeats}, {"--checks", &o.checks}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const std::string value = equals == std::string::npos ? "" : argument.substr(equals + 1);
    const auto* option = std::find_if(std::begin(numbers), std::end(numbers),
                                      [&](const auto& number) { return number.name == name; });
    if (option != std::end(numbers)) {
      *option->value = std::atoi(value.c_str());
    } else if (name == "--ops") {
      o.ops = Split(value);
    } else if (name == "--num-sms") {
      o.num_sms.clear();
      for (const std::string& part : Split(value)) o.num_sms.push_back(std::atoi(part.c_str()));
    } else {
      std::printf("unknown argument %s\n", argv[i]);
      std::exit(1);
    }
  }
  const auto require = [](bool condition, const char* what) {
    if (condition) return;
    std::printf("%s\n", what);
    std::exit(1);
  };
  CHECK_CUDA(cudaGetDeviceCount(&o.num_devices));
  require(o.num_devices > 0, "no device");
  require(o.ranks >= 1 && o.ranks <= kMaxRanks, "ranks: from 1 to 8");
  o.num_devices = std::min(o.num_devices, o.ranks);
  int num_sms = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  o.max_sms = num_sms / ((o.ranks + o.num_devices - 1) / o.num_devices);
  require(o.experts >= 1 && o.experts <= kMaxExperts && o.experts % o.ranks == 0,
          "experts: a multiple of ranks, at most 1024");
  require(o.top_k >= 1 && o.top_k <= std::min(o.experts, kMaxTopK), "top-k: from 1 to 32");
  require(o.hidden >= 16 && o.hidden % 16 == 0, "hidden: a multiple of 16");
  require(o.tokens >= 1 && int64_t{o.ranks} * o.tokens * o.top_k < int64_t{1} << 31,
          "tokens: at least 1, fewer than 2^31 ids in all");
  require(o.calls >= 1 && o.repeats >= 1, "calls, repeats: at least 1");
  for (const int n : o.num_sms) {
    require(n >= 0 && n <= std::min(o.max_sms, kMaxBlocks), "num-sms: at most what a rank has");
  }
  for (const std::string& op : o.ops) {
    require(std::find(std::begin(kOps), std::end(kOps), op) != std::end(kOps), "unknown operation");
  }
  return o;
}

bool IsOneOf(const std::string& op, std::initializer_list<const char*> ops) {
  return std::find(ops.begin(), ops.end(), op) != ops.end();
}

// Pseudo-random numbers in (-2, 2), the same for the same seed.
template <typename T>
__global__ void Randomize(T* numbers, size_t size, uint32_t seed) {
  const size_t stride = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += stride) {
    uint32_t h = static_cast<uint32_t>(i) * 2654435761u + seed;
    h = (h ^ (h >> 15)) * 0x85ebca6bu;
    h ^= h >> 13;
    numbers[i] = static_cast<T>((static_cast<int>(h & 0xffff) - 32768) / 16384.0f);
  }
}

// What lies on one rank's device.
struct Rank : test::CallBuffers<__nv_bfloat16> {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  ControlBlock* control;
  ErrorRecord* error;
  int32_t* load;              // rows to each expert, by the host
  unsigned long long* wrong;  // numbers
};
struct AllRanks {
  Rank rank[kMaxRanks];
};

template <typename T>
T* Allocate(size_t size) {
  T* data;
  CHECK_CUDA(cudaMalloc(&data, size * sizeof(T)));
  CHECK_CUDA(cudaMemset(data, 0xff, size * sizeof(T)));
  return data;
}

// Counts wrong numbers, by a block for each row or token.
__global__ void CheckRows(AllRanks all, int rank, Sizes o, int64_t capacity, bool weighted) {
  const Rank& r = all.rank[rank];
  const int per_rank = o.tokens * o.top_k;
  for (int64_t row = blockIdx.x; row < capacity; row += gridDim.x) {
    const int flat = r.recv_src[row];
    const __nv_bfloat16* x =
        flat < 0 ? nullptr
                 : all.rank[flat / per_rank].x + int64_t{flat % per_rank / o.top_k} * o.hidden;
    for (int h = threadIdx.x; h < o.hidden; h += blockDim.x) {
      float expected = x == nullptr ? 0.0f : __bfloat162float(x[h]);
      if (weighted && x != nullptr) expected = __fmul_rn(r.row_weights[row], expected);
      const __nv_bfloat16 actual = r.tokens[row * o.hidden + h];
      if (__bfloat16_as_ushort(actual) != __bfloat16_as_ushort(__float2bfloat16_rn(expected))) {
        atomicAdd(r.wrong, 1);
      }
    }
    if (threadIdx.x == 0 && !weighted) {
      const float expected =
          flat < 0 ? 0.0f : all.rank[flat / per_rank].topk_weights[flat % per_rank];
      if (r.weights[row] != expected) atomicAdd(r.wrong, 1);
    }
  }
}
__global__ void CheckNotExpanded(AllRanks all, int rank, Sizes o) {
  const Rank& r = all.rank[rank];
  const int num_tokens = o.ranks * o.tokens;
  for (int64_t row = blockIdx.x; row <= num_tokens; row += gridDim.x) {
    const bool is_token = row < num_tokens && r.recv_offsets[row] != r.recv_offsets[row + 1];
    const __nv_bfloat16* x = all.rank[is_token ? row / o.tokens : 0].x + row % o.tokens * o.hidden;
    for (int h = threadIdx.x; h < o.hidden; h += blockDim.x) {
      const unsigned short expected = is_token ? __bfloat16_as_ushort(x[h]) : 0;
      if (__bfloat16_as_ushort(r.tokens[row * o.hidden + h]) != expected) atomicAdd(r.wrong, 1);
    }
  }
}
__global__ void CheckNotExpandedSums(AllRanks all, int rank, Sizes o) {
  const Rank& r = all.rank[rank];
  for (int t = blockIdx.x; t < o.tokens; t += gridDim.x) {
    const int64_t row = int64_t{rank} * o.tokens + t;
    for (int h = threadIdx.x; h < o.hidden; h += blockDim.x) {
      float total = 0.0f;
      for (int q = 0; q < o.ranks; ++q) {
        const int32_t* offsets = all.rank[q].recv_offsets;
        if (offsets[row] == offsets[row + 1]) continue;
        total = __fadd_rn(total, __bfloat162float(all.rank[q].y[row * o.hidden + h]));
      }
      const __nv_bfloat16 actual = r.out[int64_t{t} * o.hidden + h];
      if (__bfloat16_as_ushort(actual) != __bfloat16_as_ushort(__float2bfloat16_rn(total))) {
        atomicAdd(r.wrong, 1);
      }
    }
  }
}
__global__ void CheckSums(AllRanks all, int rank, Sizes o, bool weighted) {
  const Rank& r = all.rank[rank];
  const int num_local = o.experts / o.ranks;
  for (int t = blockIdx.x; t < o.tokens; t += gridDim.x) {
    for (int h = threadIdx.x; h < o.hidden; h += blockDim.x) {
      float total = 0.0f;
      for (int q = 0; q < o.ranks; ++q) {
        float sum = 0.0f;
        bool any = false;
        for (int k = 0; k < o.top_k; ++k) {
          const int64_t row = r.send_row[t * o.top_k + k];
          if (row < 0 || r.ids[t * o.top_k + k] / num_local != q) continue;
          any = true;
          const float weight = weighted ? all.rank[q].row_weights[row] : 1.0f;
          const float y = __bfloat162float(all.rank[q].y[row * o.hidden + h]);
          sum = __fadd_rn(sum, __fmul_rn(weight, y));
        }
        if (any) total = __fadd_rn(total, __bfloat162float(__float2bfloat16_rn(sum)));
      }
      const __nv_bfloat16 actual = r.out[int64_t{t} * o.hidden + h];
      if (__bfloat16_as_ushort(actual) != __bfloat16_as_ushort(__float2bfloat16_rn(total))) {
        atomicAdd(r.wrong, 1);
      }
    }
  }
}
__global__ void CheckCollected(AllRanks all, int rank, Sizes o) {
  const Rank& r = all.rank[rank];
  const int num_local = o.experts / o.ranks;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < o.tokens * o.top_k;
       i += gridDim.x * blockDim.x) {
    const int row = r.send_row[i];
    const float expected = row < 0 ? 0.0f : all.rank[r.ids[i] / num_local].row_weights[row];
    if (r.collected[i] != expected) atomicAdd(r.wrong, 1);
  }
}
__global__ void CheckCounts(AllRanks all, int rank, Sizes o) {
  const Rank& r = all.rank[rank];
  const int num_local = o.experts / o.ranks;
  int received = 0;
  for (int e = 0; e < o.experts; ++e) {
    if (r.expert_load[e] != r.load[e]) atomicAdd(r.wrong, 1);
    if (e / num_local != rank) continue;
    received += r.load[e];
    if (r.expert_counts[e % num_local] != r.load[e]) atomicAdd(r.wrong, 1);
  }
  if (r.counters[0] != received || r.counters[1] != 0 || r.counters[2] != 0) {
    atomicAdd(r.wrong, 1);
  }
}

class Bench {
 public:
  explicit Bench(const Options& options) : o_(options) {
    std::mt19937_64 rng(1);
    const int num_local = o_.experts / o_.ranks;
    std::vector<int32_t> load(o_.experts);
    std::vector<int64_t> received(o_.ranks);
    std::vector<std::vector<int32_t>> ids(o_.ranks);
    int64_t wire_rows = 0;
    for (int r = 0; r < o_.ranks; ++r) {
      for (int t = 0; t < o_.tokens; ++t) {
        std::vector<int32_t> chosen;
        std::vector<bool> goes_to(o_.ranks);
        while (static_cast<int>(chosen.size()) < o_.top_k) {
          const auto id = static_cast<int32_t>(rng() % o_.experts);
          if (std::find(chosen.begin(), chosen.end(), id) != chosen.end()) continue;
          chosen.push_back(id);
          ++load[id];
          goes_to[id / num_local] = true;
        }
        ids[r].insert(ids[r].end(), chosen.begin(), chosen.end());
        for (int q = 0; q < o_.ranks; ++q) wire_rows += q != r && goes_to[q];
      }
    }
    for (int e = 0; e < o_.experts; ++e) received[e / num_local] += load[e];
    capacity_ = *std::max_element(received.begin(), received.end());
    wire_bytes_ = static_cast<double>(wire_rows) / o_.ranks * o_.hidden * 2;
    CHECK_CUDA(cudaHostAlloc(&probe_status_, kMaxRanks * sizeof(uint32_t), cudaHostAllocPortable));
    std::memset(probe_status_, 0, kMaxRanks * sizeof(uint32_t));
    const int64_t rows = capacity_, tokens = o_.tokens, ids_here = tokens * o_.top_k;
    const int64_t most_rows = std::max(rows, num_rows());  // of either form
    for (int r = 0; r < o_.ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
      for (int q = 0; q < o_.ranks; ++q) {
        if (q != r && r < o_.num_devices && q < o_.num_devices) {
          CHECK_CUDA(cudaDeviceEnablePeerAccess(q, 0));
        }
      }
      Rank& b = all_.rank[r];
      CHECK_CUDA(cudaStreamCreateWithFlags(&b.stream, cudaStreamNonBlocking));
      CHECK_CUDA(cudaEventCreate(&b.begin));
      CHECK_CUDA(cudaEventCreate(&b.end));
      b.control = reinterpret_cast<ControlBlock*>(Allocate<char>(kSlotsOffset + kSlotBytes));
      CHECK_CUDA(cudaMemset(b.control, 0, kSlotsOffset + kSlotBytes));
      CHECK_CUDA(cudaHostAlloc(&b.error, sizeof(ErrorRecord), cudaHostAllocPortable));
      std::memset(b.error, 0, sizeof(ErrorRecord));
      b.error->arrival_timeout_ns = b.error->progress_timeout_ns = 5'000'000'000;
      b.ids = Allocate<int32_t>(ids_here);
      CHECK_CUDA(cudaMemcpy(b.ids, ids[r].data(), ids_here * 4, cudaMemcpyHostToDevice));
      b.send_row = Allocate<int32_t>(ids_here);
      b.recv_src = Allocate<int32_t>(rows);
      b.recv_order = Allocate<int32_t>(rows);
      b.recv_offsets = Allocate<int32_t>(o_.ranks * tokens + 1);
      b.group_sizes = Allocate<int32_t>(num_local);
      b.expert_counts = Allocate<int32_t>(num_local);
      b.expert_load = Allocate<int32_t>(o_.experts);
      b.counters = Allocate<int32_t>(3);
      b.x = Allocate<__nv_bfloat16>(tokens * o_.hidden);
      b.y = Allocate<__nv_bfloat16>(most_rows * o_.hidden);
      b.tokens = Allocate<__nv_bfloat16>(most_rows * o_.hidden);
      b.partial = Allocate<__nv_bfloat16>(o_.ranks * tokens * o_.hidden);
      b.out = Allocate<__nv_bfloat16>(tokens * o_.hidden);
      b.topk_weights = Allocate<float>(ids_here);
      b.weights = Allocate<float>(rows);
      b.row_weights = Allocate<float>(rows);
      b.dots = Allocate<float>(rows);
      b.scales = Allocate<float>(most_rows * jax_ep::num_block_scales(o_.hidden));
      b.x_scales = Allocate<float>(tokens * jax_ep::num_block_scales(o_.hidden));
      b.collected = Allocate<float>(ids_here);
      b.load = Allocate<int32_t>(o_.experts);
      CHECK_CUDA(cudaMemcpy(b.load, load.data(), o_.experts * 4, cudaMemcpyHostToDevice));
      b.wrong = Allocate<unsigned long long>(1);
      RandomizeOperands(b, 4 * r);
      CHECK_CUDA(PrepareKernels());
      CHECK_CUDA(PrepareProbes());
      CHECK_CUDA(cudaDeviceSynchronize());
    }
  }

  void MeasureWire() {
    if (o_.ranks == 1) return;
    constexpr int32_t kRowBytes = 14336;
    constexpr int64_t kRows = 4096;
    constexpr int kRounds = 20;
    std::vector<char*> from(o_.ranks), to(o_.ranks);
    for (int r = 0; r < o_.ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
      from[r] = Allocate<char>(kRows * kRowBytes);
      to[r] = Allocate<char>(kRows * kRowBytes);
    }
    double slowest = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {  // the first one warms up
      slowest = 0;
      for (int r = 0; r < o_.ranks; ++r) {
        CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
        const Rank& b = all_.rank[r];
        ProbeCopy copy{};
        copy.src = from[r];
        copy.dst = to[(r + 1) % o_.ranks];
        copy.num_rows = kRows;
        copy.row_bytes = kRowBytes;
        copy.num_copies = 1;
        copy.num_rounds = kRounds;
        copy.status = probe_status_ + r;
        copy.timeout_ns = 1'000'000'000;
        CHECK_CUDA(cudaEventRecord(b.begin, b.stream));
        CHECK_CUDA(LaunchProbeCopy(copy, o_.max_sms, b.stream));
        CHECK_CUDA(cudaEventRecord(b.end, b.stream));
      }
      for (int r = 0; r < o_.ranks; ++r) slowest = std::max(slowest, Microseconds(all_.rank[r]));
    }
    for (int r = 0; r < o_.ranks; ++r) {
      CHECK_CUDA(cudaFree(from[r]));
      CHECK_CUDA(cudaFree(to[r]));
      if (probe_status_[r] == 0) continue;
      std::printf("a copy between ranks timed out\n");
      std::exit(1);
    }
    wire_rate_ = static_cast<double>(kRows) * kRowBytes * kRounds / slowest / 1e3;
    std::printf("W: %.1f GB/s, all ranks pushing to the next at once\n", wire_rate_);
  }

  // False if a result is wrong.
  bool Run() {
    std::printf("%d ranks, T %d, K %d, H %d bf16, E %d, C %lld; wire %.1f MB a rank\n", o_.ranks,
                o_.tokens, o_.top_k, o_.hidden, o_.experts, static_cast<long long>(capacity_),
                wire_bytes_ / 1e6);
    std::printf("%-21s %5s %10s %10s %10s %9s %7s\n", "operation", "SMs", "median us", "least",
                "most", "of wire", "wrong");
    for (int r = 0; r < o_.ranks; ++r) Launch("layout", r, o_.max_sms);
    Synchronize();
    bool good = true;
    for (const int wanted : o_.num_sms) {
      for (const std::string& op : o_.ops) {
        if (op.rfind("slots-", 0) == 0 && !FitsSlots()) {
          std::printf("%-21s does not fit\n", op.c_str());
          continue;
        }
        good = Time(op, wanted > 0 ? wanted : o_.max_sms) && good;
      }
    }
    return good;
  }

 private:
  GroupView View(int rank, const std::string& op, int num_sms) const {
    GroupView view{};
    view.control = all_.rank[rank].control;
    view.error = all_.rank[rank].error;
    view.operation = std::hash<std::string>()(op) + static_cast<uint64_t>(num_sms);
    view.call = ++num_calls_;
    view.slot_area_bytes = slot_area_bytes(kSlotBytes, o_.ranks);
    view.rank = rank;
    view.num_ranks = o_.ranks;
    for (int q = 0; q < o_.ranks; ++q) {
      view.peer[q] = {all_.rank[q].control, 0, 0, q, rank};
    }
    return view;
  }

  // With a row for each (token, rank).
  int64_t num_rows() const { return int64_t{o_.ranks} * o_.tokens + 1; }
  bool FitsSlots() const {
    return fits_slots({o_.ranks, o_.tokens, o_.top_k, o_.experts, {int64_t{o_.hidden} * 2}},
                      slot_area_bytes(kSlotBytes, o_.ranks));
  }

  test::CallSizes call_sizes() const {
    return {o_.ranks,
            o_.tokens,
            o_.top_k,
            o_.experts,
            1,
            capacity_,
            o_.hidden,
            int64_t{o_.hidden} * 2,
            jax_ep::FloatType::kBF16,
            true};
  }
  CombineArguments Combine(const Rank& b, bool weighted) const {
    CombineArguments a = test::CombineOf(call_sizes(), b);
    a.weights = weighted ? b.row_weights : nullptr;
    a.values = weighted ? nullptr : b.row_weights;
    a.collected = weighted ? nullptr : b.collected;
    return a;
  }

  void Launch(const std::string& op, int rank, int num_sms) const {
    CHECK_CUDA(cudaSetDevice(rank % o_.num_devices));
    const Rank& b = all_.rank[rank];
    const auto dispatch = [&](DispatchMode mode, bool expand = true) {
      DispatchArguments a = test::DispatchOf(call_sizes(), b, mode);
      if (!expand) a.num_rows = num_rows();
      a.expand = expand;
      CHECK_CUDA(LaunchDispatch(View(rank, op, num_sms), a, num_sms, b.stream));
    };
    if (IsOneOf(op, {"slots-dispatch", "slots-round-trip"})) {
      CHECK_CUDA(LaunchLayoutAndDispatchInSlots(
          View(rank, "slots-dispatch", num_sms),
          test::LayoutAndDispatchOf(call_sizes(), b, /*weighted=*/true), num_sms, b.stream));
    }
    if (IsOneOf(op, {"slots-fp8", "slots-round-trip-fp8"})) {
      LayoutAndDispatchArguments a = test::LayoutAndDispatchOf(call_sizes(), b, /*weighted=*/true);
      a.mode = DispatchMode::kQuantize;
      a.num_scales = jax_ep::num_block_scales(o_.hidden);
      a.scales = b.scales;
      CHECK_CUDA(
          LaunchLayoutAndDispatchInSlots(View(rank, "slots-fp8", num_sms), a, num_sms, b.stream));
    }
    if (IsOneOf(op, {"slots-combine", "slots-round-trip", "slots-round-trip-fp8"})) {
      CHECK_CUDA(LaunchCombineInSlots(View(rank, "slots-combine", num_sms), Combine(b, true),
                                      num_sms, b.stream));
    }
    if (IsOneOf(op, {"layout", "layout+dispatch", "round-trip"})) {
      CHECK_CUDA(LaunchLayout(View(rank, "layout", num_sms), test::LayoutOf(call_sizes(), b),
                              num_sms, b.stream));
    }
    if (IsOneOf(op, {"dispatch", "layout+dispatch", "round-trip"})) {
      dispatch(DispatchMode::kCopy);
    }
    if (op == "gradient") dispatch(DispatchMode::kWeighted);
    if (op == "fp8") dispatch(DispatchMode::kQuantize);
    if (op == "fp8-dequantized") dispatch(DispatchMode::kDequantize);
    if (op == "fp8-scaled") dispatch(DispatchMode::kScaled);
    if (op == "not-expanded") dispatch(DispatchMode::kCopy, false);
    if (op == "not-expanded-fp8") dispatch(DispatchMode::kQuantize, false);
    if (IsOneOf(op, {"combine", "collect", "round-trip", "not-expanded-gradient"})) {
      CombineArguments a = Combine(b, IsOneOf(op, {"combine", "round-trip"}));
      a.expand = op != "not-expanded-gradient";
      CHECK_CUDA(LaunchCombine(View(rank, op, num_sms), a, num_sms, b.stream));
    }
  }

  double Microseconds(const Rank& b) const {
    CHECK_CUDA(cudaEventSynchronize(b.end));
    float milliseconds;
    CHECK_CUDA(cudaEventElapsedTime(&milliseconds, b.begin, b.end));
    return milliseconds * 1e3;
  }

  void Synchronize() const {
    for (int r = 0; r < o_.ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
      CHECK_CUDA(cudaStreamSynchronize(all_.rank[r].stream));
    }
    for (int r = 0; r < o_.ranks; ++r) {
      const ErrorRecord& e = *all_.rank[r].error;
      if (e.valid == 0) continue;
      std::printf("rank %d: kind %u waited for rank %d, phase %u, expected %llx, seen %llx\n", r,
                  e.kind, e.peer_slot, e.phase, static_cast<unsigned long long>(e.expected_epoch),
                  static_cast<unsigned long long>(e.seen_epoch));
      std::exit(1);
    }
  }

  bool Time(const std::string& op, int num_sms) {
    std::vector<cudaGraphExec_t> graphs(o_.ranks);
    for (int r = 0; r < o_.ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
      cudaGraph_t graph;
      CHECK_CUDA(cudaStreamBeginCapture(all_.rank[r].stream, cudaStreamCaptureModeRelaxed));
      for (int i = 0; i < o_.calls; ++i) Launch(op, r, num_sms);
      CHECK_CUDA(cudaStreamEndCapture(all_.rank[r].stream, &graph));
      CHECK_CUDA(cudaGraphInstantiate(&graphs[r], graph, 0));
      CHECK_CUDA(cudaGraphDestroy(graph));
      CHECK_CUDA(cudaGraphUpload(graphs[r], all_.rank[r].stream));
    }
    std::vector<double> times;
    for (int repeat = -2; repeat < o_.repeats; ++repeat) {
      for (int r = 0; r < o_.ranks; ++r) {
        CHECK_CUDA(cudaGraphLaunch(graphs[r], all_.rank[r].stream));
        CHECK_CUDA(cudaEventRecord(all_.rank[r].begin, all_.rank[r].stream));
        CHECK_CUDA(cudaGraphLaunch(graphs[r], all_.rank[r].stream));
        CHECK_CUDA(cudaEventRecord(all_.rank[r].end, all_.rank[r].stream));
      }
      double slowest = 0;
      for (int r = 0; r < o_.ranks; ++r) slowest = std::max(slowest, Microseconds(all_.rank[r]));
      if (repeat >= 0) times.push_back(slowest / o_.calls);
    }
    for (cudaGraphExec_t graph : graphs) CHECK_CUDA(cudaGraphExecDestroy(graph));
    Synchronize();
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
#ifdef JAX_EP_TIMELINE
    const auto timeline = ReadTimeline();
#endif
    const bool is_fp8 = op.find("fp8") != std::string::npos;
    unsigned long long wrong = 0;
    for (int i = 0; i < o_.checks && !is_fp8; ++i) wrong += CountWrong(op, num_sms, i);
    std::printf("%-21s %5d %10.1f %10.1f %10.1f", op.c_str(), num_sms, median, times.front(),
                times.back());
    if (op != "layout" && !is_fp8 && wire_rate_ > 0) {
      std::printf(" %8.2fx", median / (wire_bytes_ / wire_rate_ / 1e3));
    } else {
      std::printf(" %9s", "");
    }
    std::printf(" %7s\n", is_fp8 ? "-" : std::to_string(wrong).c_str());
#ifdef JAX_EP_TIMELINE
    PrintTimeline(*timeline);
#endif
    std::fflush(stdout);
    return wrong == 0;
  }

#ifdef JAX_EP_TIMELINE
  // Rank 0's, of the newest call of each kernel since the last time.
  using Timeline = std::array<CallTimeline<kMaxBlocks>, jax_ep::kNumOps>;
  std::unique_ptr<Timeline> ReadTimeline() const {
    CHECK_CUDA(cudaSetDevice(0));
    auto copy = std::make_unique<Timeline>();
    auto* timeline = &all_.rank[0].control->timeline;
    static_assert(sizeof *copy == sizeof *timeline);
    CHECK_CUDA(cudaMemcpy(copy.get(), timeline, sizeof *timeline, cudaMemcpyDeviceToHost));
    CHECK_CUDA(cudaMemset(timeline, 0, sizeof *timeline));
    return copy;
  }

  // Of the blocks in order, "least, median, most".
  static void PrintThree(std::vector<double>& values) {
    std::sort(values.begin(), values.end());
    std::printf("  %7.2f %7.2f %7.2f", values.front(), values[values.size() / 2], values.back());
  }

  // For each event of a role when blocks came there first, and when last, in us since the first block
  // began; how often; and of a fence how long it took a block in all.
  void PrintTimeline(const Timeline& timeline) const {
    for (uint32_t kind = 0; kind < jax_ep::kNumOps; ++kind) {
      const CallTimeline<kMaxBlocks>& call = timeline[kind];
      if (call.num_blocks == 0) continue;
      uint64_t start = UINT64_MAX;
      for (uint32_t b = 0; b < call.num_blocks; ++b)
        start = std::min(start, call.block[b].start_ns);
      std::printf("  %s, %u blocks: first, last, how often: least, median, most\n",
                  jax_ep::kOpNames[kind], call.num_blocks);
      for (int role = 0; role < kNumRoles; ++role) {
        for (int event = 0; event < kNumEvents; ++event) {
          std::vector<double> first, last, count, total;
          for (uint32_t b = 0; b < call.num_blocks; ++b) {
            const BlockTimeline& block = call.block[b];
            const Mark& mark = block.mark[role][event];
            if (mark.count == 0) continue;
            const auto begin = static_cast<double>(block.start_ns - start);
            first.push_back((begin + mark.first) / 1e3);
            last.push_back((begin + mark.last) / 1e3);
            count.push_back(mark.count);
            if (event != static_cast<int>(Event::kFenceEnd)) continue;
            const Mark& fence = block.mark[role][static_cast<int>(Event::kFenceBegin)];
            total.push_back((mark.total - fence.total) / 1e3);
          }
          if (first.empty()) continue;
          std::printf("    %-10s %-12s", kRoleNames[role], kEventNames[event]);
          PrintThree(first);
          PrintThree(last);
          PrintThree(count);
          if (!total.empty()) {
            std::printf("  in all");
            PrintThree(total);
          }
          std::printf("\n");
        }
      }
    }
  }
#endif

  // Other numbers for each, so that what an earlier call has left is wrong.
  void RandomizeOperands(const Rank& b, uint32_t seed) const {
    const int64_t rows = std::max(capacity_, num_rows()), tokens = o_.tokens;
    Randomize<<<512, 256, 0, b.stream>>>(b.x, tokens * o_.hidden, seed);
    Randomize<<<512, 256, 0, b.stream>>>(b.y, rows * o_.hidden, seed + 1);
    Randomize<<<64, 256, 0, b.stream>>>(b.topk_weights, tokens * o_.top_k, seed + 2);
    Randomize<<<64, 256, 0, b.stream>>>(b.row_weights, capacity_, seed + 3);
    CHECK_CUDA(cudaGetLastError());
  }

  // One more call, into poisoned buffers.
  unsigned long long CountWrong(const std::string& op, int num_sms, int check) {
    const bool has_both = IsOneOf(op, {"layout+dispatch", "slots-dispatch"});
    const bool has_all = IsOneOf(op, {"round-trip", "slots-round-trip"});
    const bool has_layout = op == "layout" || has_both || has_all;
    const bool has_rows = IsOneOf(op, {"dispatch", "gradient"}) || has_both || has_all;
    const bool has_sums = IsOneOf(op, {"combine", "collect", "slots-combine"}) || has_all;
    const bool has_collected = op == "collect" || op == "not-expanded-gradient";
    const int64_t rows = capacity_, tokens = o_.tokens, ids = tokens * o_.top_k;
    for (int r = 0; r < o_.ranks; ++r) {
      const Rank& b = all_.rank[r];
      CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
      const auto poison = [&](void* data, int64_t bytes) {
        CHECK_CUDA(cudaMemsetAsync(data, 0xff, bytes, b.stream));
      };
      RandomizeOperands(b, 4 * (r + 8 * (check + 1)));
      CHECK_CUDA(cudaMemsetAsync(b.wrong, 0, sizeof(*b.wrong), b.stream));
      poison(b.tokens, std::max(rows, num_rows()) * o_.hidden * 2);
      poison(b.weights, rows * 4);
      poison(b.partial, o_.ranks * tokens * o_.hidden * 2);
      poison(b.out, tokens * o_.hidden * 2);
      poison(b.collected, ids * 4);
      if (has_layout) {
        poison(b.send_row, ids * 4);
        poison(b.recv_src, rows * 4);
        poison(b.recv_order, rows * 4);
        poison(b.recv_offsets, (o_.ranks * tokens + 1) * 4);
        poison(b.group_sizes, o_.experts / o_.ranks * 4);
        poison(b.expert_counts, o_.experts / o_.ranks * 4);
        poison(b.expert_load, int64_t{o_.experts} * 4);
        poison(b.counters, 3 * 4);
      }
      Launch(op, r, num_sms);
    }
    Synchronize();
    for (int r = 0; r < o_.ranks; ++r) {
      CHECK_CUDA(cudaSetDevice(r % o_.num_devices));
      const cudaStream_t stream = all_.rank[r].stream;
      if (has_layout) CheckCounts<<<1, 1, 0, stream>>>(all_, r, o_);
      if (has_rows) CheckRows<<<1024, 256, 0, stream>>>(all_, r, o_, capacity_, op == "gradient");
      if (has_sums) CheckSums<<<1024, 256, 0, stream>>>(all_, r, o_, op != "collect");
      if (op == "not-expanded") CheckNotExpanded<<<1024, 256, 0, stream>>>(all_, r, o_);
      if (op == "not-expanded-gradient") {
        CheckNotExpandedSums<<<1024, 256, 0, stream>>>(all_, r, o_);
      }
      if (has_collected) CheckCollected<<<64, 256, 0, stream>>>(all_, r, o_);
      CHECK_CUDA(cudaGetLastError());
    }
    Synchronize();
    unsigned long long sum = 0;
    for (int r = 0; r < o_.ranks; ++r) {
      unsigned long long wrong;
      CHECK_CUDA(cudaMemcpy(&wrong, all_.rank[r].wrong, sizeof(wrong), cudaMemcpyDeviceToHost));
      sum += wrong;
    }
    return sum;
  }

  const Options o_;
  mutable uint64_t num_calls_ = 0;
  AllRanks all_{};
  uint32_t* probe_status_;
  int64_t capacity_ = 0;
  double wire_bytes_ = 0, wire_rate_ = 0;
};

}  // namespace

int main(int argc, char** argv) {
  Bench bench(Parse(argc, argv));
  bench.MeasureWire();
  return bench.Run() ? 0 : 3;
}
