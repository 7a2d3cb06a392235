// simulated_hop: a network of hop.cuh for tests, between ranks of one process on one GPU, which
// reorders all that hop.cuh does not promise to be in order.
//
// Protocol: a queue pair is a ring of descriptors in host memory, for one queue and one destination.
//           [Q1] a warp takes the next number of the pair, by an atomic addition to `posted`, and
//                waits until the descriptor of kRingSlots numbers before is done.
//           [Q2] it writes the descriptor, and stores its number + 1 to `sequence`, releasing. The
//                network (tests/native/simulated_network.h) acquires that, and takes descriptors in
//                the order of their numbers.
//           [Q3] the network carries them out, and stores how many are done, in that order, to `done`,
//                releasing. flush acquires it.
//           [Q4] signals lie in host memory; the network stores to them, releasing, when their
//                model says that it may. Bytes are copied by copy engines, and are there by then.
// Reuse:    a descriptor by [Q1]; its words stay as they were until then.
// Progress: the network's thread waits for no kernel. Its copies need a copy engine, or SMs that
//           waiting kernels leave free.
// Failure:  a warp whose wait in [Q1] has been ended posts nothing under its number, and later ones of
//           the pair are never carried out: the group is broken then.
#ifndef JAX_EP_CUDA_NETWORK_SIMULATED_HOP_CUH_
#define JAX_EP_CUDA_NETWORK_SIMULATED_HOP_CUH_

#include "cuda/network/hop.cuh"

namespace jax_ep::gpu {

enum NetworkOperation : uint32_t { kPut = 1, kAddSignal = 2, kSetSignal = 4 };

struct alignas(64) NetworkDescriptor {
  uint64_t dst, src;  // offsets in the bytes of the two ranks
  uint64_t num_bytes;
  uint64_t signal;  // its index
  uint64_t value;
  uint64_t operation;  // NetworkOperations, or-ed
  uint64_t unused;
  uint64_t sequence;  // written last: its number + 1
};
inline constexpr uint64_t kRingSlots = 64;

struct SimulatedHop {
  NetworkDescriptor* ring;  // [num_queues][num_ranks][kRingSlots], host memory
  uint64_t* posted;         // [num_queues][num_ranks], this device's memory
  const uint64_t* done;     // [num_queues][num_ranks], host memory
  HopMemory own;
  int num_queues, num_ranks;

  __device__ int process_of(int rank) const { return rank; }

  template <typename MayGoOn>
  __device__ bool put(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                      MayGoOn& may_go_on) const {
    return post(queue, rank, {offset_of(dst), offset_of(src), num_bytes, 0, 0, kPut, 0, 0},
                may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool put_signal(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& may_go_on) const {
    return post(queue, rank,
                {offset_of(dst), offset_of(src), num_bytes, index_of(signal), value,
                 kPut | kSetSignal, 0, 0},
                may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool add_signal(int queue, int rank, uint64_t* signal, uint64_t value,
                             MayGoOn& may_go_on) const {
    return post(queue, rank, {0, 0, 0, index_of(signal), value, kAddSignal, 0, 0}, may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool wait_signal(const uint64_t* signal, uint64_t at_least, MayGoOn& may_go_on) const {
    return wait_for_signal(signal, at_least, may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool flush(int queue, MayGoOn& may_go_on) const {
    bool is_done = true;
    if (is_first_lane()) {
      for (int rank = 0; rank < num_ranks && is_done; ++rank) {
        const int pair = pair_of(queue, rank);
        is_done = poll_at_least([&] { return ld_acquire_sys(&done[pair]); },
                                ld_relaxed_gpu_u64(&posted[pair]), may_go_on);  // [Q3]
      }
    }
    return said_to_warp(is_done);
  }

 private:
  __device__ int pair_of(int queue, int rank) const {
    return queue % num_queues * num_ranks + rank;
  }
  __device__ uint64_t offset_of(const void* address) const {
    return static_cast<uint64_t>(static_cast<const char*>(address) - own.bytes);
  }
  __device__ uint64_t index_of(const uint64_t* signal) const {
    return static_cast<uint64_t>(signal - own.signals);
  }

  template <typename MayGoOn>
  __device__ bool post(int queue, int rank, NetworkDescriptor descriptor,
                       MayGoOn& may_go_on) const {
    bool is_posted = true;
    __syncwarp();
    if (is_first_lane()) {
      const int pair = pair_of(queue, rank);
      const uint64_t number = atom_add_relaxed_gpu(&posted[pair], 1);  // [Q1]
      if (number >= kRingSlots) {
        is_posted = poll_at_least([&] { return ld_acquire_sys(&done[pair]); },
                                  number - kRingSlots + 1, may_go_on);
      }
      if (is_posted) {
        NetworkDescriptor* slot = ring + pair * kRingSlots + number % kRingSlots;
        descriptor.sequence = slot->sequence;
        *slot = descriptor;
        st_release_sys(&slot->sequence, number + 1);  // [Q2]
      }
    }
    return said_to_warp(is_posted);
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_SIMULATED_HOP_CUH_
