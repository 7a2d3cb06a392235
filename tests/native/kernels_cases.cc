// Rows as they are, in every kind of case: layout, dispatch, combine and combine's gradient.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_test.h"

namespace jax_ep::gpu::test {
namespace {

// The gradient of combine takes shorter rows than the others.
bool HasGradient(const Data& d) { return d.row_bytes <= kMaxWeightedRowBytes; }

}  // namespace

void RequireNoError(const Group& group, int num_ranks) {
  for (int r = 0; r < num_ranks; ++r) {
    const ErrorRecord& e = group.error(r);
    if (e.valid == 0) continue;
    std::printf("rank %d: kind %u waited for rank %d, phase %u, expected %llu, seen %llu\n", r,
                e.kind, e.peer_slot, e.phase, static_cast<unsigned long long>(e.expected_epoch),
                static_cast<unsigned long long>(e.seen_epoch));
    std::exit(1);
  }
}

void PrintCase(const Data& d, const char* what, int num_sms) {
  std::printf(
      "  %s: R %d, T %lld, K %lld, E %lld, A %lld, C %lld, M %lld, H %lld %s, routing %d, %s, %s, "
      "%d SMs\n",
      what, d.num_ranks, static_cast<long long>(d.num_tokens), static_cast<long long>(d.top_k),
      static_cast<long long>(d.num_experts), static_cast<long long>(d.alignment),
      static_cast<long long>(d.capacity), static_cast<long long>(d.expert_capacity),
      static_cast<long long>(d.num_channels), TypeName(d.type), static_cast<int>(d.routing),
      d.weighted ? "weighted" : "plain", d.zero_tail ? "zero tail" : "any tail", num_sms);
}

void CompareNotice(const Group& group, const Data& d, int rank) {
  const int32_t num_invalid = d.counters[rank][2];
  const uint64_t expected =
      num_invalid == 0 ? 0 : invalid_ids_of(rank, static_cast<int32_t>(d.num_experts), num_invalid);
  Compare("invalid_ids", rank, std::vector<uint64_t>{group.error(rank).invalid_ids}, {expected});
  group.error(rank).invalid_ids = 0;
}

void CompareTablesAndSums(const Data& d, int rank, const Buffers& b) {
  Compare("send_row", rank, b.send_row.Read(), d.send_row[rank]);
  Compare("recv_src", rank, b.recv_src.Read(), d.recv_src[rank]);
  Compare("recv_order", rank, b.recv_order.Read(), d.recv_order[rank]);
  Compare("recv_offsets", rank, b.recv_offsets.Read(), d.recv_offsets[rank]);
  Compare("group_sizes", rank, b.group_sizes.Read(), d.group_sizes[rank]);
  Compare("expert_counts", rank, b.expert_counts.Read(), d.expert_counts[rank]);
  Compare("expert_load", rank, b.expert_load.Read(), d.expert_load);
  Compare("counters", rank, b.counters.Read(), d.counters[rank]);
  CompareNumbers("out", rank, d.type, b.out.Read(), d.out[rank]);
  if (d.weighted) Compare("collected", rank, b.collected.Read(), d.collected[rank]);
  // Operands are not written.
  Compare("x", rank, b.x.Read(), d.x[rank]);
  Compare("g", rank, b.g.Read(), d.g[rank]);
  Compare("ids", rank, b.ids.Read(), d.ids[rank]);
}

void CompareCase(const Data& d, int rank, const Buffers& b) {
  CompareTablesAndSums(d, rank, b);
  const int64_t num_specified = NumSpecified(d, rank);
  Compare("tokens", rank, b.tokens.Read(), d.tokens[rank], num_specified * d.row_bytes);
  if (d.weighted) Compare("weights", rank, b.weights.Read(), d.weights[rank], num_specified);
}

// Queued on all ranks without waiting in between; twice, so that the second time meets what the
// first one left in the control blocks.
void RunCase(const Group& group, const Data& d, int num_sms, uint64_t seed) {
  const int num_wrong_before = g_tally.num_wrong, num_ranks = d.num_ranks;
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
    for (int r = 0; r < num_ranks && HasGradient(d); ++r) {
      const GroupView view = group.View(r, num_ranks, seed * 8 + 4, 10 * kSecond);
      const bool lands = (r + seed) % 2 != 0;
      CHECK_CUDA(jax_ep::gpu::LaunchDispatch(view, buffers[r]->Gradient(d, lands), num_sms,
                                             group.stream(r)));
    }
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  RequireNoError(group, num_ranks);
  for (int r = 0; r < num_ranks; ++r) {
    CompareCase(d, r, *buffers[r]);
    CompareNotice(group, d, r);
    if (HasGradient(d)) {
      const Buffers& b = *buffers[r];
      Compare("d_y", r, b.d_y.Read(), d.d_y[r], NumSpecified(d, r) * d.row_bytes);
      CompareWithin("d_weights", r, b.d_weights.Read(), d.d_weights[r], d.d_weights_bound[r]);
    }
  }
  if (g_tally.num_wrong != num_wrong_before) PrintCase(d, "in", num_sms);
}

std::vector<Case> Cases(bool small) {
  using R = Routing;
  constexpr auto kF32 = FloatType::kF32, kF16 = FloatType::kF16, kBF16 = FloatType::kBF16;
  std::vector<Case> cases = {
      // T, K, L, A, H, type, routing, capacity, weighted, zero_tail
      {1, 1, 1, 1, 8, kBF16, R::kUniform, 100, true, true},
      {5, 2, 2, 1, 8, kF16, R::kUniform, 300, true, true},
      {33, 3, 5, 16, 24, kF32, R::kHoles, 80, true, true},
      {17, 4, 4, 4, 520, kBF16, R::kSilentRank, 120, false, false},
      {40, 2, 2, 1, 264, kF16, R::kOneExpert, 60, true, false},
      {8, 2, 2, 8, 16, kF32, R::kNowhere, 100, true, true},
      // Blocks of channels that have scales, the last one whole or shorter: fp8 as well, which takes
      // all multiples of 16.
      {33, 3, 5, 16, 128, kF32, R::kHoles, 80, true, true},
      {17, 4, 4, 4, 640, kBF16, R::kSilentRank, 120, false, false},
      {40, 2, 2, 1, 1152, kF16, R::kOneExpert, 60, true, true},
      {37, 4, 4, 8, 2880, kBF16, R::kHoles, 90, true, false},
      {21, 3, 3, 1, 144, kF32, R::kUniform, 80, false, true},
      // Enough units that the blocks of a grid of five share some.
      {330, 2, 2, 1, 64, kBF16, R::kSilentRank, 100, true, true},
      {350, 2, 2, 1, 64, kF16, R::kNowhere, 100, true, false},
      {340, 24, 24, 1, 24, kBF16, R::kHoles, 70, true, true},
      // Experts with room of their own: all rows, some dropped by all, most dropped by one, and
      // rooms that nobody fills.
      {33, 3, 5, 16, 128, kF32, R::kHoles, 100, true, true, true},
      {65, 4, 6, 1, 24, kBF16, R::kUniform, 60, true, false, true},
      {40, 2, 3, 4, 264, kF16, R::kOneExpert, 30, true, true, true},
      {12, 2, 2, 8, 64, kBF16, R::kNowhere, 100, true, false, true},
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
        // As many channels as fp8 takes.
        {9, 2, 2, 4, 32768, kBF16, R::kUniform, 100, true, true},
        {300, 8, 8, 8, 2048, kF32, R::kHoles, 90, true, false},
        {1000, 1, 1, 128, 4, kF32, R::kOneExpert, 50, true, true},
        // With one block, more ids than a layout's block keeps.
        {20000, 2, 4, 1, 8, kBF16, R::kUniform, 100, false, true},
        // Much padding: rooms of many more rows than most experts have.
        {2000, 4, 32, 1, 64, kBF16, R::kHoles, 400, true, true, true},
        {300, 2, 16, 8, 8, kBF16, R::kOneExpert, 100, true, false, true},
        {500, 8, 48, 128, 512, kBF16, R::kUniform, 90, true, true, true},
    };
    cases.insert(cases.end(), more.begin(), more.end());
  }
  return cases;
}

}  // namespace jax_ep::gpu::test
