// progress: the blocks of the same number at all ranks tell one another how far they are.
//
// Protocol: per pair of ranks p and q, e = calls finished by the pair + 1:
//           [P1] a block of p has written units of q's result, and releases in q's progress, with
//                e, how many they are; the last number tells that p writes nothing of q's any more.
//                That a bulk store's group is complete does not replace the release: without its
//                fence the race test sees stale rows.
//           [P2] q acquires the number it needs
// Roles:    a block's data movers and its messenger, a warp, which talk through a mailbox.
// Reuse:    a progress word is epoch and number, so it only grows.
// Progress: [P1] waits for nothing but the block's own movers.
// Failure:  the messenger's wait ends as give_up.cuh says; it passes kBroken on to the movers.
#ifndef JAX_EP_CUDA_SYNC_PROGRESS_CUH_
#define JAX_EP_CUDA_SYNC_PROGRESS_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu {

// What the data movers of a block and its messenger tell each other, in shared memory. Mover m of n
// looks after the units m, m + n, m + 2 n, .. of the block, in this order.
inline constexpr int kMaxMovers = 16;
struct Mailbox {
  int32_t written[kMaxMovers];  // by each mover: how many of its units are complete for the peers
  int32_t num_movers;
  int32_t num_units;  // of the block
  int32_t arrived;    // by the messenger: units that every peer has done for this rank; kBroken
  int32_t values_written;  // 1 if what goes beside the rows is: the last unit waits for it
};
inline constexpr int32_t kBroken = INT32_MAX;  // nothing more comes, nobody shall wait
// The units of a block are told in about so many parts. Each costs a fence; fewer parts make peers
// wait longer.
inline constexpr int kNumParts = 16;

// [P1] and [P2] between this block and the blocks of the same number at the peers, until all is
// told both ways. By a warp of its own: the fence waits for all that the SM has on the way, 5 to 10
// us while links and memory are busy, and must not hold up those who move data. What peers have
// written may be read, by the copy engine too, after `arrived` has been acquired. False if the
// group is broken.
__device__ inline bool run_messenger(const GroupView& g, OpKind kind, Mailbox& box) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto block = static_cast<int>(blockIdx.x);
  const int32_t num_units = box.num_units;
  const auto epoch_with = [&](int r) { return g.control->local.epoch[slot_of(g, r)] + 1; };
  const auto flag_of = [&](int r) { return &g.control->progress[slot_of(g, r)][block]; };
  const int32_t part = max(1, num_units / kNumParts);
  int32_t published = 0, arrived = 0;
  Wait wait(g, kind);
  for (uint32_t round = 0; g.num_ranks > 1 && (published < num_units || arrived < num_units);
       ++round) {
    bool moved = false;
    if (published < num_units) {
      int32_t done = num_units;
      if (lane < box.num_movers) {
        done = min(done, ld_acquire_cta_shared(&box.written[lane]) * box.num_movers + lane);
      }
      done = __reduce_min_sync(0xffffffffu, done);
      const bool values_written =
          __all_sync(0xffffffffu, ld_acquire_cta_shared(&box.values_written) != 0) != 0;
      if (done == num_units && !values_written) --done;
      if (done - published >= part || (done > published && done == num_units)) {
        __syncwarp();  // what one lane has acquired holds for all
        timeline::mark(Role::kMessenger, Event::kFenceBegin);
        fence_acq_rel_sys();
        timeline::mark(Role::kMessenger, Event::kFenceEnd);
        for (int r = lane; r < g.num_ranks; r += 32) {
          if (r == g.rank) continue;
          const PeerView& peer = g.peer[r];
          st_relaxed_sys(&peer.control->progress[peer.slot_there][block],
                         progress_of(epoch_with(r), static_cast<uint64_t>(done)));  // [P1]
        }
        timeline::mark(Role::kMessenger, Event::kP1);
        published = done;
        moved = true;
      }
    }
    if (arrived < num_units) {
      int32_t least = num_units;
      for (int r = lane; r < g.num_ranks; r += 32) {
        if (r == g.rank) continue;
        least = min(least, units_of(ld_relaxed_sys(flag_of(r)), epoch_with(r)));
      }
      least = __reduce_min_sync(0xffffffffu, least);
#ifdef JAX_EP_BREAK_ORDER
      least = num_units;  // negative control of the race test
#endif
      if (least > arrived) {
        // Only now, for an acquiring load empties the SM's L1 cache.
#pragma unroll 1
        for (int r = lane; r < g.num_ranks; r += 32) {
          if (r != g.rank) ld_acquire_sys(flag_of(r));  // [P2]
        }
        fence_proxy_async_global();
        __syncwarp();
        if (lane == 0) st_release_cta_shared(&box.arrived, least);
        timeline::mark(Role::kMessenger, Event::kP2);
        arrived = least;
        moved = true;
      }
    }
    if (moved) {
      wait.restart();
      continue;
    }
    if ((round & 63u) != 63u) continue;
    // The first peer that has not told all is the one that is waited for.
    int peer = g.rank;
    uint64_t expected = 0, seen = 0;
    for (int r = g.num_ranks - 1; r >= 0; --r) {
      if (r == g.rank) continue;
      const uint64_t told = ld_relaxed_sys(flag_of(r));
      const uint64_t all = progress_of(epoch_with(r), static_cast<uint64_t>(num_units));
      if (told >= all) continue;
      peer = r;
      expected = all;
      seen = told;
    }
    const bool ok = wait.may_go_on(slot_of(g, peer), kProgress, expected, seen);
    if (__all_sync(0xffffffffu, ok) != 0) continue;
    if (lane == 0) st_release_cta_shared(&box.arrived, kBroken);
    return false;
  }
  return true;
}

// By the warp that has written all of a block's values.
__device__ inline void set_values_written(Mailbox& box) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) st_release_cta_shared(&box.values_written, 1);  // then [P1]
}

// By a warp: units that every peer has done for this rank, or kBroken.
__device__ inline int32_t units_arrived(const Mailbox& box) {
  const int32_t arrived = __shfl_sync(0xffffffffu, ld_acquire_cta_shared(&box.arrived), 0);
  __syncwarp();  // what lane 0 has acquired holds for all
  return arrived;
}
// Likewise, once the block's unit of this number is among them; the messenger sees to it that this
// ends.
__device__ inline int32_t wait_until_arrived(const Mailbox& box, int32_t unit) {
  while (true) {
    const int32_t arrived = units_arrived(box);
    if (arrived > unit) return arrived;
    __nanosleep(32);
  }
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_PROGRESS_CUH_
