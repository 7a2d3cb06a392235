// link_check: every rank sends a row with its signal to every other, and looks at what arrives.
//
// After:    results[p] says what came of rank p's row, for all p; this rank's own is kLinkGood.
// Roles:    one block; warp w takes ranks w, w + num_warps, ..: sends to all of them, then waits for
//           each.
// Buffers:  bytes   | sent[num_ranks], arrived[num_ranks] rows of kLinkRowBytes, by rank
//           signals | arrived[num_ranks], set to `round`
// Protocol: [L1] put_signal(arrived[self] at p, from sent[p]); [L2] wait_signal(arrived[p] here).
// Reuse:    `round` is above 0 and grows by one a launch. A rank launches the next one when all have
//           ended this one (the host sees to it), so nothing of it is under way any more.
// Progress: all rows are sent before any is waited for.
// Failure:  a row that does not come within `timeout_ns`; all waits of a warp share that time.
#ifndef JAX_EP_CUDA_NETWORK_LINK_CHECK_CUH_
#define JAX_EP_CUDA_NETWORK_LINK_CHECK_CUH_

#include "cuda/network/hop.cuh"
#include "cuda/network/network.h"

namespace jax_ep::gpu {

// Word i of the row from one rank to another.
__device__ inline int32_t link_word(int from, int to, uint64_t round, int i) {
  uint32_t word = static_cast<uint32_t>(from) * 0x9e3779b9u + static_cast<uint32_t>(to);
  word = (word ^ static_cast<uint32_t>(round)) * 0x85ebca6bu + static_cast<uint32_t>(i);
  return static_cast<int32_t>((word ^ word >> 15) * 0x2c1b3c6du);
}

template <typename Hop>
__global__ void __launch_bounds__(kLinkThreads) link_check(Hop hop, LinkCheck check) {
  constexpr int kWords = kLinkRowBytes / sizeof(int32_t);
  const int lane = static_cast<int>(threadIdx.x) % 32, num_warps = kLinkThreads / 32;
  const uint64_t start = globaltimer_ns();
  const auto may_go_on = [&](uint64_t) { return globaltimer_ns() - start <= check.timeout_ns; };
  const auto row = [&](int i) {
    return reinterpret_cast<int32_t*>(check.bytes + static_cast<size_t>(i) * kLinkRowBytes);
  };
  for (int p = static_cast<int>(threadIdx.x) / 32; p < check.num_ranks; p += num_warps) {
    if (p == check.rank) continue;
    int32_t* sent = row(p);
    for (int i = lane; i < kWords; i += 32) sent[i] = link_word(check.rank, p, check.round, i);
    hop.put_signal(p, p, row(check.num_ranks + check.rank), sent, kLinkRowBytes,
                   check.signals + check.rank, check.round, may_go_on);  // [L1]
  }
  for (int p = static_cast<int>(threadIdx.x) / 32; p < check.num_ranks; p += num_warps) {
    LinkResult result = kLinkGood;
    if (p != check.rank) {
      const bool came = hop.wait_signal(check.signals + p, check.round, may_go_on);  // [L2]
      bool is_right = true;
      for (int i = lane; i < kWords && came; i += 32) {
        is_right &= ld_relaxed_sys_i32(row(check.num_ranks + p) + i) ==
                    link_word(p, check.rank, check.round, i);
      }
      result = !came ? kLinkSilent : __all_sync(~0u, is_right) ? kLinkGood : kLinkWrong;
    }
    if (lane == 0) check.results[p] = result;
  }
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_LINK_CHECK_CUH_
