// Dispatch in fp8: rows that are quantised and stay so or are dequantised where they arrive, with
// both kinds of scales, and rows that come with scales; by dispatch on a layout, and in slots together
// with the layout. Results are poisoned before, so that padding and tail are seen to be written.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <set>
#include <vector>

#include "cuda/slots/units.h"
#include "tests/native/check_cuda.h"
#include "tests/native/fp8_oracle.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

// What a call takes and how its rows cross.
struct Fp8Call {
  DispatchMode mode;
  bool power_of_two_scales;
  int64_t num_scales;
  const std::vector<std::vector<uint8_t>>& x;                 // [R], rows
  const std::vector<std::vector<float>>* x_scales = nullptr;  // [R], with kScaled

  bool keeps_scales() const { return mode != DispatchMode::kDequantize; }
};

// One rank's operands and results.
struct Fp8Buffers {
  Fp8Buffers(const Data& d, const Fp8Call& call, int r)
      : x(call.x[r]),
        x_scales(call.x_scales != nullptr ? (*call.x_scales)[r] : std::vector<float>{}),
        rows(d.capacity * (call.keeps_scales() ? d.num_channels : d.row_bytes)),
        scales(call.keeps_scales() ? d.capacity * call.num_scales : 0),
        weights(d.capacity),
        landing(d.num_ranks * d.num_tokens * wire_row_bytes(d.num_channels, call.num_scales)) {}

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

bool FitsSlots(const Data& d, const Fp8Call& call) {
  const int64_t row_bytes = call.mode == DispatchMode::kScaled ? d.num_channels : d.row_bytes;
  return fits_slots({d.num_ranks, d.num_tokens, d.top_k, d.num_experts,
                     slot_row(call.mode, d.type, row_bytes, call.num_scales)},
                    kSlotAreaBytes);
}

// Of dispatch, or of both in slots.
template <typename Arguments>
void SetFp8(const Data& d, const Fp8Call& call, Fp8Buffers& b, Arguments& a) {
  a.x = b.x.get();
  a.mode = call.mode;
  a.type = d.type;
  a.num_scales = call.num_scales;
  a.power_of_two_scales = call.power_of_two_scales;
  if (call.mode == DispatchMode::kScaled) {
    a.row_bytes = d.num_channels;
    a.x_scales = b.x_scales.get();
  }
  a.tokens = b.rows.get();
  a.scales = call.keeps_scales() ? b.scales.get() : nullptr;
  a.weights = d.weighted ? b.weights.get() : nullptr;
}

// Calls twice on all ranks; `operation` tells calls of a case apart.
std::vector<std::unique_ptr<Fp8Buffers>> Run(const Group& group, const Data& d, const Fp8Call& call,
                                             std::vector<std::unique_ptr<Buffers>>& buffers,
                                             int num_sms, uint64_t seed, uint64_t operation,
                                             bool in_slots) {
  std::vector<std::unique_ptr<Fp8Buffers>> results;
  for (int r = 0; r < d.num_ranks; ++r) results.push_back(std::make_unique<Fp8Buffers>(d, call, r));
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < d.num_ranks; ++r) {
      Fp8Buffers& out = *results[r];
      out.Poison(group.stream(r));
      const GroupView view = group.View(r, d.num_ranks, seed * 8 + operation, 10 * kSecond);
      const cudaStream_t stream = group.stream(r);
      if (in_slots) {
        LayoutAndDispatchArguments a = buffers[r]->LayoutAndDispatch(d);
        SetFp8(d, call, out, a);
        CHECK_CUDA(LaunchLayoutAndDispatchInSlots(view, a, num_sms, stream));
        continue;
      }
      DispatchArguments a = buffers[r]->Dispatch(d);
      SetFp8(d, call, out, a);
      // Every case mixes ranks whose rows land elsewhere first with ranks whose do not.
      a.landing = (r + seed) % 2 == 0 ? out.landing.get() : nullptr;
      CHECK_CUDA(LaunchDispatch(view, a, num_sms, stream));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, d.num_ranks);
  for (int r = 0; r < d.num_ranks; ++r) {
    if (in_slots) CompareNotice(group, d, r);
    if (d.weighted) {
      Compare("weights beside fp8", r, results[r]->weights.Read(), d.weights[r],
              NumSpecified(d, r));
    }
    Compare("x of fp8", r, results[r]->x.Read(), call.x[r]);
  }
  return results;
}

void RunQuantizing(const Group& group, const Data& d, const Fp8Data& expected, DispatchMode mode,
                   bool power_of_two_scales, std::vector<std::unique_ptr<Buffers>>& buffers,
                   int num_sms, uint64_t seed, bool in_slots) {
  const int num_wrong_before = g_tally.num_wrong;
  const Fp8Call call{mode, power_of_two_scales, num_block_scales(d.num_channels), expected.x};
  if (in_slots && !FitsSlots(d, call)) return;
  const auto results =
      Run(group, d, call, buffers, num_sms, seed,
          5 + (call.keeps_scales() ? 0 : 1) + (power_of_two_scales ? 8192 : 0), in_slots);
  for (int r = 0; r < d.num_ranks; ++r) {
    const Fp8Buffers& out = *results[r];
    const int64_t num_specified = NumSpecified(d, r);
    if (call.keeps_scales()) {
      std::vector<uint8_t> numbers = out.rows.Read();
      MakeNansEqual(numbers);
      Compare("fp8 tokens", r, numbers, expected.numbers[r], num_specified * d.num_channels);
      Compare("fp8 scales", r, out.scales.Read(), expected.scales[r],
              num_specified * call.num_scales);
    } else {
      std::vector<uint8_t> rows = out.rows.Read(), right = expected.dequantized[r];
      rows.resize(num_specified * d.row_bytes);
      right.resize(num_specified * d.row_bytes);
      CompareNumbers("dequantised tokens", r, d.type, rows, right);
    }
  }
  if (g_tally.num_wrong != num_wrong_before) {
    PrintCase(d, power_of_two_scales ? "in fp8, scales powers of two" : "in fp8", num_sms);
  }
}

// Rows that come with scales; what is checked are bits.
void RunScaled(const Group& group, const Data& d, int64_t num_scales,
               std::vector<std::unique_ptr<Buffers>>& buffers, int num_sms, uint64_t seed,
               bool in_slots) {
  const int num_wrong_before = g_tally.num_wrong;
  const ScaledData expected = MakeScaledData(d, num_scales, seed);
  const Fp8Call call{DispatchMode::kScaled, false, num_scales, expected.x, &expected.x_scales};
  if (in_slots && !FitsSlots(d, call)) return;
  const auto results = Run(group, d, call, buffers, num_sms, seed,
                           7 + 8192 * static_cast<uint64_t>(num_scales), in_slots);
  for (int r = 0; r < d.num_ranks; ++r) {
    const int64_t num_specified = NumSpecified(d, r);
    Compare("tokens that come with scales", r, results[r]->rows.Read(), expected.tokens[r],
            num_specified * d.num_channels);
    Compare("scales that come with tokens", r, results[r]->scales.Read(), expected.scales[r],
            num_specified * num_scales);
    Compare("given scales", r, results[r]->x_scales.Read(), expected.x_scales[r]);
  }
  if (g_tally.num_wrong != num_wrong_before) {
    char what[64];
    std::snprintf(what, sizeof what, "in float8 with %d scales a row",
                  static_cast<int>(num_scales));
    PrintCase(d, what, num_sms);
  }
}

}  // namespace

bool HasFp8(const Data& d) {
  return d.num_channels % kRowAlignment == 0 && d.num_channels <= kMaxFp8Channels;
}

void RunFp8(const Group& group, const Data& d, int num_sms, uint64_t seed) {
  std::vector<std::unique_ptr<Buffers>> buffers;
  for (int r = 0; r < d.num_ranks; ++r) {
    buffers.push_back(std::make_unique<Buffers>(d, r));
    buffers[r]->WriteTables(d, r);
  }
  const std::vector<std::vector<uint8_t>> x = MakeFp8Rows(d, seed);
  for (const bool power_of_two_scales : {false, true}) {
    const Fp8Data expected = MakeFp8Data(d, x, power_of_two_scales);
    for (const DispatchMode mode : {DispatchMode::kQuantize, DispatchMode::kDequantize}) {
      for (const bool in_slots : {false, true}) {
        RunQuantizing(group, d, expected, mode, power_of_two_scales, buffers, num_sms, seed,
                      in_slots);
      }
    }
  }
  // One a row, one a block of 128 channels, and (mostly) a number that the copy engine takes.
  for (const int64_t num_scales :
       std::set<int64_t>{1, num_block_scales(d.num_channels), d.num_channels / 16}) {
    for (const bool in_slots : {false, true}) {
      RunScaled(group, d, num_scales, buffers, num_sms, seed, in_slots);
    }
  }
}

}  // namespace jax_ep::gpu::test
