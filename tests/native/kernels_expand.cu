// Dispatch that is not expanded, a row for each (token, rank): rows as they are and in every form of
// fp8, and its gradient, combine of such rows; in slots too, rows as they are. Results are poisoned
// before, so that gaps are seen to be zeroed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "cuda/slots/units.h"
#include "tests/native/check_cuda.h"
#include "tests/native/fp8_oracle.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

int64_t NumRows(const Data& d) { return d.num_ranks * d.num_tokens + 1; }

// Whether a row of rank r holds a token.
bool HoldsToken(const Data& d, int r, int64_t row) {
  return row < NumRows(d) - 1 && d.recv_offsets[r][row] != d.recv_offsets[r][row + 1];
}

// Rank r's rows that are not expanded, from expert rows of so many numbers.
template <typename T>
std::vector<T> NotExpanded(const Data& d, int r, const std::vector<T>& rows, int64_t row_size) {
  std::vector<T> result(NumRows(d) * row_size, T{0});
  for (int64_t row = 0; row < d.capacity; ++row) {
    const int64_t flat = d.recv_src[r][row];
    if (flat < 0) continue;
    std::copy_n(&rows[row * row_size], row_size, &result[flat / d.top_k * row_size]);
  }
  return result;
}

// What a rank got, with zeros where anything may be: without zero_tail, in gaps.
template <typename T>
std::vector<T> Specified(const Data& d, int r, std::vector<T> rows, int64_t row_size) {
  for (int64_t row = 0; row + 1 < NumRows(d) && !d.zero_tail; ++row) {
    if (!HoldsToken(d, r, row)) std::fill_n(&rows[row * row_size], row_size, T{0});
  }
  return rows;
}

// What a call takes and how its rows cross; num_scales: 0 if as they are.
struct Call {
  DispatchMode mode;
  const std::vector<std::vector<uint8_t>>& x;  // [R], rows
  int64_t num_scales = 0;
  const std::vector<std::vector<float>>* x_scales = nullptr;  // [R], with kScaled

  bool keeps_scales() const { return num_scales > 0 && mode != DispatchMode::kDequantize; }
};

// One rank's operands and results.
struct RankBuffers {
  RankBuffers(const Data& d, const Call& call, int r)
      : x(call.x[r]),
        x_scales(call.x_scales != nullptr ? (*call.x_scales)[r] : std::vector<float>{}),
        rows(NumRows(d) * (call.keeps_scales() ? d.num_channels : d.row_bytes)),
        scales(call.keeps_scales() ? NumRows(d) * call.num_scales : 0),
        weights(d.capacity),
        landing(d.num_ranks * d.num_tokens *
                WireRowBytes(d.row_bytes, d.num_channels, call.num_scales)) {}

  void Poison(cudaStream_t stream) {
    rows.Fill(0xff, stream);
    scales.Fill(0xff, stream);
    weights.Fill(0xff, stream);
    landing.Fill(0xff, stream);
  }

  Buffer<uint8_t> x;
  Buffer<float> x_scales;
  Buffer<uint8_t> rows;
  Buffer<float> scales, weights;
  Buffer<uint8_t> landing;
};

using Ranks = std::vector<std::unique_ptr<Buffers>>;

// Twice, so that the second time meets what the first one left in control blocks.
std::vector<std::unique_ptr<RankBuffers>> Dispatch(const Group& group, const Data& d,
                                                   const Call& call, const Ranks& buffers,
                                                   int num_sms, uint64_t seed) {
  std::vector<std::unique_ptr<RankBuffers>> results;
  for (int r = 0; r < d.num_ranks; ++r) {
    results.push_back(std::make_unique<RankBuffers>(d, call, r));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < d.num_ranks; ++r) {
      RankBuffers& out = *results[r];
      out.Poison(group.stream(r));
      DispatchArguments a = buffers[r]->Dispatch(d);
      a.mode = call.mode;
      a.x = out.x.get();
      a.num_scales = call.num_scales;
      if (call.mode == DispatchMode::kScaled) {
        a.row_bytes = d.num_channels;
        a.x_scales = out.x_scales.get();
      }
      a.tokens = out.rows.get();
      a.scales = call.keeps_scales() ? out.scales.get() : nullptr;
      a.weights = d.weighted ? out.weights.get() : nullptr;
      a.num_rows = NumRows(d);
      a.expand = false;
      // Every case mixes ranks whose rows land elsewhere first with ranks whose do not.
      a.landing = (r + seed) % 2 == 0 ? out.landing.get() : nullptr;
      const uint64_t operation = seed * 8 + static_cast<uint64_t>(call.mode);
      const GroupView view = group.View(r, d.num_ranks, operation, 10 * kSecond);
      CHECK_CUDA(LaunchDispatch(view, a, num_sms, group.stream(r)));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, d.num_ranks);
  for (int r = 0; r < d.num_ranks && d.weighted; ++r) {
    Compare("weights beside tokens", r, results[r]->weights.Read(), d.weights[r],
            NumSpecified(d, r));
  }
  return results;
}

bool FitsSlots(const Data& d) {
  return fits_slots({d.num_ranks, d.num_tokens, d.top_k, d.num_experts, {d.row_bytes}},
                    kSlotAreaBytes);
}

// Twice, as above. The tables, which are made too, kernels_slots.cu compares.
void RunCopyInSlots(const Group& group, const Data& d, const Ranks& buffers, int num_sms,
                    uint64_t seed) {
  std::vector<std::unique_ptr<RankBuffers>> results;
  for (int r = 0; r < d.num_ranks; ++r) {
    results.push_back(std::make_unique<RankBuffers>(d, Call{DispatchMode::kCopy, d.x}, r));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < d.num_ranks; ++r) {
      RankBuffers& out = *results[r];
      out.Poison(group.stream(r));
      LayoutAndDispatchArguments a = buffers[r]->LayoutAndDispatch(d);
      a.x = out.x.get();
      a.tokens = out.rows.get();
      a.weights = d.weighted ? out.weights.get() : nullptr;
      a.num_rows = NumRows(d);
      a.expand = false;
      const GroupView view = group.View(r, d.num_ranks, seed * 8 + 6, 10 * kSecond);
      CHECK_CUDA(LaunchLayoutAndDispatchInSlots(view, a, num_sms, group.stream(r)));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, d.num_ranks);
  for (int r = 0; r < d.num_ranks; ++r) {
    CompareNotice(group, d, r);
    Compare("tokens in slots, not expanded", r,
            Specified(d, r, results[r]->rows.Read(), d.row_bytes),
            NotExpanded(d, r, d.tokens[r], d.row_bytes));
    if (!d.weighted) continue;
    Compare("weights beside tokens in slots", r, results[r]->weights.Read(), d.weights[r],
            NumSpecified(d, r));
  }
}

void RunCopy(const Group& group, const Data& d, const Ranks& buffers, int num_sms, uint64_t seed) {
  const auto results = Dispatch(group, d, {DispatchMode::kCopy, d.x}, buffers, num_sms, seed);
  for (int r = 0; r < d.num_ranks; ++r) {
    Compare("tokens, not expanded", r, Specified(d, r, results[r]->rows.Read(), d.row_bytes),
            NotExpanded(d, r, d.tokens[r], d.row_bytes));
  }
}

void RunQuantized(const Group& group, const Data& d, const Ranks& buffers, int num_sms,
                  uint64_t seed) {
  const Fp8Data expected = MakeFp8Data(d, MakeFp8Rows(d, seed), /*power_of_two_scales=*/false);
  const int64_t num_scales = num_block_scales(d.num_channels);
  auto results =
      Dispatch(group, d, {DispatchMode::kQuantize, expected.x, num_scales}, buffers, num_sms, seed);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> numbers = Specified(d, r, results[r]->rows.Read(), d.num_channels);
    MakeNansEqual(numbers);
    Compare("fp8 tokens, not expanded", r, numbers,
            NotExpanded(d, r, expected.numbers[r], d.num_channels));
    Compare("fp8 scales, not expanded", r, Specified(d, r, results[r]->scales.Read(), num_scales),
            NotExpanded(d, r, expected.scales[r], num_scales));
  }
  results = Dispatch(group, d, {DispatchMode::kDequantize, expected.x, num_scales}, buffers,
                     num_sms, seed);
  for (int r = 0; r < d.num_ranks; ++r) {
    CompareNumbers("dequantised tokens, not expanded", r, d.type,
                   Specified(d, r, results[r]->rows.Read(), d.row_bytes),
                   NotExpanded(d, r, expected.dequantized[r], d.row_bytes));
  }
}

// One scale a row, which is not for the copy engine.
void RunScaled(const Group& group, const Data& d, const Ranks& buffers, int num_sms,
               uint64_t seed) {
  const ScaledData expected = MakeScaledData(d, /*num_scales=*/1, seed);
  const auto results = Dispatch(
      group, d, {DispatchMode::kScaled, expected.x, 1, &expected.x_scales}, buffers, num_sms, seed);
  for (int r = 0; r < d.num_ranks; ++r) {
    Compare("tokens with scales, not expanded", r,
            Specified(d, r, results[r]->rows.Read(), d.num_channels),
            NotExpanded(d, r, expected.tokens[r], d.num_channels));
    // As bits: some are NaN.
    Compare("given scales, not expanded", r, Specified(d, r, results[r]->scales.Read(), 1),
            NotExpanded(d, r, expected.scales[r], 1));
  }
}

// Combine of a row for each (token, rank): NaN where there is none.
void RunGradient(const Group& group, const Data& d, const Ranks& buffers, int num_sms,
                 uint64_t seed, bool in_slots) {
  const int type_bytes = TypeBytes(d.type);
  std::mt19937_64 rng(seed);
  std::vector<std::vector<uint8_t>> y(d.num_ranks);
  std::vector<std::unique_ptr<Buffer<uint8_t>>> on_device;
  for (int r = 0; r < d.num_ranks; ++r) {
    y[r].resize(NumRows(d) * d.row_bytes);
    for (int64_t row = 0; row < NumRows(d); ++row) {
      for (int64_t h = 0; h < d.num_channels; ++h) {
        const auto whole = static_cast<int32_t>(static_cast<uint32_t>(rng()));
        const float number = HoldsToken(d, r, row) ? std::ldexp(static_cast<float>(whole), -31)
                                                   : std::numeric_limits<float>::quiet_NaN();
        WriteNumber(d.type, number, &y[r][row * d.row_bytes + h * type_bytes]);
      }
    }
    on_device.push_back(std::make_unique<Buffer<uint8_t>>(y[r]));
  }
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < d.num_ranks; ++r) {
      Buffers& b = *buffers[r];
      b.out.Fill(0xff, group.stream(r));
      b.partial.Fill(0xff, group.stream(r));
      b.collected.Fill(0xff, group.stream(r));
      CombineArguments a = b.Combine(d);
      a.y = on_device[r]->get();
      a.weights = nullptr;
      a.expand = false;
      const GroupView view = group.View(r, d.num_ranks, seed * 8 + 7, 10 * kSecond);
      const auto launch = in_slots ? LaunchCombineInSlots : LaunchCombine;
      CHECK_CUDA(launch(view, a, num_sms, group.stream(r)));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, d.num_ranks);
  for (int r = 0; r < d.num_ranks; ++r) {
    std::vector<uint8_t> out(d.num_tokens * d.row_bytes);
    for (int64_t t = 0; t < d.num_tokens; ++t) {
      const int64_t row = r * d.num_tokens + t;
      for (int64_t at = 0; at < d.row_bytes; at += type_bytes) {
        float total = 0.0f;
        for (int q = 0; q < d.num_ranks; ++q) {
          if (HoldsToken(d, q, row)) {
            total = total + ReadNumber(d.type, &y[q][row * d.row_bytes + at]);
          }
        }
        WriteNumber(d.type, total, &out[t * d.row_bytes + at]);
      }
    }
    CompareNumbers("sums of rows, not expanded", r, d.type, buffers[r]->out.Read(), out);
    if (d.weighted) {
      Compare("collected beside sums", r, buffers[r]->collected.Read(), d.collected[r]);
    }
  }
}

}  // namespace

void RunNotExpanded(const Group& group, const Data& d, int num_sms, uint64_t seed) {
  const int num_wrong_before = g_tally.num_wrong;
  Ranks buffers;
  for (int r = 0; r < d.num_ranks; ++r) {
    buffers.push_back(std::make_unique<Buffers>(d, r));
    buffers[r]->WriteTables(d, r);
  }
  RunCopy(group, d, buffers, num_sms, seed);
  if (HasFp8(d)) {
    RunQuantized(group, d, buffers, num_sms, seed);
    RunScaled(group, d, buffers, num_sms, seed);
  }
  RunGradient(group, d, buffers, num_sms, seed, /*in_slots=*/false);
  if (FitsSlots(d)) {
    RunCopyInSlots(group, d, buffers, num_sms, seed);
    RunGradient(group, d, buffers, num_sms, seed, /*in_slots=*/true);
  }
  if (g_tally.num_wrong != num_wrong_before) PrintCase(d, "not expanded, in", num_sms);
}

}  // namespace jax_ep::gpu::test
