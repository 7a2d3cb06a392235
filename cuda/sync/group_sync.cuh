// How the kernels of a group's ranks meet: the only place that waits for another block or rank, and
// the only one that times out.
//
// Protocol of a call, per pair of ranks (epoch e = calls finished by the pair + 1):
//   [S1] rank p releases its buffers' addresses, each with e, in q's start mail
//   [S2] q acquires all of that mail: p's stream has come to the call, so earlier users of p's
//        buffers are done, and the addresses are p's for this call
//   [P1] a block of p has written units of q's result, and releases in q's progress, with e, how
//        many they are; the last number tells that p writes nothing of q's any more. That a bulk
//        store's group is complete does not replace the release: without its fence the race test
//        sees stale rows.
//   [P2] q acquires the number it needs
//   [E1] layout, where q reads p's memory: q stores e in p's end mail when it needs no more
//   [E2] p acquires it from all peers, and only then ends
// Reuse:    p sends e + 1 only after it knows that every block of q that reads mails has read that
//           of e: all of them have told their last number ([P2]), or q has sent [E1]. Flags only
//           grow.
// Progress: [S1], [P1] and [E1] wait for nothing but resident blocks of their own kernel, so no
//           cycle. Calls of a device follow one another, in the same order on all ranks.
// Failure:  a wait that exceeds the timeout sets `broken` in this device's control block, writes
//           the error record and tells the peers (`given_up`), who break their groups in turn.
//           Every other wait of a device then ends at once, in this and all later calls, and the
//           last block of each such call fills its outputs. The host sets `broken` too, when it
//           leaves the group: a call that finds it set (a replayed command buffer) touches no
//           memory of a peer. A rank that gives up does not know whether a peer still writes: such
//           stores may reach its buffers later. Waits within a block, for its copies and for warps
//           that work on what has been copied (mbarriers), and for its messenger (mailbox), need no
//           timeout: those end by themselves, and the messenger tells a break to those who wait.
#ifndef JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_
#define JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

enum class OpKind : uint32_t { kLayout, kDispatch, kCombine, kCombineGradient };

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
  const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  if (broken != 0) return true;
  if (given_up == 0) return false;
  report(g, kind, who_gave_up(given_up), kToldByPeer, 0,
         static_cast<uint64_t>(waited_for(given_up)));
  return true;
}

// What a wait does now and then: false if it has to end, because the group is broken or because it
// has taken too long, which this reports. `start` is 0 at first.
__device__ inline bool may_wait_on(const GroupView& g, OpKind kind, int peer, uint32_t phase,
                                   uint64_t expected, uint64_t seen, uint64_t& start) {
  if (is_broken(g, kind)) return false;
  const uint64_t now = globaltimer_ns();
  if (start == 0) start = now;
  if (!is_too_long(g, now - start)) return true;
  report(g, kind, peer, phase, expected, seen);
  return false;
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

// [S1], by all threads of one block.
__device__ inline void send_start(const GroupView& g, OpKind kind,
                                  const uint64_t (&address)[kNumAddresses]) {
  if (threadIdx.x == blockDim.x - 1 && atomicExch(&g.control->local.running, 1u) != 0) {
    report(g, kind, g.rank, kTwoAtOnce, 0, 0);
  }
  for (int i = static_cast<int>(threadIdx.x); i < g.num_ranks * kNumShown;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kNumShown, what = i % kNumShown;
    if (r == g.rank) continue;
    const PeerView& peer = g.peer[r];
    const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
    const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[peer.slot_here]) + 1;
    if (broken != 0) continue;
    const uint64_t value = what == kNumAddresses ? g.operation : shown_address(g, address[what]);
    st_release_sys_b128(&peer.control->start[peer.slot_there].shown[what], value, epoch);  // [S1]
  }
}

// [S2], by all threads of a block: fills address[r][i] (in shared memory) for every rank, this one
// included. False if the group is broken; the same on all threads. The loads that may all be needed
// are under way at once.
__device__ inline bool receive_start(const GroupView& g, OpKind kind,
                                     const uint64_t (&own)[kNumAddresses],
                                     uint64_t (*address)[kNumAddresses]) {
  const uint32_t broken = ld_relaxed_gpu(&g.control->local.broken);
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  bool ok = true;
  for (int i = static_cast<int>(threadIdx.x); i < g.num_ranks * kNumShown;
       i += static_cast<int>(blockDim.x)) {
    const int r = i / kNumShown, what = i % kNumShown;
    if (r == g.rank) {
      if (what < kNumAddresses) address[r][what] = own[what];
      continue;
    }
    const PeerView& peer = g.peer[r];
    const Shown* mail = &g.control->start[peer.slot_here].shown[what];
    const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[peer.slot_here]) + 1;
    uint64_t value, seen, start = 0;
    ld_acquire_sys_b128(mail, value, seen);
    for (uint32_t n = 1; ok && seen < epoch; ++n) {
      if ((n & 255u) == 0) ok = may_wait_on(g, kind, r, kStart, epoch, seen, start);
      ld_acquire_sys_b128(mail, value, seen);  // [S2]
    }
    if (what < kNumAddresses) {
      address[r][what] = address_here(peer, value);
    } else if (ok && value != g.operation) {
      report(g, kind, r, kOtherCall, g.operation, value);
      ok = false;
    }
  }
  if (broken != 0 || given_up != 0) ok = !is_broken(g, kind) && ok;
  return __syncthreads_and(ok) != 0;
}

// What the data movers of a block and its messenger tell each other, in shared memory. Mover m of n
// looks after the units m, m + n, m + 2 n, .. of the block, in this order.
inline constexpr int kMaxMovers = 16;
struct Mailbox {
  int32_t done[kMaxMovers];  // by each mover: how many of its units are complete for the peers
  int32_t num_movers;
  int32_t num_units;   // of the block
  int32_t there;       // by the messenger: units that every peer has done for this rank; kBroken
  int32_t has_values;  // 1 when what goes beside the rows is written: the last unit waits for it
};
inline constexpr int32_t kBroken = INT32_MAX;  // nothing more comes, nobody shall wait
// The units of a block are told in about so many parts. Each costs a fence; fewer parts make peers
// wait longer.
inline constexpr int kNumParts = 16;

// [P1] and [P2] between this block and the blocks of the same number at the peers, until all is told
// both ways. By a warp of its own: the fence waits for all that the SM has on the way, 5 to 10 us
// while links and memory are busy, and must not hold up those who move data. What peers have written
// may be read, by the copy engine too, after `there` has been acquired. False if the group is
// broken.
__device__ inline bool run_messenger(const GroupView& g, OpKind kind, Mailbox& box) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto block = static_cast<int>(blockIdx.x);
  const int32_t num_units = box.num_units;
  const auto epoch_with = [&](int r) { return g.control->local.epoch[g.peer[r].slot_here] + 1; };
  const auto flag_of = [&](int r) { return &g.control->progress[g.peer[r].slot_here][block]; };
  const int32_t part = max(1, num_units / kNumParts);
  int32_t sent = 0, there = 0;
  uint64_t start = 0;
  for (uint32_t round = 0; g.num_ranks > 1 && (sent < num_units || there < num_units); ++round) {
    bool moved = false;
    if (sent < num_units) {
      int32_t done = num_units;
      if (lane < box.num_movers) {
        done = min(done, ld_acquire_cta_shared(&box.done[lane]) * box.num_movers + lane);
      }
      done = __reduce_min_sync(0xffffffffu, done);
      const bool has_values =
          __all_sync(0xffffffffu, ld_acquire_cta_shared(&box.has_values) != 0) != 0;
      if (done == num_units && !has_values) --done;
      if (done - sent >= part || (done > sent && done == num_units)) {
        __syncwarp();  // what one lane has acquired holds for all
        fence_acq_rel_sys();
        for (int r = lane; r < g.num_ranks; r += 32) {
          if (r == g.rank) continue;
          const PeerView& peer = g.peer[r];
          st_relaxed_sys(&peer.control->progress[peer.slot_there][block],
                         progress_of(epoch_with(r), static_cast<uint64_t>(done)));  // [P1]
        }
        sent = done;
        moved = true;
      }
    }
    if (there < num_units) {
      int32_t least = num_units;
      for (int r = lane; r < g.num_ranks; r += 32) {
        if (r == g.rank) continue;
        least = min(least, units_of(ld_relaxed_sys(flag_of(r)), epoch_with(r)));
      }
      least = __reduce_min_sync(0xffffffffu, least);
#ifdef JAX_EP_BREAK_ORDER
      least = num_units;  // negative control of the race test
#endif
      if (least > there) {
        // Only now, for an acquiring load empties the SM's L1 cache.
#pragma unroll 1
        for (int r = lane; r < g.num_ranks; r += 32) {
          if (r != g.rank) ld_acquire_sys(flag_of(r));  // [P2]
        }
        fence_proxy_async_global();
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
    const bool may_wait = may_wait_on(g, kind, peer, kProgress, expected, seen, start);
    if (__all_sync(0xffffffffu, may_wait) != 0) continue;
    if (lane == 0) st_release_cta_shared(&box.there, kBroken);
    return false;
  }
  return true;
}

// By the warp that has written all of a block's values.
__device__ inline void tell_values(Mailbox& box) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) st_release_cta_shared(&box.has_values, 1);  // then [P1]
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

// What the last block of a grid has to do.
enum class Finish { kNotLast, kEnd, kFail };

// By all threads of each block, after the block's work, which has gone well if `ok` on all of them.
__device__ inline Finish finish_block(const GroupView& g, bool ok) {
  constexpr uint32_t kFailed = 1u << 16;
  __shared__ Finish finish;
  const bool all_ok = __syncthreads_and(ok) != 0;
  if (threadIdx.x == 0) {
    const uint32_t one = all_ok ? 1 : 1 + kFailed;
    const uint32_t sum = atom_add_acq_rel_gpu(&g.control->local.num_blocks_done, one) + one;
    finish = sum % kFailed != gridDim.x ? Finish::kNotLast
             : sum < kFailed            ? Finish::kEnd
                                        : Finish::kFail;
  }
  __syncthreads();
  return finish;
}

// [E1], by all threads of one block, when no block reads peers' memory any more: what it has read
// is there, so nothing has to be released.
__device__ inline void send_end(const GroupView& g) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  st_relaxed_sys(&peer.control->end[peer.slot_there].epoch,
                 g.control->local.epoch[peer.slot_here] + 1);  // [E1]
}

// [E2], likewise. False if the group is broken: a peer that has given up before [E1] may have left
// anything to be read.
__device__ inline bool receive_end(const GroupView& g, OpKind kind) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return true;
  const PeerView& peer = g.peer[r];
  const uint64_t* flag = &g.control->end[peer.slot_here].epoch;
  const uint64_t epoch = ld_relaxed_gpu_u64(&g.control->local.epoch[peer.slot_here]) + 1;
  const uint64_t given_up = ld_relaxed_sys(&g.control->given_up);
  uint64_t start = 0, seen = ld_acquire_sys(flag);
  for (uint32_t n = 1; seen < epoch; ++n) {
    if ((n & 255u) == 0 && !may_wait_on(g, kind, r, kEnd, epoch, seen, start)) return false;
    seen = ld_acquire_sys(flag);  // [E2]
  }
  return given_up == 0 || !is_broken(g, kind);
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
    local.barrier = 0;
    local.num_taken = 0;
    local.running = 0;
  }
}

// All blocks of the grid, which must all be resident. False if the group is broken meanwhile, or if
// a block does not come: it leaves when the group is broken, or finds no SM.
__device__ inline bool grid_barrier(const GroupView& g, OpKind kind) {
  __syncthreads();
  bool ok = true;
  if (threadIdx.x == 0) {
    uint32_t* barrier = &g.control->local.barrier;
    uint32_t come = atom_add_acq_rel_gpu(barrier, 1) + 1;
    uint64_t start = 0;
    for (uint32_t n = 1; ok && come < gridDim.x; ++n) {
      come = ld_acquire_gpu(barrier);
      if ((n & 255u) == 0) {
        ok = may_wait_on(g, kind, g.rank, kNotResident, gridDim.x, come, start);
      }
    }
  }
  return __syncthreads_and(ok) != 0;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_GROUP_SYNC_CUH_
