// How the kernels of a group's ranks meet: the only place that spins, and the only one that times
// out.
//
// Protocol of a call, per pair of ranks (epoch e = calls finished by the pair + 1):
//   [S1] rank p writes its buffers' addresses to q's start mail, then releases e in it
//   [S2] q acquires e from that mail: p's stream has come to the call, so earlier users of p's
//        buffers are done, and the addresses are p's for this call
//   [P1] a block of p releases in q's progress, with e, how many units it has done for q
//   [P2] q acquires the number it needs
//   [P3] the last number told: q, or p, needs nothing of the other's memory for this call any more
//   [E1] q releases e in p's end mail: q neither reads nor writes p's memory for this call any more
//   [E2] p acquires it from all peers, and only then ends
// Reuse:    p sends e + 1 only after it knows that q needs nothing of e any more ([E2], or [P3]
//           of each block), so q has read the mail of e before it changes; flags only grow.
// Progress: [S1], [P1] and [E1] wait for nothing but resident blocks of their own kernel, so no
//           cycle.
// Failure:  a wait that exceeds the timeout sets `broken` in this device's control block, writes
//           the error record and tells the peers (`given_up`), who break their groups in turn.
//           Every other wait of a device then ends at once, in this and all later calls, and the
//           last block of each such call fills its outputs. The host sets `broken` too, when it
//           leaves the group: a call that finds it set (a replayed command buffer) touches no
//           memory of a peer.
#ifndef JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_
#define JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

enum class OpKind : uint32_t { kLayout, kDispatch, kCombine };

// Whether a wait has taken as long as it may. That lies in the host's memory, where a replayed
// command buffer sees changes; reading it takes microseconds, so short waits do not.
__device__ inline bool is_too_long(const GroupView& g, uint64_t nanoseconds) {
  constexpr uint64_t kShort = 1000 * 1000;
  return nanoseconds > kShort && nanoseconds > ld_relaxed_sys(&g.error->timeout_ns);
}

// Breaks the group on this device, once, and tells its host and its peers: they must not take for
// good what they have read here, or will, once this device has given up.
__device__ inline void report(const GroupView& g, OpKind kind, int peer, uint32_t phase,
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
  if (ld_acquire_gpu(&g.control->local.broken) != 0) return true;
  const uint64_t given_up = ld_acquire_sys(&g.control->given_up);
  if (given_up == 0) return false;
  report(g, kind, who_gave_up(given_up), kToldByPeer, 0,
         static_cast<uint64_t>(waited_for(given_up)));
  return true;
}

// Spins until *flag >= expected, then acquires. False after a timeout, or if the group is broken.
// The spin itself is relaxed: an acquiring load empties the SM's cache each time, which starves the
// warps that work beside it.
__device__ inline bool wait_flag(const GroupView& g, OpKind kind, const uint64_t* flag,
                                 uint64_t expected, int peer, uint32_t phase) {
  uint64_t start = 0;
#ifdef JAX_EP_BREAK_ORDER
  // Negative control of the race test: after a first call, which told addresses, do not wait.
  if (phase == JAX_EP_BREAK_ORDER && ld_relaxed_sys(flag) > 0) expected = 0;
#endif
  for (uint32_t i = 0;; ++i) {
    const uint64_t seen = ld_relaxed_sys(flag);
    if (seen >= expected) {
      ld_acquire_sys(flag);
      return true;
    }
    if (i > 32) __nanosleep(32);
    if ((i & 255u) != 255u) continue;
    if (is_broken(g, kind)) return false;
    const uint64_t now = globaltimer_ns();
    if (start == 0) start = now;
    if (is_too_long(g, now - start)) {
      report(g, kind, peer, phase, expected, seen);
      return false;
    }
  }
}

// An address of this device as its peers are shown it.
__device__ inline uint64_t shown_address(const GroupView& g, uint64_t address) {
  const uint64_t offset = address - g.staging;
  return offset < g.staging_bytes ? kStagedAddress | offset : address;
}

// What a peer has shown as an address that is valid here.
__device__ inline uint64_t address_here(const PeerView& peer, uint64_t shown) {
  if ((shown & kStagedAddress) != 0) return peer.staging + (shown & ~kStagedAddress);
  return shown == 0 ? 0 : shown + static_cast<uint64_t>(peer.shift);
}

// [S1], by threads 0 .. num_ranks - 1 of one block.
__device__ inline void send_start(const GroupView& g, const uint64_t (&address)[kNumAddresses]) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  if (ld_relaxed_gpu(&g.control->local.broken) != 0) return;
  const PeerView& peer = g.peer[r];
  StartMail* mail = &peer.control->start[peer.slot_there];
  st_relaxed_sys(&mail->operation, g.operation);
  for (int i = 0; i < kNumAddresses; ++i) {
    st_relaxed_sys(&mail->address[i], shown_address(g, address[i]));
  }
  st_release_sys(&mail->epoch, g.control->local.epoch[peer.slot_here] + 1);  // [S1]
}

// [S2], by all threads of a block: fills address[r][i] (in shared memory) for every rank, this one
// included. False if the group is broken; the same on all threads.
__device__ inline bool receive_start(const GroupView& g, OpKind kind,
                                     const uint64_t (&own)[kNumAddresses],
                                     uint64_t (*address)[kNumAddresses]) {
  // Their latency passes while the first flag is fetched.
  const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  bool ok = true;
  for (int r = static_cast<int>(threadIdx.x); r < g.num_ranks; r += static_cast<int>(blockDim.x)) {
    if (r == g.rank) {
      for (int i = 0; i < kNumAddresses; ++i) address[r][i] = own[i];
      continue;
    }
    const PeerView& peer = g.peer[r];
    const StartMail* mail = &g.control->start[peer.slot_here];
    const uint64_t epoch = g.control->local.epoch[peer.slot_here] + 1;
    ok = ok && wait_flag(g, kind, &mail->epoch, epoch, r, kStart);  // [S2]
    if (ok && ld_relaxed_sys(&mail->operation) != g.operation) {
      report(g, kind, r, kOtherCall, g.operation, mail->operation);
      ok = false;
    }
    for (int i = 0; i < kNumAddresses; ++i) {
      address[r][i] = address_here(peer, ld_relaxed_sys(&mail->address[i]));
    }
  }
  if (broken != 0 || given_up != 0) ok = !is_broken(g, kind) && ok;
  return __syncthreads_and(ok) != 0;
}

// [P1], after fence_acq_rel_sys: block `block` has done `num_units` units for rank r.
__device__ inline void send_progress(const GroupView& g, int r, int block, int num_units) {
  const PeerView& peer = g.peer[r];
  const uint64_t epoch = g.control->local.epoch[peer.slot_here] + 1;
  st_relaxed_sys(&peer.control->progress[peer.slot_there][block],
                 progress_of(epoch, static_cast<uint64_t>(num_units)));
}

// What the data movers of a block and its messenger tell each other, in shared memory.
struct Mailbox {
  int32_t done;   // by the movers: units that are complete for the peers
  int32_t there;  // by the messenger: units that every peer has done for this rank; kBroken
  int32_t last;   // what both reach in the end
};
inline constexpr int32_t kBroken = INT32_MAX;  // nothing more comes, nobody shall wait

// [P1] and [P2] between this block and the blocks of the same number at the peers, until all is
// told both ways; the last unit told is one more than there are, [P3]: nothing more is needed. By a warp of its own: fences wait for much more than what they are needed for,
// and must not hold up those who move data. What peers have written may be read, by the copy
// engine too, after `there` has been acquired.
__device__ inline void run_messenger(const GroupView& g, OpKind kind, Mailbox& box) {
  if (g.num_ranks == 1) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto block = static_cast<int>(blockIdx.x);
  const int32_t last = box.last;
  const auto seen_of = [&](int r) {
    return ld_relaxed_sys(&g.control->progress[g.peer[r].slot_here][block]);
  };
  int32_t sent = 0, there = 0;
  uint64_t start = 0;
  for (uint32_t round = 0; sent < last || there < last; ++round) {
    bool moved = false;
    const int32_t done = __shfl_sync(0xffffffffu, ld_acquire_cta_shared(&box.done), 0);
    __syncwarp();  // what lane 0 has acquired holds for all
    if (done > sent) {
      fence_acq_rel_sys();
      for (int r = lane; r < g.num_ranks; r += 32) {
        if (r != g.rank) send_progress(g, r, block, done);  // [P1]
      }
      sent = done;
      moved = true;
    }
    if (there < last) {
      int32_t least = last;
      for (int r = lane; r < g.num_ranks; r += 32) {
        if (r == g.rank) continue;
        const uint64_t epoch = g.control->local.epoch[g.peer[r].slot_here] + 1;
        least = min(least, units_of(seen_of(r), epoch));
      }
      least = __reduce_min_sync(0xffffffffu, least);
#if defined(JAX_EP_BREAK_ORDER) && JAX_EP_BREAK_ORDER == 3
      least = last;  // negative control of the race test
#endif
      if (least > there) {
        fence_acq_rel_sys();  // [P2]
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) st_release_cta_shared(&box.there, least);
        there = least;
        moved = true;
      }
    }
    if (moved) {
      start = 0;
      continue;
    }
    if ((round & 63u) != 63u) continue;
    bool broken = is_broken(g, kind);
    const uint64_t now = globaltimer_ns();
    if (start == 0) start = now;
    const bool too_long = is_too_long(g, now - start);
    for (int r = lane; !broken && too_long && r < g.num_ranks; r += 32) {
      if (r == g.rank) continue;
      const uint64_t epoch = g.control->local.epoch[g.peer[r].slot_here] + 1;
      const uint64_t expected = progress_of(epoch, static_cast<uint64_t>(last));
      const uint64_t seen = seen_of(r);
      if (seen >= expected) continue;
      report(g, kind, r, kProgress, expected, seen);
      broken = true;
    }
    if (__any_sync(0xffffffffu, broken) == 0) continue;
    if (lane == 0) st_release_cta_shared(&box.there, kBroken);
    return;
  }
}

// By a warp: units that every peer has done for this rank, or kBroken.
__device__ inline int32_t units_there(const Mailbox& box) {
  const int32_t there = __shfl_sync(0xffffffffu, ld_acquire_cta_shared(&box.there), 0);
  __syncwarp();  // what lane 0 has acquired holds for all
  return there;
}
// Likewise, once it exceeds `num_units`; the messenger sees to it that this ends.
__device__ inline int32_t wait_for_more(const Mailbox& box, int32_t num_units) {
  while (true) {
    const int32_t there = units_there(box);
    if (there > num_units) return there;
    __nanosleep(32);
  }
}

// By all threads of each block, after the block's work: true in the block that comes last.
__device__ inline bool is_last_block(const GroupView& g) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atom_add_acq_rel_gpu(&g.control->local.num_blocks_done, 1) == gridDim.x - 1;
  }
  __syncthreads();
  return last;
}

// By all threads of a block, and the same on all of them: a peer may give up between two looks.
__device__ inline bool is_broken_for_all(const GroupView& g, OpKind kind) {
  return __syncthreads_or(is_broken(g, kind)) != 0;
}

// [E1], by threads 0 .. num_ranks - 1 of the last block.
__device__ inline void send_end(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  __threadfence_system();
  st_release_sys(&peer.control->end[peer.slot_there].epoch,
                 g.control->local.epoch[peer.slot_here] + 1);  // [E1]
}

// [E2], likewise. False if the group is broken.
__device__ inline bool receive_end(const GroupView& g, OpKind kind) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return true;
  const PeerView& peer = g.peer[r];
  return wait_flag(g, kind, &g.control->end[peer.slot_here].epoch,
                   g.control->local.epoch[peer.slot_here] + 1, r, kEnd);  // [E2]
}

// The call is over for this device: by all threads of the last block, after all else. The next
// kernel finds the counters at 0.
__device__ inline void end_call(const GroupView& g) {
  __syncthreads();
  Local& local = g.control->local;
  const int r = static_cast<int>(threadIdx.x);
  if (r < g.num_ranks) ++local.epoch[g.peer[r].slot_here];
  if (r == 0) {
    local.num_blocks_done = 0;
    local.next_unit = 0;
    local.barrier = 0;
  }
}

// All blocks of the grid, which must all be resident. False if the group is broken meanwhile, or if
// a block does not come: it leaves when the group is broken, or finds no SM.
__device__ inline bool grid_barrier(const GroupView& g, OpKind kind) {
  __syncthreads();
  bool ok = true;
  if (threadIdx.x == 0) {
    atom_add_acq_rel_gpu(&g.control->local.barrier, 1);
    const uint64_t start = globaltimer_ns();
    for (uint32_t i = 0; ok && ld_relaxed_gpu(&g.control->local.barrier) < gridDim.x; ++i) {
      if ((i & 255u) != 255u) continue;
      ok = !is_broken(g, kind);
      if (ok && is_too_long(g, globaltimer_ns() - start)) {
        report(g, kind, g.rank, kNotResident, gridDim.x, ld_relaxed_gpu(&g.control->local.barrier));
        ok = false;
      }
    }
    ld_acquire_gpu(&g.control->local.barrier);
  }
  return __syncthreads_and(ok) != 0;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_
