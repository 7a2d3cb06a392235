// Layouts over a network, for the programs that run them: cases, a rank's buffers, what is wrong.
#ifndef JAX_EP_TESTS_NATIVE_NETWORK_LAYOUTS_H_
#define JAX_EP_TESTS_NATIVE_NETWORK_LAYOUTS_H_

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/network/layout.cuh"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_oracle.h"

namespace jax_ep::gpu::test {

// For all cases.
inline NetworkLayoutMemory LayoutMemory(int num_ranks) {
  return {num_ranks, 600 * 8, 256, 1 << 16};
}

// One rank's operand and tables, the latter poisoned before each call. What arrives too early or too
// late may be a row of another call: `has_slack` leaves room for any.
struct LayoutBuffers {
  LayoutBuffers(const Data& d, int rank, bool has_slack) {
    sizes = {static_cast<size_t>(d.num_tokens * d.top_k),
             static_cast<size_t>(d.capacity),
             static_cast<size_t>(d.capacity),
             static_cast<size_t>(d.num_ranks * d.num_tokens + 1),
             static_cast<size_t>(d.num_local),
             static_cast<size_t>(d.num_local),
             static_cast<size_t>(d.num_experts),
             3};
    for (size_t size : sizes) {
      if (has_slack) size = std::max(size, static_cast<size_t>(LayoutMemory(1).max_capacity));
      CHECK_CUDA(cudaMalloc(&tables.emplace_back(), size * sizeof(int32_t)));
      CHECK_CUDA(cudaMemset(tables.back(), 0xee, size * sizeof(int32_t)));
    }
    CHECK_CUDA(cudaMalloc(&ids, sizes[0] * sizeof(int32_t)));
    CHECK_CUDA(
        cudaMemcpy(ids, d.ids[rank].data(), sizes[0] * sizeof(int32_t), cudaMemcpyHostToDevice));
  }
  ~LayoutBuffers() {
    for (int32_t* table : tables) cudaFree(table);
    cudaFree(ids);
  }
  LayoutBuffers(const LayoutBuffers&) = delete;
  LayoutBuffers& operator=(const LayoutBuffers&) = delete;

  LayoutArguments Arguments(const Data& d) const {
    LayoutArguments a{};
    a.topk_idx = ids;
    a.num_tokens = d.num_tokens;
    a.top_k = d.top_k;
    a.num_experts = d.num_experts;
    a.room = {d.capacity, d.alignment, d.expert_capacity};
    a.send_row = tables[0];
    a.recv_src = tables[1];
    a.recv_order = tables[2];
    a.recv_offsets = tables[3];
    a.group_sizes = tables[4];
    a.expert_counts = tables[5];
    a.expert_load = tables[6];
    a.counters = tables[7];
    return a;
  }
  std::vector<int32_t> Read(size_t table) const {
    std::vector<int32_t> got(sizes[table]);
    CHECK_CUDA(cudaMemcpy(got.data(), tables[table], sizes[table] * sizeof(int32_t),
                          cudaMemcpyDeviceToHost));
    return got;
  }
  // Numbers that are not those of the book.
  uint64_t NumWrong(const Data& d, int rank) const {
    const std::vector<int32_t>* expected[] = {
        &d.send_row[rank],    &d.recv_src[rank],      &d.recv_order[rank], &d.recv_offsets[rank],
        &d.group_sizes[rank], &d.expert_counts[rank], &d.expert_load,      &d.counters[rank]};
    uint64_t num_wrong = 0;
    for (size_t t = 0; t < tables.size(); ++t) {
      const std::vector<int32_t> got = Read(t);
      for (size_t i = 0; i < got.size(); ++i) num_wrong += got[i] != (*expected[t])[i];
    }
    return num_wrong;
  }

  std::vector<size_t> sizes;
  std::vector<int32_t*> tables;
  int32_t* ids = nullptr;
};

inline Case AnyLayoutCase(std::mt19937_64& rng) {
  const auto choose = [&](std::vector<int64_t> of) { return of[rng() % of.size()]; };
  Case c{};
  c.num_tokens = choose({1, 3, 64, 300, 600});
  c.top_k = choose({1, 2, 4, 8});
  c.experts_per_rank = choose({2, 8, 24});
  c.alignment = choose({1, 1, 8});
  c.num_channels = 8;
  c.type = FloatType::kBF16;
  c.routing = static_cast<Routing>(rng() % 5);
  c.capacity_percent = static_cast<int>(choose({60, 100, 130}));
  c.has_own_room = rng() % 4 == 0;
  return c;
}

// Of a group of at most 8 ranks, such that it fits.
inline Data AnyLayoutData(int num_ranks, std::mt19937_64& rng) {
  for (;;) {
    const Case c = AnyLayoutCase(rng);
    Data d = MakeData(c, num_ranks, rng());
    if (d.capacity <= LayoutMemory(num_ranks).max_capacity) return d;
  }
}

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_NETWORK_LAYOUTS_H_
