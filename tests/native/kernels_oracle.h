// What layout, dispatch, combine and its gradient must give: cases, and their results by plain
// loops on the host.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_ORACLE_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_ORACLE_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace jax_ep::gpu::test {

// Types --------------------------------------------------------------------------------------

inline int TypeBytes(FloatType type) { return type == FloatType::kF32 ? 4 : 2; }

inline const char* TypeName(FloatType type) {
  return type == FloatType::kF32 ? "f32" : type == FloatType::kF16 ? "f16" : "bf16";
}

inline float ReadNumber(FloatType type, const uint8_t* at) {
  if (type == FloatType::kF32) {
    float x;
    std::memcpy(&x, at, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (type == FloatType::kF16) return __half2float(__half(__half_raw{bits}));
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{bits}));
}

inline void WriteNumber(FloatType type, float x, uint8_t* at) {
  if (type == FloatType::kF32) {
    std::memcpy(at, &x, 4);
  } else if (type == FloatType::kF16) {
    const __half h = __float2half_rn(x);
    std::memcpy(at, &h, 2);
  } else {
    const __nv_bfloat16 h = __float2bfloat16_rn(x);
    std::memcpy(at, &h, 2);
  }
}

inline float Rounded(FloatType type, float x) {
  uint8_t bytes[4];
  WriteNumber(type, x, bytes);
  return ReadNumber(type, bytes);
}

// Cases --------------------------------------------------------------------------------------

enum class Routing { kUniform, kOneExpert, kHoles, kSilentRank, kNowhere };

struct Case {
  int64_t num_tokens, top_k, experts_per_rank, alignment, num_channels;
  FloatType type;
  Routing routing;
  int capacity_percent;  // of the rows that arrive at the fullest rank, rounded up to alignment
  bool weighted, zero_tail;
  bool has_own_room = false;  // each expert; the percentage is then of the fullest expert's rows
};

// What all ranks send, and what all must get.
struct Data {
  int num_ranks;
  int64_t num_tokens, top_k, num_experts, num_local, alignment, capacity, num_channels, row_bytes;
  int64_t expert_capacity;  // 0 where experts share the capacity
  FloatType type;
  Routing routing;
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

// Rows of a rank's result that are specified: without zero_tail those of its experts.
inline int64_t NumSpecified(const Data& d, int rank) {
  if (d.zero_tail) return d.capacity;
  int64_t rows = 0;
  for (const int32_t size : d.group_sizes[rank]) rows += size;
  return rows;
}

inline void MakeIds(const Case& c, std::mt19937_64& rng, Data& d) {
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
inline void MakeTables(const Case& c, Data& d) {
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  const auto id_of = [&](int64_t flat) { return d.ids[flat / ids_per_rank][flat % ids_per_rank]; };
  std::vector<std::vector<int64_t>> rows_of(d.num_experts);
  for (int64_t flat = 0; flat < d.num_ranks * ids_per_rank; ++flat) {
    const int32_t id = id_of(flat);
    if (id >= 0 && id < d.num_experts) rows_of[id].push_back(flat);
  }
  const auto aligned = [&](int64_t rows) {
    return (rows + d.alignment - 1) / d.alignment * d.alignment;
  };
  int64_t fullest = 1, fullest_expert = 1;
  for (int r = 0; r < d.num_ranks; ++r) {
    int64_t rows = 0;
    for (int64_t e = r * d.num_local; e < (r + 1) * d.num_local; ++e) {
      const auto n = static_cast<int64_t>(rows_of[e].size());
      rows += aligned(n);
      fullest_expert = std::max(fullest_expert, n);
    }
    fullest = std::max(fullest, rows);
  }
  const auto part = [&](int64_t rows) {
    return aligned(std::max<int64_t>(1, rows * c.capacity_percent / 100));
  };
  d.expert_capacity = c.has_own_room ? part(fullest_expert) : 0;
  d.capacity = c.has_own_room ? d.num_local * d.expert_capacity : part(fullest);

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
      const int64_t room = c.has_own_room ? d.expert_capacity : d.capacity - offset;
      for (int64_t i = 0; i < n && i < room; ++i) {
        const int64_t flat = rows_of[e][i];
        src[offset + i] = static_cast<int32_t>(flat);
        d.send_row[flat / ids_per_rank][flat % ids_per_rank] = static_cast<int32_t>(offset + i);
      }
      const int64_t end = offset + (c.has_own_room ? d.expert_capacity : aligned(n));
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

inline void MakeRows(std::mt19937_64& rng, Data& d) {
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

// What dispatch leaves on rank r: rows and weights.
inline void MakeReceived(Data& d, int r) {
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
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

// Sums are of ranks, then of nodes of so many ranks.
inline void MakeResults(Data& d, int ranks_per_node) {
  const int64_t ids_per_rank = d.num_tokens * d.top_k;
  const int type_bytes = TypeBytes(d.type);
  for (int r = 0; r < d.num_ranks; ++r) {
    MakeReceived(d, r);

    // A lane of one of the kernel's seven helpers sums at most H / 224 + 8 products; then lanes add
    // up in 5 steps, and seven sums are added. So many roundings and one more, if products are not
    // fused, are on the way of each product. A rounding is off by 2^-24 of at most the sum of
    // magnitudes, to first order (1% is for the second), or by 2^-150 where it is subnormal.
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
      const double roundings = static_cast<double>(d.num_channels) / 224 + 8 + 5 + 7 + 1;
      bound[row] = roundings * (1.01 * magnitude * 0x1p-24 + 0x1p-150);
    }
    d.d_y.push_back(d_y);
    d.d_weights.push_back(d_weights);
    d.d_weights_bound.push_back(bound);

    std::vector<uint8_t> out(d.num_tokens * d.row_bytes, 0);
    std::vector<float> collected(ids_per_rank, 0.0f);
    for (int64_t token = 0; token < d.num_tokens; ++token) {
      for (int64_t h = 0; h < d.num_channels; ++h) {
        float total = 0.0f, of_node = 0.0f;
        for (int q = 0; q < d.num_ranks; ++q) {
          if (q % ranks_per_node == 0) of_node = 0.0f;
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
          if (any) of_node = of_node + Rounded(d.type, sum);
          if ((q + 1) % ranks_per_node == 0) total = total + Rounded(d.type, of_node);
        }
        WriteNumber(d.type, total, out.data() + token * d.row_bytes + h * type_bytes);
      }
    }
    d.out.push_back(out);
    d.collected.push_back(collected);
  }
}

// Random ids of a case, and the tables of its layout.
inline Data MakeLayoutData(const Case& c, int num_ranks, std::mt19937_64& rng) {
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
  return d;
}

// `ranks_per_node`: 0 if there is one node.
inline Data MakeData(const Case& c, int num_ranks, uint64_t seed, int ranks_per_node = 0) {
  std::mt19937_64 rng(seed);
  Data d = MakeLayoutData(c, num_ranks, rng);
  MakeRows(rng, d);
  MakeResults(d, ranks_per_node > 0 ? ranks_per_node : num_ranks);
  return d;
}

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_ORACLE_H_
