// give_up: how a wait ends that would not end by itself.
//
// Protocol: A wait that exceeds the timeout breaks the group on its device (`broken` in the control
//           block), writes the error record for the host, and tells the peers (`given_up`), who
//           break their groups in turn. Every other wait of a device then ends at once, in this and
//           all later calls, and the last block of each such call fills its outputs. The host sets
//           `broken` too, when it leaves the group: a call that finds it set (a replayed command
//           buffer) touches no memory of a peer.
// Reuse:    `broken` and `given_up` are set once, and stay until the host sets the device up anew.
// Failure:  A rank that gives up does not know whether a peer still writes: such stores may reach
//           its buffers later. Waits within a block, for its copies and for warps that work on what
//           has been copied (mbarriers), and for its messenger (mailbox), need no timeout: those end
//           by themselves, and the messenger tells a break to those who wait.
#ifndef JAX_EP_CUDA_SYNC_GIVE_UP_CUH_
#define JAX_EP_CUDA_SYNC_GIVE_UP_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

enum class OpKind : uint32_t { kLayout, kDispatch, kCombine, kCombineGradient };

// Whether a wait has taken as long as it may. That lies in the host's memory, where a replayed
// command buffer sees changes; reading it takes microseconds, so short waits do not.
__device__ inline bool has_timed_out(const GroupView& g, uint32_t phase, uint64_t nanoseconds) {
  constexpr uint64_t kShort = 1000 * 1000;
  if (nanoseconds <= kShort) return false;
  const uint64_t* timeout_ns =
      phase == kStart ? &g.error->arrival_timeout_ns : &g.error->progress_timeout_ns;
  return nanoseconds > ld_relaxed_sys(timeout_ns);
}

// Breaks the group on this device, once, and tells its host and its peers: they must not take for
// good what they have read here, or will, once this device has given up.
__device__ inline void break_group(const GroupView& g, OpKind kind, int peer, uint32_t phase,
                                   uint64_t expected, uint64_t seen) {
  if (atomicExch(&g.control->local.broken, 1u) != 0) return;
  g.error->operation = g.operation;
  g.error->kind = static_cast<uint32_t>(kind);
  g.error->rank = g.rank;
  g.error->peer = peer;
  g.error->phase = phase;
  g.error->expected_epoch = expected;
  g.error->seen_epoch = seen;
  st_release_sys(&g.error->valid, 1);
  if (phase == kToldByPeer) return;  // who knows more has told all
  for (int r = 0; r < g.num_ranks; ++r) {
    if (r != g.rank) st_release_sys(&g.peer[r].control->given_up, given_up_of(g.rank, peer));
  }
}

__device__ inline bool is_broken(const GroupView& g, OpKind kind) {
  const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  if (broken != 0) return true;
  if (given_up == 0) return false;
  break_group(g, kind, who_gave_up(given_up), kToldByPeer, 0,
              static_cast<uint64_t>(waited_for(given_up)));
  return true;
}

// What a wait does now and then: false if it has to end, because the group is broken or because it
// has taken too long, which this reports. `start` is 0 at first.
__device__ inline bool may_wait(const GroupView& g, OpKind kind, int peer, uint32_t phase,
                                uint64_t expected, uint64_t seen, uint64_t& start) {
  if (is_broken(g, kind)) return false;
  const uint64_t now = globaltimer_ns();
  if (start == 0) start = now;
  if (!has_timed_out(g, phase, now - start)) return true;
  break_group(g, kind, peer, phase, expected, seen);
  return false;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GIVE_UP_CUH_
