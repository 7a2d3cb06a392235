// give_up: how a wait ends that would not end by itself.
//
// Protocol: A wait ends when what it is for has come, or
//             when it has taken longer than its timeout: the arrival timeout for a peer that has
//               not come to the call, the progress timeout for all else;
//             when the host says that the process of who is waited for has died (`gone`);
//             when the group is broken on this device.
//           Each of the first two breaks the group on this device, once: sets `broken`, writes the
//           error record for the host, and tells the peers (`given_up`), who break their groups in
//           turn, and so do the other groups of theirs. What is told names devices, not ranks, and
//           is passed on as it came. Ranks of other nodes are told over the network, in words that
//           waits look at too (cuda/network/tell.cuh). Who finds the group broken at the start of a
//           call opens no door and tells its peers (start_end.cuh); a call that fails sees its
//           peers out of this device's memory (leave.cuh), and fills its outputs.
//           The host sets `broken` too, to kHostHasLeft, when it leaves the group: a call that
//           finds that (a replayed command buffer) touches no memory of a peer.
// Reuse:    `broken` and `given_up` are set once, and stay until the host sets the device up anew.
// Progress: a waiting thread looks after every 256 polls at `broken` and `given_up`, which lie in
//           this device's memory, and every millisecond at what the host has written, which takes
//           microseconds, and, across nodes, at what other nodes tell; so all waits end soon after the
//           first. A wait that has lasted for
//           kLongWaitNs is shown to the host, which can tell of it long before the timeout.
// Failure:  Waits within a block, for its copies and for warps that work on what has been copied
//           (mbarriers), and for its messenger (mailbox), need no timeout: those end by themselves,
//           and the messenger tells a break to those who wait.
#ifndef JAX_EP_CUDA_SYNC_GIVE_UP_CUH_
#define JAX_EP_CUDA_SYNC_GIVE_UP_CUH_

#include "cuda/core/operations.h"
#include "cuda/launch.h"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

// Threads of two warps, for what one thread of a block does while others do something else.
inline constexpr uint32_t kClaimer = 32;  // takes part in Local::running (grid.cuh)
inline constexpr uint32_t kLooker = 64;   // looks whether the group is broken

// The slot of a rank of the group, this one's own included.
__device__ inline int slot_of(const GroupView& g, int rank) { return g.peer[rank].slot_here; }

// Tells a peer of the group's end; not once the host has left it.
__device__ inline void tell_given_up(const GroupView& g, int rank, uint64_t given_up) {
  if (given_up != kHostHasLeft) st_release_sys(&g.peer[rank].control->given_up, given_up);
}

// Breaks the group on this device, once, and tells its host and its peers. `slot` is that of the
// device to blame, with kToldByPeer of the one that has given up, on `seen`.
__device__ __noinline__ inline void break_group(const GroupView& g, OpKind kind, int slot,
                                                uint32_t phase, uint64_t expected, uint64_t seen) {
  const int own = slot_of(g, g.rank);
  const uint64_t given_up =
      phase == kToldByPeer ? given_up_of(slot, static_cast<int32_t>(seen)) : given_up_of(own, slot);
  if (atom_cas_relaxed_gpu(&g.control->local.broken, 0, given_up) != 0) return;
  ErrorRecord& record = *g.error;
  record.operation = g.operation;
  record.kind = static_cast<uint32_t>(kind);
  record.slot = own;
  record.peer_slot = slot;
  record.phase = phase;
  record.expected_epoch = expected;
  record.seen_epoch = seen;
  st_release_sys(&record.valid, 1);
  for (int r = 0; r < g.num_ranks; ++r) {
    if (r != g.rank) tell_given_up(g, r, given_up);
  }
}

// What a peer has told of.
__device__ __noinline__ inline void break_as_told(const GroupView& g, OpKind kind,
                                                  uint64_t given_up) {
  break_group(g, kind, who_gave_up(given_up), kToldByPeer, 0,
              static_cast<uint64_t>(waited_for(given_up)));
}

__device__ inline bool is_broken(const GroupView& g, OpKind kind) {
  const uint64_t broken = ld_relaxed_gpu_u64(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  if ((broken | given_up) == 0) return false;
  if (broken == 0) break_as_told(g, kind, given_up);
  return true;
}

// Whether the process of that device has died, or has left, as far as the host has said.
__device__ inline bool is_gone(const GroupView& g, int slot) {
  return (ld_relaxed_sys(&g.error->gone[word_of(slot)]) & bit_of(slot)) != 0;
}

// What ranks of other nodes have told, 0 if nothing.
__device__ inline uint64_t told_by_other_nodes(const GroupView& g) {
  uint64_t given_up = 0;
  for (int r = 0; r < g.nodes.num_ranks && given_up == 0; ++r) {
    given_up = ld_relaxed_sys(&g.nodes.given_up[r]);
  }
  return given_up;
}

// What a wait finds that has lasted for a millisecond more.
struct Look {
  bool goes_on;   // false: the group is broken now
  bool is_shown;  // the host is shown this wait
};

// To the host, if none of the device's waits is shown already.
__device__ inline bool show_wait(const GroupView& g, OpKind kind, int slot, uint32_t phase,
                                 uint64_t start) {
  if (atomicExch(&g.control->local.is_waiting, 1u) != 0) return false;
  fence_acq_rel_sys();
  Waiting& waiting = g.error->waiting;
  waiting.operation = g.operation;
  waiting.kind = static_cast<uint32_t>(kind);
  waiting.phase = phase;
  waiting.peer_slot = slot;
  st_release_sys(&waiting.since, start);
  return true;
}

__device__ __noinline__ inline void hide_wait(const GroupView& g) {
  st_release_sys(&g.error->waiting.since, 0);
  fence_acq_rel_sys();
  atomicExch(&g.control->local.is_waiting, 0u);
}

__device__ __noinline__ inline Look look_further(const GroupView& g, OpKind kind, int slot,
                                                 uint32_t phase, uint64_t expected, uint64_t seen,
                                                 uint64_t start, uint64_t now, bool is_shown) {
  const ErrorRecord& host = *g.error;
  const uint64_t timeout_ns =
      ld_relaxed_sys(phase == kStart ? &host.arrival_timeout_ns : &host.progress_timeout_ns);
  if (const uint64_t given_up = told_by_other_nodes(g)) {
    break_as_told(g, kind, given_up);
    return {false, is_shown};
  }
  if (is_gone(g, slot)) {
    break_group(g, kind, slot, kPeerDied, expected, seen);
    return {false, is_shown};
  }
  if (now - start > timeout_ns) {
    break_group(g, kind, slot, phase, expected, seen);
    return {false, is_shown};
  }
  if (now - start > kLongWaitNs && !is_shown) is_shown = show_wait(g, kind, slot, phase, start);
  return {true, is_shown};
}

// By each thread that waits for something that may not come. What is rarely done is called, not
// inlined: small calls run a kernel's code once, and pay for each line of it that they come by.
class Wait {
 public:
  __device__ Wait(const GroupView& g, OpKind kind) : g_(g), kind_(kind) {}
  __device__ ~Wait() { restart(); }
  Wait(const Wait&) = delete;
  Wait& operator=(const Wait&) = delete;

  // What was waited for has come.
  __device__ void restart() {
    start_ = 0;
    if (is_shown_) hide_wait(g_);
    is_shown_ = false;
  }

  // Now and then: false if the wait has to end, for the group is broken now. `slot` is that of the
  // device that is waited for.
  __device__ bool may_go_on(int slot, uint32_t phase, uint64_t expected, uint64_t seen) {
    constexpr uint64_t kMillisecond = 1000 * 1000;
    if (is_broken(g_, kind_)) return false;
    const uint64_t now = globaltimer_ns();
    if (start_ == 0) start_ = looked_ = now;
    if (now - looked_ <= kMillisecond) return true;
    looked_ = now;
    const Look look = look_further(g_, kind_, slot, phase, expected, seen, start_, now, is_shown_);
    is_shown_ = look.is_shown;
    return look.goes_on;
  }

 private:
  const GroupView& g_;
  const OpKind kind_;
  uint64_t start_ = 0, looked_ = 0;  // by the device's clock; 0: not yet
  bool is_shown_ = false;
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GIVE_UP_CUH_
