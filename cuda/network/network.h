// The seam of the part that knows NVSHMEM, which is a library of its own: what host code passes to its
// kernels, and what it hands to the handlers, which do not link it.
#ifndef JAX_EP_CUDA_NETWORK_NETWORK_H_
#define JAX_EP_CUDA_NETWORK_NETWORK_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/network/layout.h"
#include "cuda/network/rail/rail.h"
#include "cuda/network/slots.h"

namespace jax_ep::gpu {

// Whether rows arrive (cuda/network/link_check.cuh).
inline constexpr int kLinkRowBytes = 1024;
inline constexpr int kLinkThreads = 512;
constexpr size_t link_check_bytes(int num_ranks) {
  return size_t{2} * static_cast<size_t>(num_ranks) * kLinkRowBytes;
}

enum LinkResult : uint32_t {
  kLinkUnknown,  // the kernel has not come to it
  kLinkGood,
  kLinkSilent,  // no row came
  kLinkWrong,   // the signal came before its row, or the row is another
};

struct LinkCheck {
  char* bytes;          // link_check_bytes(num_ranks), of the hop's memory
  uint64_t* signals;    // [num_ranks], of the hop's memory
  LinkResult* results;  // [num_ranks], by rank
  uint64_t round;
  uint64_t timeout_ns;
  int32_t rank, num_ranks;
};

// Over NVSHMEM.
cudaError_t LaunchLinkCheck(const LinkCheck& check, cudaStream_t stream);

// A group across nodes, as one of its ranks sees it: beside GroupView, which is of its own node.
struct NetworkGroup {
  NetworkView layout;
  RailView dispatch, combine;
  FarView slots;
  uint16_t pe[kMaxNetworkRanks];  // by rank of the group: its number among NVSHMEM's
};

// What handlers need of the network. All pointers stay for the life of the process, but for the
// region, which is there while NVSHMEM runs.
struct NetworkPart {
  size_t control_bytes, view_bytes;  // of ControlBlock and GroupView: the two libraries must agree
  char* region;                      // of this device (cuda/network/region.h)
  int64_t region_bytes;
  int32_t num_processes;  // of the job, each of which has one device
  cudaError_t (*launch_layout)(const GroupView& group, const NetworkGroup& network,
                               const LayoutArguments& arguments, int num_sms, cudaStream_t stream);
  cudaError_t (*launch_dispatch)(const GroupView& group, const NetworkGroup& network,
                                 const DispatchArguments& arguments, int num_sms,
                                 cudaStream_t stream);
  cudaError_t (*launch_combine)(const GroupView& group, const NetworkGroup& network,
                                const CombineArguments& arguments, int num_sms,
                                cudaStream_t stream);
  // In place of a call that is refused since the group is broken (cuda/network/tell.cuh).
  cudaError_t (*launch_tell)(const GroupView& group, const NetworkGroup& network,
                             cudaStream_t stream);
  // In slots.
  cudaError_t (*launch_layout_and_dispatch)(const GroupView& group, const NetworkGroup& network,
                                            const LayoutAndDispatchArguments& arguments,
                                            int num_sms, cudaStream_t stream);
  cudaError_t (*launch_combine_in_slots)(const GroupView& group, const NetworkGroup& network,
                                         const CombineArguments& arguments, int num_sms,
                                         cudaStream_t stream);
};
inline constexpr char kNetworkPartName[] = "jax_ep.NetworkPart";  // of Python's capsule of one
// With the launches over NVSHMEM; the rest is the host's.
NetworkPart MakeNetworkPart();

// Loads the kernels on the current device: their first launch must not be while a peer waits.
cudaError_t PrepareNetworkKernels(bool has_slots);

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_NETWORK_H_
