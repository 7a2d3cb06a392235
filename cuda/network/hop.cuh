// hop: what a kernel may ask of the network between nodes, and what it may then rely on.
//
// A hop is an object with the five calls below; kernels are templates over it, and know no other
// way to another node. Peers on this node are reached as ever, never through a hop. Instances:
// NVSHMEM (nvshmem_hop.cuh) and a simulated network for tests (simulated_hop.cuh).
//
// Memory:   each rank has two regions of the same size and layout as all others (HopMemory): bytes,
//           which are sent from and arrive in, and signals, 64-bit words, all 0 at the start. An
//           address of a peer is written as this rank's own address of the same place.
// Calls:    all lanes of a warp make a call together, with equal arguments. `queue` says over which
//           of the queue pairs to `rank` to go, modulo how many there are. It spreads load and is a
//           wish, no more: nothing may be built on two calls having the same one.
//             put(queue, rank, dst, src, num_bytes)
//             put_signal(queue, rank, dst, src, num_bytes, signal, value)   then signal = value
//             add_signal(queue, rank, signal, value)      signal += value, as one operation
//             wait_signal(signal, at_least)               until this rank's own word is that
//             flush(queue)                                see [F]
//           Beside them process_of(rank) is the number of its process, by which records name it.
//           Bytes are rows, one behind the other; addresses and sizes are multiples of 8.
//           Each has a last argument, `may_go_on`, which a wait asks now and then (poll_at_least);
//           if that says no the call returns false, and has done nothing that can be relied on.
// Order:    what may be relied on, and nothing else:
//           [B] before a call: what the lanes have stored to `src`, or have acquired, is sent.
//           [D] put_signal: who sees the value, or a later one of that word, by wait_signal sees the
//               bytes of that same call. Other calls are ordered by it in no way, earlier ones to the
//               same rank neither.
//           [A] add_signal is ordered after what flush has returned for before it, by nothing else.
//               In particular not after a put of the same queue.
//           [F] flush: what this warp has put and added to `queue`, whatever the rank, is done: bytes
//               are where they belong, `src` may be written again.
//           [W] wait_signal acquires, for all lanes, what [D] or [F] with [A] has made visible.
//               Who then reads by bulk copies fences that proxy first, as for any other store.
//           [C] who is told by a signal of a peer, sent after that peer saw [D]'s value, that the
//               bytes have arrived may write `src` again without a flush: they have been read.
// Signals:  a word never falls. Either it is set, by put_signal, by one warp of one rank whose next
//           value waits for the peer's answer to this one (without that, two values may arrive in
//           the other order); or it is added to, by anybody. Nobody does both to one word.
// Sources:  what is promised is what is common to all that a hop may be made of.
//           NVSHMEM's documentation: puts of one rank are delivered in any order; put_signal updates
//           its signal after its own data and promises nothing of others; nvshmem_quiet completes all
//           that the rank has issued; nvshmemx_signal_op is ordered by nvshmem_fence or nvshmem_quiet.
//           NVSHMEM 3.4.5, ibgda_device.cuh: the queue pair of a call follows from the number of
//           block, SM or warp (NVSHMEM_IBGDA_RC_MAP_BY), and with several NICs from a counter, so that
//           two calls of one warp may go over two of them; put_signal is write and atomic on one
//           queue pair; quiet and fence wait for all queue pairs to all ranks, one after the other,
//           so they are not for the hot path. Over CPU proxy (transfer_device.cuh) and in peer-mapped
//           memory more is ordered than is promised: a mistake does not show there.
//           Reliable connections (RC) execute a write before a later atomic of the same queue pair and
//           order nothing between pairs; EFA (SRD) orders nothing but what its provider makes of a put
//           with signal. The simulated network has a model of each.
// Failure:  flush over NVSHMEM cannot be asked to end: it returns when the NIC has given up on a dead
//           peer, after its retries, and IBGDA may then end in a device assertion. So kernels wait for
//           signals, by [C], where they can.
#ifndef JAX_EP_CUDA_NETWORK_HOP_CUH_
#define JAX_EP_CUDA_NETWORK_HOP_CUH_

#include <cstddef>
#include <cstdint>

#include "cuda/network/hop_memory.h"
#include "cuda/ptx/memory.cuh"

namespace jax_ep::gpu {

__device__ inline bool is_first_lane() { return threadIdx.x % 32 == 0; }

// By one lane: loads until the value is at least that; false if `may_go_on(seen)`, which is asked
// after every 256 loads, says so before.
template <typename Load, typename MayGoOn>
__device__ inline bool poll_at_least(const Load& load, uint64_t at_least, MayGoOn& may_go_on) {
  for (uint32_t n = 1;; ++n) {
    const uint64_t seen = load();
    if (seen >= at_least) return true;
    if ((n & 255u) == 0 && !may_go_on(seen)) return false;
  }
}

// What its first lane says, to all lanes of a warp; what it has acquired is theirs, too.
__device__ inline bool said_to_warp(bool answer) {
  const bool said = __shfl_sync(~0u, answer, 0);
  __syncwarp();
  return said;
}

// wait_signal of every instance: a signal is a word of this device's memory, or its host's.
template <typename MayGoOn>
__device__ inline bool wait_for_signal(const uint64_t* signal, uint64_t at_least,
                                       MayGoOn& may_go_on) {
  const auto load = [&] { return ld_acquire_sys(signal); };
  return said_to_warp(!is_first_lane() || poll_at_least(load, at_least, may_go_on));
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_HOP_CUH_
