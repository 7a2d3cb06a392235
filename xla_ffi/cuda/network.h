// The network between nodes, as the handlers use it: which groups lie on several nodes, and what their
// kernels need beside the view of this node.
#ifndef JAX_EP_XLA_FFI_CUDA_NETWORK_H_
#define JAX_EP_XLA_FFI_CUDA_NETWORK_H_

#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda/network/network.h"
#include "cuda/network/region.h"
#include "xla_ffi/calls.h"

namespace jax_ep {

// A call of a group across nodes.
struct NetworkCall {
  gpu::NetworkPart part;
  gpu::NetworkRegion region;
  gpu::NetworkGroup group;
  gpu::NodesView nodes;
  bool has_slots;  // the job has slots across nodes, of which this group may have none
  int32_t node;    // this rank's; `region.ranks_per_node` ranks one after the other are one

  int first_rank() const { return node * region.ranks_per_node; }
};

// Of this process, which has one device then. A process is one of NVSHMEM's ranks, by its number.
class Network {
 public:
  // Never destroyed.
  static Network& Get();

  // After NVSHMEM has started: from here on groups may lie on several nodes. `hosts`, by process: equal
  // names are one node; `ranks_per_node`, if not 0, counts instead, wherever ranks are. `has_slots`:
  // whether small calls go through slots. All processes agree on these.
  void Join(const gpu::NetworkPart& part, const std::vector<std::string>& hosts,
            int64_t ranks_per_node, bool has_slots);

  // Before NVSHMEM's end. No call may be on its way to a device.
  void Leave();

  // Of the group of these members (process << 32 | id), by rank: fills `call` if it lies on several
  // nodes and there is a network; why that cannot be, in words. The first group of the process has
  // the region until Leave, or until another one has asked for it.
  std::optional<std::string> Find(const int64_t* members, int num_ranks, int rank,
                                  std::optional<NetworkCall>* call);

 private:
  // Ranks of each node, one after the other; 0 if they do not lie like that.
  int RanksPerNode(const int64_t* members, int num_ranks) const;

  std::mutex mutex_;
  std::optional<gpu::NetworkPart> part_;
  std::vector<int64_t> node_of_process_;
  int64_t ranks_per_node_ = 0;
  bool has_slots_ = false;
  std::vector<int64_t> members_;      // of the group that has the region
  std::optional<NetworkCall> found_;  // of that group, unless another has been refused
  bool has_refused_group_ = false;
};

// What kernels over the network do not take of a call, in words.
std::optional<std::string> NetworkProblem(const NetworkCall& network, const LayoutCall& call);
std::optional<std::string> NetworkProblem(const NetworkCall& network, const DispatchCall& call);
std::optional<std::string> NetworkProblem(const NetworkCall& network, const CombineCall& call);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_NETWORK_H_
