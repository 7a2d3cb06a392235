// Dispatch in fp8: rows stay quantised or are dequantised where they arrive, with both kinds of
// scales. Results are poisoned before, so that padding and tail are seen to be written.
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "tests/native/check_cuda.h"
#include "tests/native/fp8_oracle.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

// One rank's results of one call in fp8.
struct Results {
  Results(const Data& d, bool keeps_fp8)
      : rows(d.capacity * (keeps_fp8 ? d.num_channels : d.row_bytes)),
        scales(keeps_fp8 ? d.capacity * d.num_channels / kScaleBlock : 0),
        weights(d.capacity),
        landing(d.num_ranks * d.num_tokens * WireRowBytes(d.num_channels)) {}

  void Poison(cudaStream_t stream) {
    rows.Fill(0xff, stream);
    scales.Fill(0xff, stream);
    weights.Fill(0xff, stream);
    landing.Fill(0xff, stream);
  }

  Buffer<uint8_t> rows;
  Buffer<float> scales, weights;
  Buffer<uint8_t> landing;
};

// A NaN is a NaN, whatever its sign.
void MakeNansEqual(std::vector<uint8_t>& numbers) {
  for (uint8_t& code : numbers) {
    if ((code & 0x7f) == kFp8Nan) code = kFp8Nan;
  }
}

void RunMode(const Group& group, const Data& d, const Fp8Data& expected, DispatchMode mode,
             bool power_of_two_scales, std::vector<std::unique_ptr<Buffers>>& buffers, int num_sms,
             uint64_t seed) {
  const int num_wrong_before = g_tally.num_wrong;
  const bool keeps_fp8 = mode == DispatchMode::kQuantize;
  std::vector<std::unique_ptr<Results>> results;
  std::vector<std::unique_ptr<Buffer<uint8_t>>> x;
  for (int r = 0; r < d.num_ranks; ++r) {
    results.push_back(std::make_unique<Results>(d, keeps_fp8));
    x.push_back(std::make_unique<Buffer<uint8_t>>(expected.x[r]));
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  for (int round = 0; round < 2; ++round) {
    for (int r = 0; r < d.num_ranks; ++r) {
      Results& out = *results[r];
      out.Poison(group.stream(r));
      const GroupView view = group.View(
          r, d.num_ranks, seed * 8 + 5 + (keeps_fp8 ? 0 : 1) + (power_of_two_scales ? 8192 : 0),
          10 * kSecond);
      DispatchArguments a = buffers[r]->Dispatch(d);
      a.x = x[r]->get();
      a.mode = mode;
      a.type = d.type;
      a.power_of_two_scales = power_of_two_scales;
      a.tokens = out.rows.get();
      a.scales = keeps_fp8 ? out.scales.get() : nullptr;
      a.weights = d.weighted ? out.weights.get() : nullptr;
      // Every case mixes ranks whose rows land elsewhere first with ranks whose do not.
      a.landing = (r + seed) % 2 == 0 ? out.landing.get() : nullptr;
      CHECK_CUDA(LaunchDispatch(view, a, num_sms, group.stream(r)));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, d.num_ranks);
  for (int r = 0; r < d.num_ranks; ++r) {
    const Results& out = *results[r];
    const int64_t num_specified = NumSpecified(d, r);
    if (keeps_fp8) {
      std::vector<uint8_t> numbers = out.rows.Read();
      MakeNansEqual(numbers);
      Compare("fp8 tokens", r, numbers, expected.numbers[r], num_specified * d.num_channels);
      Compare("fp8 scales", r, out.scales.Read(), expected.scales[r],
              num_specified * d.num_channels / kScaleBlock);
    } else {
      std::vector<uint8_t> rows = out.rows.Read(), right = expected.dequantized[r];
      rows.resize(num_specified * d.row_bytes);
      right.resize(num_specified * d.row_bytes);
      CompareNumbers("dequantised tokens", r, d.type, rows, right);
    }
    if (d.weighted) {
      Compare("weights beside fp8", r, out.weights.Read(), d.weights[r], num_specified);
    }
    Compare("x of fp8", r, x[r]->Read(), expected.x[r]);
  }
  if (g_tally.num_wrong != num_wrong_before) {
    PrintCase(d, power_of_two_scales ? "in fp8, scales powers of two" : "in fp8", num_sms);
  }
}

}  // namespace

bool HasFp8(const Data& d) {
  return d.num_channels % kScaleBlock == 0 && d.num_channels <= kMaxFp8Channels;
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
      RunMode(group, d, expected, mode, power_of_two_scales, buffers, num_sms, seed);
    }
  }
}

}  // namespace jax_ep::gpu::test
