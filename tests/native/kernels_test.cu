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
#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

namespace {

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

#define CHECK_CUDA(call)                                        \
  do {                                                          \
    const cudaError_t status_of_call = (call);                  \
    if (status_of_call != cudaSuccess) {                        \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                  cudaGetErrorString(status_of_call));          \
      std::exit(1);                                             \
    }                                                           \
  } while (0)

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

// Types --------------------------------------------------------------------------------------

int TypeBytes(RowType type) { return type == RowType::kF32 ? 4 : 2; }

const char* TypeName(RowType type) {
  return type == RowType::kF32 ? "f32" : type == RowType::kF16 ? "f16" : "bf16";
}

float ReadNumber(RowType type, const uint8_t* at) {
  if (type == RowType::kF32) {
    float x;
    std::memcpy(&x, at, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (type == RowType::kF16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

void WriteNumber(RowType type, float x, uint8_t* at) {
  if (type == RowType::kF32) {
    std::memcpy(at, &x, 4);
  } else if (type == RowType::kF16) {
    const __half h = __float2half_rn(x);
    std::memcpy(at, &h, 2);
  } else {
    const __nv_bfloat16 h = __float2bfloat16_rn(x);
    std::memcpy(at, &h, 2);
  }
}

float Rounded(RowType type, float x) {
  uint8_t bytes[4];
  WriteNumber(type, x, bytes);
  return ReadNumber(type, bytes);
}

// Cases --------------------------------------------------------------------------------------

enum class Routing { kUniform, kOneExpert, kHoles, kSilentRank, kNowhere };

struct Case {
  int64_t num_tokens, top_k, experts_per_rank, alignment, num_channels;
  RowType type;
  Routing routing;
  int capacity_percent;  // of the rows that arrive at the fullest rank, rounded up to alignment
  bool weighted, zero_tail;
};

// What all ranks send, and what all must get.
struct Data {
  int num_ranks;
  int64_t num_tokens, top_k, num_experts, num_local, alignment, capacity, num_channels, row_bytes;
  RowType type;
  bool weighted, zero_tail;
  std::vector<std::vector<int32_t>> ids;      // [R][T * K]
  std::vector<std::vector<uint8_t>> x, g, y;  // [R][T * row] twice, [R][C * row]
  std::vector<std::vector<float>> topk_weights, row_weights, values;  // [R][T * K], [R][C] twice
  // Tables.
  std::vector<std::vector<int32_t>> send_row, recv_src, recv_order, recv_offsets, group_sizes,
      expert_counts, counters;
  std::vector<int32_t> expert_load;
  // Results.
  std::vector<std::vector<uint8_t>> tokens, out, d_y;
  std::vector<std::vector<float>> weights, collected;
  std::vector<std::vector<double>> d_weights, d_weights_bound;  // the exact sum, and how far off
};

void MakeIds(const Case& c, std::mt19937_64& rng, Data& d) {
  const auto draw = [&](int64_t n) { return static_cast<int64_t>(rng() % n); };
  const auto hot = static_cast<int32_t>(draw(d.num_experts));
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<int32_t> ids(d.num_tokens * d.top_k);
    for (auto& id : ids) {
      id = static_cast<int32_t>(draw(d.num_experts));
      const int64_t luck = draw(16);
      if (c.routing == Routing::kOneExpert) id = hot;
      if (c.routing == Routing::kHoles && luck < 4) id = -1;
      if (c.routing == Routing::kHoles && luck == 4) id = static_cast<int32_t>(d.num_experts);
      if (c.routing == Routing::kHoles && luck == 5) id = std::numeric_limits<int32_t>::min();
      if (c.routing == Routing::kSilentRank && r == 0) id = -1;
      if (c.routing == Routing::kNowhere) id = -1;
    }
    d.ids.push_back(ids);
  }
}

// The tables by the book: rows in the order of (expert, source), each expert from its offset on.
void MakeTables(const Case& c, Data& d) {
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  const auto id_of = [&](int64_t flat) { return d.ids[flat / ids_per_rank][flat % ids_per_rank]; };
  std::vector<std::vector<int64_t>> rows_of(d.num_experts);
  for (int64_t flat = 0; flat < d.num_ranks * ids_per_rank; ++flat) {
    const int32_t id = id_of(flat);
    if (id >= 0 && id < d.num_experts) rows_of[id].push_back(flat);
  }
  int64_t fullest = 1;
  for (int r = 0; r < d.num_ranks; ++r) {
    int64_t rows = 0;
    for (int64_t e = r * d.num_local; e < (r + 1) * d.num_local; ++e) {
      rows +=
          (static_cast<int64_t>(rows_of[e].size()) + d.alignment - 1) / d.alignment * d.alignment;
    }
    fullest = std::max(fullest, rows);
  }
  const int64_t wanted = std::max<int64_t>(1, fullest * c.capacity_percent / 100);
  d.capacity = (wanted + d.alignment - 1) / d.alignment * d.alignment;

  const int64_t num_flat_tokens = d.num_ranks * d.num_tokens;
  for (int64_t e = 0; e < d.num_experts; ++e) {
    d.expert_load.push_back(static_cast<int32_t>(rows_of[e].size()));
  }
  for (int r = 0; r < d.num_ranks; ++r) d.send_row.emplace_back(ids_per_rank, -1);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<int32_t> src(d.capacity, -1), order(d.capacity, -1), sizes, counts;
    int64_t offset = 0, routed = 0;
    for (int64_t e = r * d.num_local; e < (r + 1) * d.num_local; ++e) {
      const auto n = static_cast<int64_t>(rows_of[e].size());
      for (int64_t i = 0; i < n && offset + i < d.capacity; ++i) {
        const int64_t flat = rows_of[e][i];
        src[offset + i] = static_cast<int32_t>(flat);
        d.send_row[flat / ids_per_rank][flat % ids_per_rank] = static_cast<int32_t>(offset + i);
      }
      const int64_t end = offset + (n + d.alignment - 1) / d.alignment * d.alignment;
      sizes.push_back(
          static_cast<int32_t>(std::min(end, d.capacity) - std::min(offset, d.capacity)));
      counts.push_back(static_cast<int32_t>(n));
      offset = end;
      routed += n;
    }
    std::vector<std::pair<int32_t, int32_t>> kept;  // source, row
    for (int64_t row = 0; row < d.capacity; ++row) {
      if (src[row] >= 0) kept.emplace_back(src[row], static_cast<int32_t>(row));
    }
    std::sort(kept.begin(), kept.end());
    std::vector<int32_t> offsets;
    size_t next = 0;
    for (int64_t token = 0; token <= num_flat_tokens; ++token) {
      while (next < kept.size() && kept[next].first < token * d.top_k) ++next;
      offsets.push_back(static_cast<int32_t>(next));
    }
    for (size_t i = 0; i < kept.size(); ++i) order[i] = kept[i].second;
    int32_t invalid = 0;
    for (const int32_t id : d.ids[r]) invalid += id < -1 || id >= d.num_experts;
    const auto num_kept = static_cast<int32_t>(kept.size());
    d.recv_src.push_back(src);
    d.recv_order.push_back(order);
    d.recv_offsets.push_back(offsets);
    d.group_sizes.push_back(sizes);
    d.expert_counts.push_back(counts);
    d.counters.push_back({num_kept, static_cast<int32_t>(routed - num_kept), invalid});
  }
}

void MakeRows(std::mt19937_64& rng, Data& d) {
  // Both signs, magnitudes from almost 0 to 16, every bit of the mantissa.
  const auto draw = [](uint64_t bits) {
    const auto whole = static_cast<int32_t>(static_cast<uint32_t>(bits));
    return std::ldexp(static_cast<float>(whole), -31 + static_cast<int>(bits >> 32 & 7) - 3);
  };
  // An operand's number: also subnormal in float32 and bfloat16 (0 in float16), and -0.
  const auto write = [&](uint64_t bits, uint8_t* at) {
    float number = draw(bits);
    if (bits >> 60 == 0) number *= 1e-39f;
    if (bits >> 59 == 2) number = -0.0f;
    WriteNumber(d.type, number, at);
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int type_bytes = TypeBytes(d.type);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> x(d.num_tokens * d.row_bytes);
    for (auto& byte : x) byte = static_cast<uint8_t>(rng());
    d.x.push_back(x);
    std::vector<uint8_t> g(x.size());
    for (size_t i = 0; i < g.size(); i += type_bytes) write(rng(), &g[i]);
    d.g.push_back(g);
    std::vector<float> topk_weights(d.num_tokens * d.top_k), row_weights(d.capacity),
        values(d.capacity);
    for (auto& w : topk_weights) w = draw(rng());
    std::vector<uint8_t> y(d.capacity * d.row_bytes);
    for (int64_t row = 0; row < d.capacity; ++row) {
      const bool valid = d.recv_src[r][row] >= 0;
      row_weights[row] = valid ? draw(rng()) : nan;
      values[row] = valid ? draw(rng()) : nan;
      for (int64_t h = 0; h < d.num_channels; ++h) {
        uint8_t* at = y.data() + row * d.row_bytes + h * type_bytes;
        write(rng(), at);
        if (!valid) WriteNumber(d.type, nan, at);  // never read
      }
    }
    d.topk_weights.push_back(topk_weights);
    d.row_weights.push_back(row_weights);
    d.values.push_back(values);
    d.y.push_back(y);
  }
}

void MakeResults(Data& d) {
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  const int type_bytes = TypeBytes(d.type);
  for (int r = 0; r < d.num_ranks; ++r) {
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

    // A lane of the kernel sums at most H / 32 + 8 products; then lanes add up in 5 steps. So many
    // roundings and one more, if products are not fused, are on the way of each product. A rounding
    // is off by 2^-24 of at most the sum of magnitudes, to first order (1% is for the second), or
    // by 2^-150 where it is subnormal.
    std::vector<uint8_t> d_y(d.capacity * d.row_bytes, 0);
    std::vector<double> d_weights(d.capacity, 0.0), bound(d.capacity, 0.0);
    for (int64_t row = 0; row < d.capacity; ++row) {
      const int64_t flat = d.recv_src[r][row];
      if (flat < 0) continue;
      const int64_t src = flat / ids_per_rank, token = flat % ids_per_rank / d.top_k;
      const uint8_t* g = d.g[src].data() + token * d.row_bytes;
      double magnitude = 0.0;
      for (int64_t at = 0; at < d.row_bytes; at += type_bytes) {
        const float cotangent = ReadNumber(d.type, g + at);
        const double number = ReadNumber(d.type, d.y[r].data() + row * d.row_bytes + at);
        const float product = d.row_weights[r][row] * cotangent;
        WriteNumber(d.type, product, d_y.data() + row * d.row_bytes + at);
        d_weights[row] += number * cotangent;
        magnitude += std::abs(number * cotangent);
      }
      const double roundings = static_cast<double>(d.num_channels) / 32 + 8 + 5 + 1;
      bound[row] = roundings * (1.01 * magnitude * 0x1p-24 + 0x1p-150);
    }
    d.d_y.push_back(d_y);
    d.d_weights.push_back(d_weights);
    d.d_weights_bound.push_back(bound);

    std::vector<uint8_t> out(d.num_tokens * d.row_bytes, 0);
    std::vector<float> collected(ids_per_rank, 0.0f);
    for (int64_t token = 0; token < d.num_tokens; ++token) {
      for (int64_t h = 0; h < d.num_channels; ++h) {
        float total = 0.0f;
        for (int q = 0; q < d.num_ranks; ++q) {
          float sum = 0.0f;
          bool any = false;
          for (int64_t k = 0; k < d.top_k; ++k) {
            const int32_t row = d.send_row[r][token * d.top_k + k];
            if (row < 0 || d.ids[r][token * d.top_k + k] / d.num_local != q) continue;
            any = true;
            if (h == 0) collected[token * d.top_k + k] = d.values[q][row];
            const float number =
                ReadNumber(d.type, d.y[q].data() + row * d.row_bytes + h * type_bytes);
            const float product = d.weighted ? d.row_weights[q][row] * number : number;
            sum = sum + product;
          }
          if (any) total = total + Rounded(d.type, sum);
        }
        WriteNumber(d.type, total, out.data() + token * d.row_bytes + h * type_bytes);
      }
    }
    d.out.push_back(out);
    d.collected.push_back(collected);
  }
}

Data MakeData(const Case& c, int num_ranks, uint64_t seed) {
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
  d.weighted = c.weighted;
  d.zero_tail = c.zero_tail;
  MakeIds(c, rng, d);
  MakeTables(c, d);
  MakeRows(rng, d);
  MakeResults(d);
  return d;
}

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
    error_[rank]->timeout_ns = timeout_ns;
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

  Buffer<int32_t> ids, send_row, recv_src, recv_order, recv_offsets, group_sizes, expert_counts,
      expert_load, counters;
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

// Layout, dispatch, combine and combine's gradient of one case, queued on all ranks without waiting in between; twice,
// so that the second time meets what the first one left in the control blocks.
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

// Rank 1 comes to the call of rank 0, as far as its start mail says, and does nothing more: the
// kernel, which is in the middle of its work, ends by its timeout and leaves NaN. One block has all
// units, so that every ring and table of it has been used several times.
void TestBreakOnTheWay() {
  enum Op { kDispatch, kCombine, kGradient };
  const Case c{700, 2, 2, 1, 64, RowType::kBF16, Routing::kUniform, 100, true, true};
  const Data d = MakeData(c, 2, 11);
  Buffers b(d, 0), other(d, 1);
  WriteTables(d, b);
  for (const Op op : {kDispatch, kCombine, kGradient}) {
    const Group group;  // of its own: it will be broken
    const GroupView view = group.View(0, 2, 5, kSecond / 2);
    b.tokens.Fill(0);
    b.weights.Fill(0);
    b.out.Fill(0);
    b.collected.Fill(0);
    b.d_y.Fill(0);
    b.d_weights.Fill(0);
    jax_ep::gpu::StartMail mail{};
    for (auto& shown : mail.shown) shown.epoch = 1;
    if (op == kDispatch) {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.tokens.get());
      mail.shown[1].value = reinterpret_cast<uint64_t>(other.weights.get());
    } else if (op == kCombine) {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.partial.get());
      mail.shown[1].value = reinterpret_cast<uint64_t>(other.collected.get());
    } else {
      mail.shown[0].value = reinterpret_cast<uint64_t>(other.d_y.get());
    }
    mail.shown[jax_ep::gpu::kNumAddresses].value = view.operation;
    CHECK_CUDA(cudaMemcpy(&view.control->start[view.peer[1].slot_here], &mail, sizeof(mail),
                          cudaMemcpyHostToDevice));
    CHECK_CUDA(cudaDeviceSynchronize());
    if (op == kCombine) {
      CHECK_CUDA(jax_ep::gpu::LaunchCombine(view, b.Combine(d), 1, group.stream(0)));
    } else {
      CHECK_CUDA(jax_ep::gpu::LaunchDispatch(view, op == kDispatch ? b.Dispatch(d) : b.Gradient(d),
                                             1, group.stream(0)));
    }
    CHECK_CUDA(cudaStreamSynchronize(group.stream(0)));
    const ErrorRecord& e = group.error(0);
    REQUIRE(e.valid == 1 && e.peer == 1 && e.phase == jax_ep::gpu::kProgress &&
                e.kind == static_cast<uint32_t>(op) + 1,
            "operation %d: kind %u, peer %d, phase %u", op, e.kind, e.peer, e.phase);
    if (op == kDispatch) {
      REQUIRE(AllOnes(b.tokens.Read(), d.type) && AllNan(b.weights.Read()), "dispatch: not NaN");
    } else if (op == kCombine) {
      REQUIRE(AllOnes(b.out.Read(), d.type) && AllNan(b.collected.Read()), "combine: not NaN");
    } else {
      REQUIRE(AllOnes(b.d_y.Read(), d.type) && AllNan(b.d_weights.Read()), "gradient: not NaN");
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
  b.tokens.Fill(0);
  b.weights.Fill(0);
  b.out.Fill(0);
  b.collected.Fill(0);
  b.d_y.Fill(0);
  b.d_weights.Fill(0);
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
  const std::vector<int32_t> src = b.recv_src.Read(), load = b.expert_load.Read();
  REQUIRE(std::all_of(src.begin(), src.end(), [](int32_t v) { return v == -1; }), "recv_src");
  REQUIRE(std::all_of(load.begin(), load.end(), [](int32_t v) { return v == 0; }), "expert_load");
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
  TestBreakOnTheWay();
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
