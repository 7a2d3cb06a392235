// slots: rows and ids go into peers' slots in one hop, without a start or an end handshake.
//
// Protocol: per pair of ranks p and q, e = calls finished by the pair + 1, of whatever kind:
//           [I1] p stores an entry into q's area of p and e: an id, its weight and e, sixteen bytes as
//                one; [I2] q knows the id as soon as it reads e beside it. No fence, no order with
//                anything else.
//           [R1] a block of p stores its rows into that area, and then releases e, with the
//                operation, in q's flag of p and the block's number: to every peer, also if it had no
//                row for it
//           [R2] q's block of the same number acquires the flag of every peer: then it reads rows
// Reuse:    areas alternate by the parity of e. p writes into the area of e in its call e, so it has
//           finished e - 1. In that call it has seen a sign of q's kernel of e - 1: [R2], which waits
//           for each peer, or the start mail, [S2], of a call of the general kind. That kernel came
//           after q's kernel of e - 2 on q's stream, and with it after all that q has read of the area
//           of e - 2, which is that of e. So p never writes what q has yet to read, whatever calls
//           and groups come between: a pair's epoch counts all of its calls, in an order that is the
//           same on both sides. A rank that q has nothing from must be waited for all the same: else
//           nothing keeps it from being two calls ahead.
//           An entry's place is only ever written as an entry, and a pair's epoch only grows: one
//           that is read as e is of e. A flag may be read as e + 1: then p has finished e, and has
//           compared operations; so only a flag of e is looked at for that.
// Progress: [I1] and [R1] wait for nothing; a block sends all it has before its first wait. Blocks of
//           a grid do not wait for each other, and begin in order. [R2] is for the peers' blocks of
//           the same number: with that alone, in combine, fewer SMs than blocks will do. [I2] is for
//           the ids of all of a peer's blocks: one rank of a call may have fewer SMs than blocks,
//           for its peers have sent all ids; two such ranks, as where processes share a GPU, wait for
//           each other's later blocks until the timeout.
// Failure:  the waits end as give_up.cuh says: as for a peer that has not come, while it has not sent
//           the flag of its first block; then as for one that does not go on. Slots belong to the
//           device, not to XLA, and stay while peers live: who comes late writes there and harms
//           nobody. So nobody has to be seen out, and a call in slots enters no peer's door
//           (leave.cuh). A call that is refused, or finds the group broken or left by its host, sends
//           nothing, for each block asks before it sends; another of the group tells the peers.
//           Calls that differ, which a program may only make by mistake, are found by the operation
//           in a flag; one in slots and one of the general kind by the start mail of that, which has
//           the epoch that the flag should have.
#ifndef JAX_EP_CUDA_SYNC_SLOTS_CUH_
#define JAX_EP_CUDA_SYNC_SLOTS_CUH_

#include "cuda/launch.h"
#include "cuda/memory/slots.h"
#include "cuda/ptx/memory.cuh"
#include "cuda/sync/give_up.cuh"
#include "cuda/sync/grid.cuh"
#include "cuda/sync/start_end.cuh"

namespace jax_ep::gpu {

// Negative controls of the race test: JAX_EP_BREAK_SLOTS is one of these, and takes it away.
enum SlotBreak { kNoBreak, kBreakFence, kBreakParity, kBreakWait };
#ifdef JAX_EP_BREAK_SLOTS
inline constexpr SlotBreak kSlotBreak = static_cast<SlotBreak>(JAX_EP_BREAK_SLOTS);
#else
inline constexpr SlotBreak kSlotBreak = kNoBreak;
#endif

// The areas of a call, by rank; in shared memory.
struct SlotAreas {
  uint64_t epoch[kMaxPeers];
  char* there[kMaxPeers];       // where this rank writes at each peer
  const char* here[kMaxPeers];  // where each peer writes at this rank
};

__device__ inline SlotEntry* entries_of(char* area) { return reinterpret_cast<SlotEntry*>(area); }
__device__ inline const SlotEntry* entries_of(const char* area) {
  return reinterpret_cast<const SlotEntry*>(area);
}

// By all threads of each block, at the start: fills `areas`, for after the next barrier, and looks
// whether the group is broken. False on a thread that knows that the block may send nothing;
// `is_claimed` is what claim_call says.
__device__ inline bool begin_slots(const GroupView& g, OpKind kind, bool is_claimed,
                                   SlotAreas& areas) {
  const int r = static_cast<int>(threadIdx.x);
  if (r < g.num_ranks && r != g.rank) {
    const PeerView& peer = g.peer[r];
    const uint64_t epoch = next_epoch(g, r);
    const uint64_t parity = kSlotBreak == kBreakParity ? 0 : epoch;
    areas.epoch[r] = epoch;
    areas.there[r] = reinterpret_cast<char*>(peer.control) +
                     slot_area_offset(g.slot_area_bytes, peer.slot_there, parity);
    areas.here[r] = reinterpret_cast<const char*>(g.control) +
                    slot_area_offset(g.slot_area_bytes, peer.slot_here, parity);
  }
  return threadIdx.x == kLooker ? !is_broken(g, kind) : is_claimed;
}
// Then, with its answer: false if the block may send nothing; the same on all threads. Between the
// two is room for what others do not see.
__device__ inline bool may_send_slots(const GroupView& g, bool may_send) {
  if (__syncthreads_and(may_send) != 0) return true;
  if (blockIdx.x == 0) refuse_start(g);
  return false;
}

// [I1]
__device__ inline void send_entry(const SlotAreas& areas, int rank, int32_t i, int32_t id,
                                  float weight) {
  const uint64_t value = static_cast<uint32_t>(id) | uint64_t{__float_as_uint(weight)} << 32;
  st_relaxed_sys_b128(entries_of(areas.there[rank]) + i, value, areas.epoch[rank]);
}

// [R1], by all threads of each block, when its rows are stored. Those of the last warps do it, so
// that the others can go on.
__device__ inline void send_slot_flags(const GroupView& g, const SlotAreas& areas) {
  __syncthreads();
  const int r = static_cast<int>(blockDim.x - 1 - threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const PeerView& peer = g.peer[r];
  SlotFlag* flag = &peer.control->slot_flag[peer.slot_there][blockIdx.x];
  if constexpr (kSlotBreak == kBreakFence) {
    st_relaxed_sys_b128(flag, g.operation, areas.epoch[r]);
  } else {
    st_release_sys_b128(flag, g.operation, areas.epoch[r]);  // [R1]
  }
}

// By each thread that waits for what a peer sends to the slots.
class SlotWait {
 public:
  __device__ SlotWait(const GroupView& g, OpKind kind) : g_(g), kind_(kind), wait_(g, kind) {}

  // As Wait's.
  __device__ bool may_go_on(int rank, uint64_t expected, uint64_t seen) {
    const int slot = slot_of(g_, rank);
    // The pair's call of this epoch is of the general kind, at the peer.
    uint64_t operation, mailed;
    ld_acquire_sys_b128(&g_.control->start[slot].shown[kNumAddresses], operation, mailed);
    if (mailed == expected) {
      break_group(g_, kind_, slot, kOtherCall, g_.operation, operation);
      return false;
    }
    const uint64_t first = ld_relaxed_sys(&g_.control->slot_flag[slot][0].epoch);
    const uint32_t phase = first >= expected ? kEnd : kStart;
    if (phase != phase_) wait_.restart();
    phase_ = phase;
    return wait_.may_go_on(slot, phase, expected, seen);
  }

 private:
  const GroupView& g_;
  const OpKind kind_;
  Wait wait_;
  uint32_t phase_ = kStart;
};

// [R2], by all threads of each block. False if the group is broken; the same on all threads.
// `is_needed(r)`: whether there is anything of rank r to be read.
template <typename IsNeeded>
__device__ inline bool receive_slot_flags(const GroupView& g, OpKind kind, const SlotAreas& areas,
                                          const IsNeeded& is_needed) {
  const int r = static_cast<int>(threadIdx.x);
  bool ok = true;
  const bool waits = kSlotBreak != kBreakWait || is_needed(r);
  if (r < g.num_ranks && r != g.rank && waits) {
    const int slot = slot_of(g, r);
    const SlotFlag* flag = &g.control->slot_flag[slot][blockIdx.x];
    const uint64_t epoch = areas.epoch[r];
    uint64_t operation, seen;
    ld_acquire_sys_b128(flag, operation, seen);
    SlotWait wait(g, kind);
    for (uint32_t n = 1; ok && seen < epoch; ++n) {
      if ((n & 255u) == 0) ok = wait.may_go_on(r, epoch, seen);
      ld_acquire_sys_b128(flag, operation, seen);  // [R2]
    }
    if (ok && seen == epoch && operation != g.operation) {
      break_group(g, kind, slot, kOtherCall, g.operation, operation);
      ok = false;
    }
  }
  return __syncthreads_and(ok) != 0;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_SLOTS_CUH_
