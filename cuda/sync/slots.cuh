// slots: what a call sends goes into peers' slots in one hop, without a start or an end handshake,
// without fences.
//
// Protocol: per pair of ranks p and q, e = calls finished by the pair + 1, of whatever kind:
//           [I1] p stores sixteen bytes into q's area of p and e as one: an entry, which says e, or
//                an atom, three words and the tag of e; [I2] q knows what is in it as soon as it
//                reads that beside it. There is no order with anything else.
//           [W1] the first block of p stores e, with the operation, in q's flag of p: for every peer, also
//                if it has nothing for it
//           [W2] a block of q waits for the flag of every peer before it is done
// Reuse:    areas alternate by the parity of e. p writes into the area of e in its call e, so it has
//           finished e - 1. In that call it has seen a sign of q's kernel of e - 1: [W2], which waits
//           for each peer, or the start mail, [S2], of a call of the general kind. That kernel came
//           after q's kernel of e - 2 on q's stream, and with it after all that q has read of the area
//           of e - 2, which is that of e. So p never writes what q has yet to read, whatever calls
//           and groups come between: a pair's epoch counts all of its calls, in an order that is the
//           same on both sides. A rank that q has nothing from must be waited for all the same: else
//           nothing keeps it from being two calls ahead.
//           What is read as of e is of e: places hold nothing else than entries, or than atoms, and
//           epochs only grow. A tag is 31 bits of the epoch, and comes again; but an atom is cleared
//           long before ([C3] clears some of the areas of e, of which q has read what it wants and p
//           will write no more before q's kernel of e + 1; but rows that q drops come when they
//           come). [W1] and [W2] need no order of their own: kernels of a stream have one. A flag
//           may be read as e + 1: then p has finished e, and has compared operations; so only a
//           flag of e is looked at for that.
// Progress: [I1] and [W1] wait for nothing. The first blocks of a grid send all that it sends, and are
//           done; those that wait come after them. Blocks begin in order, and do not wait for others
//           of their grid, so fewer SMs than blocks will do, on any rank. A grid of one block sends
//           all before its first wait.
// Failure:  the waits end as give_up.cuh says: as for a peer that has not come, while it has not sent
//           its flag; then as for one that does not go on. Slots belong to the device, not to XLA,
//           and stay while peers live: who comes late writes there and harms nobody. So nobody has
//           to be seen out, and a call in slots enters no peer's door (leave.cuh). A call that is
//           refused, or finds the group broken or left by its host, sends nothing, for each block
//           asks before it sends; another of the group tells the peers.
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
enum SlotBreak { kNoBreak, kBreakTag, kBreakParity, kBreakWait };
#ifdef JAX_EP_BREAK_SLOTS
inline constexpr SlotBreak kSlotBreak = static_cast<SlotBreak>(JAX_EP_BREAK_SLOTS);
#else
inline constexpr SlotBreak kSlotBreak = kNoBreak;
#endif

// The areas of a call, by rank; in shared memory.
struct SlotAreas {
  uint64_t epoch[kMaxPeers];
  char* there[kMaxPeers];  // where this rank writes at each peer
  char* here[kMaxPeers];   // where each peer writes at this rank
};

__device__ inline SlotEntry* entries_of(char* area) { return reinterpret_cast<SlotEntry*>(area); }
__device__ inline SlotAtom* atoms_of(char* area) {
  return reinterpret_cast<SlotAtom*>(area + kSlotAtomsOffset);
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
    areas.here[r] = reinterpret_cast<char*>(g.control) +
                    slot_area_offset(g.slot_area_bytes, peer.slot_here, parity);
  }
  return threadIdx.x == kLooker ? !is_broken(g, kind) : is_claimed;
}
// Then, with its answer: false if the block may send nothing; the same on all threads. Between the
// two is room for what others do not see.
__device__ inline bool may_send_slots(const GroupView& g, bool may_send, const SlotAreas& areas) {
  if (__syncthreads_and(may_send) == 0) {
    if (blockIdx.x == 0) refuse_start(g);
    return false;
  }
  const int r = static_cast<int>(threadIdx.x);
  if (blockIdx.x == 0 && r < g.num_ranks && r != g.rank) {
    const PeerView& peer = g.peer[r];
    st_relaxed_sys_b128(&peer.control->slot_flag[peer.slot_there], g.operation,
                        areas.epoch[r]);  // [W1]
  }
  return true;
}

// [I1]
__device__ inline void send_entry(const SlotAreas& areas, int rank, int32_t i, int32_t id,
                                  float weight) {
  const uint64_t value = static_cast<uint32_t>(id) | uint64_t{__float_as_uint(weight)} << 32;
  st_relaxed_sys_b128(entries_of(areas.there[rank]) + i, value, areas.epoch[rank]);
}
__device__ inline void send_atom(SlotAtom* to, uint32_t a, uint32_t b, uint32_t c, uint32_t tag) {
  st_relaxed_sys_b128(to, a | uint64_t{b} << 32, c | uint64_t{tag} << 32);
}
// [I2]: false if it is not of the call yet.
__device__ inline bool read_atom(const SlotAtom* from, uint32_t tag, uint32_t& a, uint32_t& b,
                                 uint32_t& c) {
  uint64_t low, high;
  ld_relaxed_sys_b128(from, low, high);
  a = static_cast<uint32_t>(low);
  b = static_cast<uint32_t>(low >> 32);
  c = static_cast<uint32_t>(high);
  return kSlotBreak == kBreakTag || static_cast<uint32_t>(high >> 32) == tag;
}

// By each thread, for all its waits for what a peer sends to the slots, one after the other.
class SlotWait {
 public:
  __device__ SlotWait(const GroupView& g, OpKind kind) : g_(g), kind_(kind), wait_(g, kind) {}

  // After each poll of a wait that has found nothing, the n-th from 1 on: as Wait's. The wait's time
  // counts from the 256th one.
  __device__ bool may_go_on(uint32_t n, int rank, uint64_t expected) {
    return ((n & 255u) != 0 && n <= kManyPolls) || look(n, rank, expected);
  }

 private:
  // Some hundred microseconds. From then on a thread leaves its SM, and the link, to others in between.
  static constexpr uint32_t kManyPolls = 1024;
  static constexpr uint32_t kSleepNs = 500;

  // Called and not inlined, as it is rarely of use.
  __device__ __noinline__ bool look(uint32_t n, int rank, uint64_t expected) {
    if ((n & 255u) != 0) {
      __nanosleep(kSleepNs);
      return true;
    }
    // A wait's first look; but n comes to 0, and to 256 again, in waits of more than an hour.
    if (n == 256 && last_look_ != 0) wait_.restart();
    last_look_ = n;
    const int slot = slot_of(g_, rank);
    uint64_t operation, seen;
    // The pair's call of this epoch is of the general kind, at the peer.
    ld_acquire_sys_b128(&g_.control->start[slot].shown[kNumAddresses], operation, seen);
    const bool is_general = seen == expected;
    if (!is_general) ld_relaxed_sys_b128(&g_.control->slot_flag[slot], operation, seen);
    if (is_general || (seen == expected && operation != g_.operation)) {
      break_group(g_, kind_, slot, kOtherCall, g_.operation, operation);
      return false;
    }
    const uint32_t phase = seen >= expected ? kEnd : kStart;
    if (phase != phase_) wait_.restart();
    phase_ = phase;
    return wait_.may_go_on(slot, phase, expected, seen);
  }

  const GroupView& g_;
  const OpKind kind_;
  Wait wait_;
  uint32_t phase_ = kStart;
  uint32_t last_look_ = 256;  // its n
};

// [W2], by a warp of one block. False on a lane that finds the group broken.
__device__ inline bool receive_slot_flags(const GroupView& g, OpKind kind, const SlotAreas& areas,
                                          SlotWait& wait) {
#pragma unroll 1
  for (int r = static_cast<int>(threadIdx.x) % 32; r < g.num_ranks; r += 32) {
    if (r == g.rank) continue;
    const int slot = slot_of(g, r);
    const uint64_t epoch = areas.epoch[r];
    uint64_t operation, seen;
    ld_relaxed_sys_b128(&g.control->slot_flag[slot], operation, seen);
    for (uint32_t n = 1; seen < epoch && kSlotBreak != kBreakWait; ++n) {
      if (!wait.may_go_on(n, r, epoch)) return false;
      ld_relaxed_sys_b128(&g.control->slot_flag[slot], operation, seen);
    }
    if (seen == epoch && operation != g.operation) {
      break_group(g, kind, slot, kOtherCall, g.operation, operation);
      return false;
    }
  }
  return true;
}

// The next piece to sweep, of the thread's rank.
__device__ inline uint32_t load_swept(const GroupView& g, const SlotAreas& areas) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return 0;
  return g.control->local.swept[areas.epoch[r] & 1][slot_of(g, r)];
}
// Before end_call, by all threads of the last block, with the answer: clears that piece of each of
// the call's areas.
__device__ inline void sweep_slots(const GroupView& g, const SlotAreas& areas, uint32_t swept) {
  const int r = static_cast<int>(threadIdx.x);
  if (r >= g.num_ranks || r == g.rank) return;
  const uint64_t offset = kSlotAtomsOffset + swept * kSweptBytes;
  const bool is_last = offset + 2 * kSweptBytes > g.slot_area_bytes;
  g.control->local.swept[areas.epoch[r] & 1][slot_of(g, r)] = is_last ? 0 : swept + 1;
  auto* piece = reinterpret_cast<uint4*>(areas.here[r] + offset);
#pragma unroll
  for (uint64_t i = 0; i < kSweptBytes / sizeof(uint4); ++i) piece[i] = uint4{0, 0, 0, 0};
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_SYNC_SLOTS_CUH_
