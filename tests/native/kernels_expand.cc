// Combine of rows that are not expanded, one for each (token, rank): what the gradient of a dispatch is
// that is not expanded. On the general way, and in slots.
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_forms.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

// Combine of a row for each (token, rank): NaN where there is none.
void RunSums(const Group& group, const Data& d,
             const std::vector<std::unique_ptr<Buffers>>& buffers, int num_sms, uint64_t seed,
             bool in_slots) {
  const int type_bytes = TypeBytes(d.type);
  const int64_t num_rows = d.num_ranks * d.num_tokens + 1;
  std::mt19937_64 rng(seed);
  std::vector<std::vector<uint8_t>> y(d.num_ranks);
  std::vector<std::unique_ptr<Buffer<uint8_t>>> on_device;
  for (int r = 0; r < d.num_ranks; ++r) {
    y[r].resize(num_rows * d.row_bytes);
    for (int64_t row = 0; row < num_rows; ++row) {
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

void RunSumsNotExpanded(const Group& group, const Data& d, int num_sms, uint64_t seed) {
  const int num_wrong_before = g_tally.num_wrong;
  std::vector<std::unique_ptr<Buffers>> buffers;
  for (int r = 0; r < d.num_ranks; ++r) {
    buffers.push_back(std::make_unique<Buffers>(d, r));
    buffers[r]->WriteTables(d, r);
  }
  RunSums(group, d, buffers, num_sms, seed, /*in_slots=*/false);
  if (FitsSlots(d, {})) RunSums(group, d, buffers, num_sms, seed, /*in_slots=*/true);
  if (g_tally.num_wrong != num_wrong_before) PrintCase(d, "sums, not expanded", num_sms);
}

}  // namespace jax_ep::gpu::test
