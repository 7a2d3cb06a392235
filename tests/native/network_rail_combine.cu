// Part of network_rails: combine, against plain loops in the order of the specification.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cuda/network/rail/combine.cuh"
#include "tests/native/call_arguments.h"
#include "tests/native/kernels_forms.h"
#include "tests/native/network_rails.h"

namespace jax_ep::gpu::test {
namespace {

// Both signs, magnitudes from almost 0 to 16; some subnormal, some -0.
float AnyNumber(std::mt19937_64& rng) {
  const uint64_t bits = rng();
  const auto whole = static_cast<int32_t>(static_cast<uint32_t>(bits));
  const float number =
      std::ldexp(static_cast<float>(whole), -34 + static_cast<int>(bits >> 32 & 7));
  return bits >> 60 == 0 ? number * 1e-39f : bits >> 59 == 2 ? -0.0f : number;
}

// What ranks sum, and must get: rows as they are expanded, or one for each token.
struct SumData : Data {
  bool expand = true;

  int64_t num_rows() const { return expand ? capacity : num_ranks * num_tokens + 1; }
  bool has_row(int rank, int64_t row) const {
    return expand ? recv_src[rank][row] >= 0 : HoldsToken(*this, rank, row);
  }
};

// Rows that hold none are NaN, which must not be read.
void MakeOperands(SumData& d, std::mt19937_64& rng) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int type_bytes = TypeBytes(d.type);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> y(d.num_rows() * d.row_bytes);
    std::vector<float> row_weights(d.capacity), values(d.capacity);
    for (int64_t row = 0; row < d.capacity; ++row) {
      const bool is_valid = d.recv_src[r][row] >= 0;
      row_weights[row] = is_valid ? AnyNumber(rng) : nan;
      values[row] = is_valid ? AnyNumber(rng) : nan;
    }
    for (int64_t row = 0; row < d.num_rows(); ++row) {
      const bool is_valid = d.has_row(r, row);
      for (int64_t at = 0; at < d.row_bytes; at += type_bytes) {
        WriteNumber(d.type, is_valid ? AnyNumber(rng) : nan, y.data() + row * d.row_bytes + at);
      }
    }
    d.y.push_back(y);
    d.row_weights.push_back(row_weights);
    d.values.push_back(values);
  }
}

void MakeSums(SumData& d, int ranks_per_node) {
  const int type_bytes = TypeBytes(d.type);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> out(d.num_tokens * d.row_bytes);
    std::vector<float> collected(d.num_tokens * d.top_k, 0.0f);
    for (int64_t token = 0; token < d.num_tokens; ++token) {
      // In the order of ranks, then of k: where its rows begin, and what they are multiplied by.
      struct Part {
        int rank;
        const uint8_t* row;
        float weight;
      };
      std::vector<Part> parts;
      for (int64_t k = 0; k < d.top_k; ++k) {
        const int64_t flat = token * d.top_k + k;
        const int32_t row = d.send_row[r][flat];
        if (row < 0) continue;
        const auto q = static_cast<int>(d.ids[r][flat] / d.num_local);
        collected[flat] = d.values[q][row];
        parts.push_back(
            {q, d.y[q].data() + row * d.row_bytes, d.weighted ? d.row_weights[q][row] : 1.0f});
      }
      std::stable_sort(parts.begin(), parts.end(),
                       [](const Part& a, const Part& b) { return a.rank < b.rank; });
      if (!d.expand) {  // one of each rank
        parts.erase(std::unique(parts.begin(), parts.end(),
                                [](const Part& a, const Part& b) { return a.rank == b.rank; }),
                    parts.end());
        for (Part& part : parts) {
          part = {part.rank, d.y[part.rank].data() + (r * d.num_tokens + token) * d.row_bytes,
                  1.0f};
        }
      }
      for (int64_t at = 0; at < d.row_bytes; at += type_bytes) {
        float total = 0.0f;
        for (size_t i = 0; i < parts.size();) {
          const int node = parts[i].rank / ranks_per_node;
          float of_node = 0.0f;
          while (i < parts.size() && parts[i].rank / ranks_per_node == node) {
            const int rank = parts[i].rank;
            float of_rank = 0.0f;
            for (; i < parts.size() && parts[i].rank == rank; ++i) {
              const float product = parts[i].weight * ReadNumber(d.type, parts[i].row + at);
              of_rank = of_rank + product;
            }
            of_node = of_node + Rounded(d.type, of_rank);
          }
          total = total + Rounded(d.type, of_node);
        }
        WriteNumber(d.type, total, out.data() + token * d.row_bytes + at);
      }
    }
    d.out.push_back(out);
    d.collected.push_back(collected);
  }
}

SumData MakeCombineData(const Case& c, const JobShape& shape, uint64_t seed, bool expand = true) {
  std::mt19937_64 rng(seed);
  SumData d;
  static_cast<Data&>(d) = MakeLayoutData(c, shape.num_ranks, rng);
  d.expand = expand;
  MakeOperands(d, rng);
  MakeSums(d, shape.ranks_per_node);
  return d;
}

struct CombineBuffers {
  CombineBuffers(const Data& d, const JobShape& shape, int r)
      : ids(d.ids[r]),
        send_row(d.send_row[r]),
        recv_src(d.recv_src[r]),
        recv_order(d.recv_order[r]),
        recv_offsets(d.recv_offsets[r]),
        y(d.y[r]),
        scratch(static_cast<size_t>(rail::CombineScratch{
            shape.num_nodes(), shape.ranks_per_node, d.num_tokens, d.top_k, d.row_bytes, d.weighted}
                                        .num_bytes())),
        out(d.num_tokens * d.row_bytes),
        row_weights(d.row_weights[r]),
        values(d.values[r]),
        collected(d.num_tokens * d.top_k) {}

  CombineArguments Arguments(const SumData& d) {
    CallBuffers<uint8_t> b{};
    b.ids = ids.get();
    b.send_row = send_row.get();
    b.recv_src = recv_src.get();
    b.recv_order = recv_order.get();
    b.recv_offsets = recv_offsets.get();
    b.y = y.get();
    b.partial = scratch.get();
    b.out = out.get();
    CombineArguments a = CombineOf(Buffers::Sizes(d), b);
    a.expand = d.expand;
    if (d.weighted) {
      a.weights = d.expand ? row_weights.get() : nullptr;
      a.values = values.get();
      a.collected = collected.get();
    }
    return a;
  }

  Buffer<int32_t> ids, send_row, recv_src, recv_order, recv_offsets;
  Buffer<uint8_t> y, scratch, out;
  Buffer<float> row_weights, values, collected;
};

void Launch(Job& job, int rank, CombineBuffers& buffers, const SumData& d, uint64_t operation,
            Fault fault = Fault::kNone) {
  CHECK_CUDA(LaunchRailCombine(job.View(rank, operation), job.Rail(rank), job.HopOf(rank, fault),
                               buffers.Arguments(d), BlocksOf(job.shape(), operation),
                               job.stream(rank)));
}

// How many rows of a rank's result are wrong; says of the first ones of a run what they are made of.
int NumWrongRows(const Data& d, int rank, int call, const CombineBuffers& b, int& num_to_print) {
  const std::vector<uint8_t> out = b.out.Read();
  const std::vector<float> collected = b.collected.Read();
  const int type_bytes = TypeBytes(d.type);
  int num_wrong = 0;
  for (int64_t token = 0; token < d.num_tokens; ++token) {
    int64_t num_numbers = 0, first = 0;
    for (int64_t at = token * d.row_bytes; at < (token + 1) * d.row_bytes; at += type_bytes) {
      const uint8_t *got = &out[at], *right = &d.out[rank][at];
      if (std::memcmp(got, right, type_bytes) == 0) continue;
      if (std::isnan(ReadNumber(d.type, got)) && std::isnan(ReadNumber(d.type, right))) continue;
      if (num_numbers++ == 0) first = at;
    }
    int64_t num_values = 0;
    for (int64_t i = token * d.top_k; i < (token + 1) * d.top_k && d.weighted; ++i) {
      num_values += std::memcmp(&collected[i], &d.collected[rank][i], sizeof(float)) != 0;
    }
    if (num_numbers + num_values == 0) continue;
    ++num_wrong;
    if (num_to_print-- <= 0) continue;
    std::printf("  call %d, rank %d, token %lld: %lld of %lld numbers wrong, ", call, rank,
                static_cast<long long>(token), static_cast<long long>(num_numbers),
                static_cast<long long>(d.num_channels));
    if (num_numbers > 0) {
      std::printf("the first at %lld: %g, right %g; ",
                  static_cast<long long>((first - token * d.row_bytes) / type_bytes),
                  ReadNumber(d.type, &out[first]), ReadNumber(d.type, &d.out[rank][first]));
    }
    std::printf("%lld values wrong; rows on ranks", static_cast<long long>(num_values));
    for (int64_t k = 0; k < d.top_k; ++k) {
      const int64_t flat = token * d.top_k + k;
      if (d.send_row[rank][flat] < 0) continue;
      std::printf(" %lld", static_cast<long long>(d.ids[rank][flat] / d.num_local));
    }
    std::printf("\n");
  }
  return num_wrong;
}

void RunCombine(Group& group, const JobShape& shape, const NetworkModel& model, int num_calls,
                Fault fault = Fault::kNone) {
  if (g_num_failed >= kEnoughFailures) return;
  const bool is_control = fault != Fault::kNone;
  std::mt19937_64 rng(model.seed * 104729 + static_cast<uint64_t>(shape.num_ranks) * 31 +
                      static_cast<uint64_t>(shape.ranks_per_node));
  Job job(group, shape, model, is_control ? kSecond : 8 * kSecond);
  std::vector<SumData> data;
  std::vector<std::vector<std::unique_ptr<CombineBuffers>>> buffers(static_cast<size_t>(num_calls));
  for (int call = 0; call < num_calls; ++call) {
    Case c = CaseOfControls();
    if (!is_control) {
      c = AnyCase(rng, shape.slot_bytes);
      if (rng() % 4 == 0) c.type = FloatType::kF16;
      // Plain loops over every number take a while.
      c.num_tokens = std::min<int64_t>(c.num_tokens, c.num_channels > 600 ? 12 : 100);
    }
    data.push_back(MakeCombineData(c, shape, rng(), is_control || rng() % 3 != 0));
    for (int r = 0; r < shape.num_ranks; ++r) {
      buffers[call].push_back(std::make_unique<CombineBuffers>(data[call], shape, r));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto launched = Clock::now();
  RunCalls(job, num_calls, rng, [&](int r, int call) {
    Launch(job, r, *buffers[call][r], data[call], model.seed * 1000 + static_cast<uint64_t>(call),
           fault);
  });
  const double seconds = SecondsSince(launched);
  int num_wrong = 0, num_to_print = is_control ? 0 : 12;
  for (int call = 0; call < num_calls; ++call) {
    const int before = num_wrong;
    for (int r = 0; r < shape.num_ranks; ++r) {
      num_wrong += NumWrongRows(data[call], r, call, *buffers[call][r], num_to_print);
    }
    if (num_wrong == before || is_control) continue;
    const SumData& d = data[call];
    std::printf(
        "  call %d: %d rows wrong; T %lld, K %lld, L %lld, C %lld, H %lld %s, routing %d, %s\n",
        call, num_wrong - before, static_cast<long long>(d.num_tokens),
        static_cast<long long>(d.top_k), static_cast<long long>(d.num_local),
        static_cast<long long>(d.capacity), static_cast<long long>(d.num_channels),
        TypeName(d.type), static_cast<int>(d.routing),
        !d.expand    ? "not expanded"
        : d.weighted ? "weighted"
                     : "plain");
  }
  ReportCalls(job, model, "combine", fault, num_calls, num_wrong, seconds);
}

// A rank that never comes: all others end within the timeout of one, and their results say so.
void RunCombineWithoutOne(Group& group, const JobShape& shape, const NetworkModel& model,
                          Fault fault = Fault::kNone) {
  if (g_num_failed >= kEnoughFailures) return;
  const int missing = shape.num_ranks - 1;
  Job job(group, shape, model, kNearTimeoutNs, kFarTimeoutNs);
  const SumData d = MakeCombineData(CaseOfControls(), shape, model.seed);
  std::vector<std::unique_ptr<CombineBuffers>> buffers;
  for (int r = 0; r < shape.num_ranks; ++r) {
    buffers.push_back(std::make_unique<CombineBuffers>(d, shape, r));
    buffers[r]->out.Fill(0);
    buffers[r]->collected.Fill(0);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const auto start = Clock::now();
  for (int r = 0; r < missing; ++r) Launch(job, r, *buffers[r], d, model.seed, fault);
  job.Synchronize();
  const double seconds = SecondsSince(start);
  int num_wrong = 0;
  for (int r = 0; r < missing; ++r) {
    const std::vector<float> collected = buffers[r]->collected.Read();
    const std::vector<uint8_t> out = buffers[r]->out.Read();
    bool is_right = HasHeard(job, r) && std::all_of(collected.begin(), collected.end(),
                                                    [](float v) { return std::isnan(v); });
    for (size_t i = 0; i < out.size() && is_right; i += TypeBytes(d.type)) {
      is_right = std::isnan(ReadNumber(d.type, out.data() + i));
    }
    num_wrong += !is_right;
  }
  ReportWithoutOne(job, model, "combine", fault, num_wrong, seconds);
}

}  // namespace

void TestRailCombine(Group& group, bool is_small) {
  CHECK_CUDA(PrepareRailCombine<FaultyHop>());
  RunJobs(
      is_small,
      [&](const JobShape& shape, const NetworkModel& model, int num_calls) {
        RunCombine(group, shape, model, num_calls);
      },
      [&](const JobShape& shape, const NetworkModel& model) {
        RunCombine(group, shape, model, 2, Fault::kHeadFirst);
        RunCombine(group, shape, model, 1, Fault::kWithoutCredit);
      });
  for (const JobShape& shape : FailureJobs())
    RunCombineWithoutOne(group, shape, NetworkModels(1)[1]);
  RunCombineWithoutOne(group, FailureJobs().back(), NetworkModels(1)[1], Fault::kNotTold);
}

}  // namespace jax_ep::gpu::test
