// nvshmem_hop: the network of hop.cuh as NVSHMEM gives it, by whatever transport it has chosen.
//
// A rank is a processing element (PE). Which queue pair a call takes NVSHMEM decides; flush
// completes what the whole rank has issued, on all of them. To peers whose heap is mapped here
// (P2P: ranks of one node, in tests, or of nodes that NVLink spans) rows are stored by the calling
// warp, here, for NVSHMEM's loop waits for each vector. NvshmemHop counts
// the job's ranks, NvshmemGroupHop those of a group, which may be some of them in another order.
#ifndef JAX_EP_CUDA_NETWORK_NVSHMEM_HOP_CUH_
#define JAX_EP_CUDA_NETWORK_NVSHMEM_HOP_CUH_

#include <nvshmem.h>

#include "cuda/network/hop.cuh"
#include "cuda/network/network.h"
#include "cuda/network/warp_copy.cuh"

namespace jax_ep::gpu {

struct NvshmemHop {
  __device__ int process_of(int rank) const { return rank; }

  template <typename MayGoOn>
  __device__ bool put(int /*queue*/, int rank, void* dst, const void* src, size_t num_bytes,
                      MayGoOn& /*may_go_on*/) const {
    nvshmemx_putmem_nbi_warp(dst, src, num_bytes, rank);
    return true;
  }

  template <typename MayGoOn>
  __device__ bool put_signal(int /*queue*/, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& /*may_go_on*/) const {
    auto* mapped = static_cast<char*>(nvshmem_ptr(dst, rank));
    const bool is_vectors =
        (reinterpret_cast<uint64_t>(dst) | reinterpret_cast<uint64_t>(src) | num_bytes) % 16 == 0;
    if (mapped != nullptr && is_vectors) {
      __syncwarp();
      copy_by_warp(mapped, static_cast<const char*>(src), static_cast<int64_t>(num_bytes));
      __syncwarp();
      if (is_first_lane()) {
        fence_acq_rel_sys();
        st_relaxed_sys(static_cast<uint64_t*>(nvshmem_ptr(signal, rank)), value);
      }
      __syncwarp();
      return true;
    }
    nvshmemx_putmem_signal_nbi_warp(dst, src, num_bytes, signal, value, NVSHMEM_SIGNAL_SET, rank);
    return true;
  }

  template <typename MayGoOn>
  __device__ bool add_signal(int /*queue*/, int rank, uint64_t* signal, uint64_t value,
                             MayGoOn& /*may_go_on*/) const {
    __syncwarp();
    if (is_first_lane()) nvshmemx_signal_op(signal, value, NVSHMEM_SIGNAL_ADD, rank);
    __syncwarp();
    return true;
  }

  template <typename MayGoOn>
  __device__ bool wait_signal(const uint64_t* signal, uint64_t at_least, MayGoOn& may_go_on) const {
    return wait_for_signal(signal, at_least, may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool flush(int /*queue*/, MayGoOn& /*may_go_on*/) const {
    __syncwarp();
    if (is_first_lane()) nvshmem_quiet();
    __syncwarp();
    return true;
  }
};

struct NvshmemGroupHop : NvshmemHop {
  uint16_t pe[kMaxNetworkRanks];  // by rank of the group

  __device__ int process_of(int rank) const { return pe[rank]; }

  template <typename MayGoOn>
  __device__ bool put(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                      MayGoOn& may_go_on) const {
    return NvshmemHop::put(queue, pe[rank], dst, src, num_bytes, may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool put_signal(int queue, int rank, void* dst, const void* src, size_t num_bytes,
                             uint64_t* signal, uint64_t value, MayGoOn& may_go_on) const {
    return NvshmemHop::put_signal(queue, pe[rank], dst, src, num_bytes, signal, value, may_go_on);
  }

  template <typename MayGoOn>
  __device__ bool add_signal(int queue, int rank, uint64_t* signal, uint64_t value,
                             MayGoOn& may_go_on) const {
    return NvshmemHop::add_signal(queue, pe[rank], signal, value, may_go_on);
  }
};

// Of a group.
inline NvshmemGroupHop HopOf(const NetworkGroup& network) {
  NvshmemGroupHop hop;
  for (int r = 0; r < kMaxNetworkRanks; ++r) hop.pe[r] = network.pe[r];
  return hop;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_NVSHMEM_HOP_CUH_
