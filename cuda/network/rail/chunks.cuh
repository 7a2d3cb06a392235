// How chunks go over a rail, and come. cuda/network/rail/dispatch.cuh states the protocol, [R1] to [R4].
#ifndef JAX_EP_CUDA_NETWORK_RAIL_CHUNKS_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_CHUNKS_CUH_

#include "cuda/launch.h"
#include "cuda/network/hop.cuh"
#include "cuda/network/hop_wait.cuh"
#include "cuda/network/rail/rail.h"
#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu::rail {

// One of the block's channels to the peers on its rail, in one call. By whole warps; what is false is so on all
// lanes, and then the group is broken. `first` is the first chunk of the call, to or from that node.
template <typename Hop>
class Channel {
 public:
  __device__ Channel(const GroupView& g, const RailView& rail, const Hop& hop, OpKind kind,
                     int32_t of_block)
      : g_(g),
        rail_(rail),
        hop_(hop),
        kind_(kind),
        channel_(static_cast<int32_t>(blockIdx.x) * channels_per_block(rail.at.num_nodes) +
                 of_block) {}

  __device__ RailChunks& chunks(int32_t node) const { return rail_.chunks_of(node, channel_); }
  __device__ char* staging(int32_t node, uint64_t chunk) const {
    return rail_.at.staging(rail_.memory, node, channel_, chunk);
  }
  __device__ char* landing(int32_t node, uint64_t chunk) const {
    return rail_.at.landing(rail_.memory, node, channel_, chunk);
  }

  // [R1] Before the first credit of this call the peer may not have come to it.
  __device__ bool await_credit(int32_t node, uint64_t chunk, uint64_t first) const {
    const auto num_slots = static_cast<uint64_t>(rail_.at.num_slots);
    if (chunk < num_slots) return true;
    const uint64_t read = chunk - num_slots + 1;
    HopWait wait(g_, kind_, slot_of(node));
    return hop_.wait_signal(rail_.at.credit(rail_.memory, node, channel_), read,
                            wait.until(read <= first + 1 ? kStart : kProgress, read));
  }
  // [R2] What lies in staging behind the head, of so many bytes in all.
  __device__ bool send(int32_t node, uint64_t chunk, int32_t num_rows, bool is_last,
                       int64_t num_bytes) const {
    char* from = staging(node, chunk);
    if (is_first_lane()) {
      *reinterpret_cast<ChunkHead*>(from) = {g_.operation, chunk, static_cast<uint32_t>(num_rows),
                                             is_last, 0};
    }
    const uint64_t use = rail_.at.use_of(chunk);
    HopWait wait(g_, kind_, slot_of(node));
    return hop_.put_signal(channel_, rank_of(node), landing(rail_.node, chunk), from,
                           static_cast<size_t>(num_bytes),
                           rail_.at.filled(rail_.memory, rail_.node, channel_, chunk), use,
                           wait.until(kProgress, use));
  }
  // [R3]
  __device__ bool receive(int32_t node, uint64_t chunk, uint64_t first, ChunkHead& head) const {
    const uint64_t use = rail_.at.use_of(chunk);
    HopWait wait(g_, kind_, slot_of(node));
    if (!hop_.wait_signal(rail_.at.filled(rail_.memory, node, channel_, chunk), use,
                          wait.until(chunk == first ? kStart : kProgress, use))) {
      return false;
    }
    head = *reinterpret_cast<const ChunkHead*>(landing(node, chunk));
    if (head.operation == g_.operation) return true;
    if (is_first_lane()) {
      break_group(g_, kind_, slot_of(node), kOtherCall, g_.operation, head.operation);
    }
    return false;
  }
  // [R4]
  __device__ bool give_credit(int32_t node, uint64_t chunk) const {
    HopWait wait(g_, kind_, slot_of(node));
    return hop_.add_signal(channel_, rank_of(node),
                           rail_.at.credit(rail_.memory, rail_.node, channel_), 1,
                           wait.until(kProgress, chunk + 1));
  }

 private:
  __device__ int32_t rank_of(int32_t node) const { return rail_.rank_of(node, g_.rank); }
  __device__ int slot_of(int32_t node) const {
    return slot_of_process(hop_.process_of(rank_of(node)));
  }

  const GroupView& g_;
  const RailView& rail_;
  const Hop& hop_;
  const OpKind kind_;
  const int32_t channel_;
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_CHUNKS_CUH_
