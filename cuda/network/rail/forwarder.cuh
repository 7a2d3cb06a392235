// A warp that brings rows of other nodes to the ranks of this one, and one that does so with rows of
// its own. cuda/network/rail/dispatch.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_FORWARDER_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_FORWARDER_CUH_

#include "cuda/core/placement.h"
#include "cuda/launch.h"
#include "cuda/network/rail/chunks.cuh"
#include "cuda/network/rail/row_mover.cuh"

namespace jax_ep::gpu::rail {

// By the lane that has a target: stores the weight; where the row goes, 0 if nowhere.
__device__ inline uint64_t deliver(const DispatchArguments& a, const Shared& shared,
                                   const RowTarget& target) {
  if (target.row == kNoRow) return 0;
  const uint64_t* address = shared.address[target.index];
  if (a.topk_weights != nullptr) {
    reinterpret_cast<float*>(address[kWeights])[target.row] = target.weight;
  }
  return address[kTokens] + static_cast<uint64_t>(target.row * a.row_bytes);
}

template <typename Hop>
class Forwarder {
 public:
  __device__ Forwarder(const Channel<Hop>& channel, const DispatchArguments& a, const Plan& plan,
                       Shared& shared, RowMover& mover)
      : channel_(channel),
        a_(a),
        plan_(plan),
        shared_(shared),
        mover_(mover),
        format_(dispatch_chunks(a.top_k, a.row_bytes)),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  // All rows that a node sends over the block's channel. False if the group is broken.
  __device__ bool forward(int32_t node) {
    RailChunks& chunks = channel_.chunks(node);
    const uint64_t first = chunks.received;
    uint64_t chunk = first;
    for (bool is_last = false; !is_last; ++chunk) {
      ChunkHead head;
      if (!channel_.receive(node, chunk, first, head)) return false;  // [R3]
      fence_proxy_async_global();
      __syncwarp();
      forward_rows(channel_.landing(node, chunk),
                   min(static_cast<int32_t>(head.num_rows), plan_.rows_per_chunk));
      is_last = head.is_last != 0;
      if (!channel_.give_credit(node, chunk)) return false;  // [R4]
    }
    if (lane_ == 0) chunks.received = chunk;
    return true;
  }

 private:
  // All have been read from the chunk when this returns.
  __device__ void forward_rows(char* landing, int32_t num_rows) {
    RowTarget next = target_of(landing, 0, num_rows);
    for (int32_t i = 0; i < num_rows; ++i) {
      const RowTarget target = next;
      next = target_of(landing, i + 1, num_rows);
      mover_.move(format_.row(landing, i), a_.row_bytes, deliver(a_, shared_, target));
    }
    mover_.drain();
  }

  __device__ RowTarget target_of(char* landing, int32_t i, int32_t num_rows) const {
    const auto top_k = static_cast<int32_t>(a_.top_k);
    if (i >= num_rows || lane_ >= top_k) return {kNoRow, 0.0f, 0};
    const char* head = format_.row_head(landing, i);
    return {reinterpret_cast<const int32_t*>(head)[lane_],
            reinterpret_cast<const float*>(head)[top_k + lane_],
            reinterpret_cast<const uint8_t*>(head)[8 * top_k + lane_]};
  }

  const Channel<Hop>& channel_;
  const DispatchArguments& a_;
  const Plan& plan_;
  Shared& shared_;
  RowMover& mover_;
  const ChunkFormat format_;
  const int32_t lane_;
};

// Of the tokens [begin, end) every stride-th: their rows on this node.
__device__ inline void move_own_rows(const RailView& rail, const DispatchArguments& a,
                                     const Shared& shared, RowMover& mover, int32_t begin,
                                     int32_t end, int32_t stride) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const auto num_local = static_cast<int32_t>(a.num_local_experts);
  const int32_t on_node = num_local * rail.ranks_per_node, first_expert = rail.node * on_node;
  const auto target_of = [&](int32_t token) -> RowTarget {
    if (token >= end || lane >= a.top_k) return {kNoRow, 0.0f, 0};
    const int64_t flat = token * a.top_k + lane;
    const int32_t row = a.send_row[flat], expert = a.topk_idx[flat] - first_expert;
    if (row == kNoRow || expert < 0 || expert >= on_node) return {kNoRow, 0.0f, 0};
    return {row, a.topk_weights != nullptr ? a.topk_weights[flat] : 0.0f,
            static_cast<uint8_t>(expert / num_local)};
  };
  RowTarget next = target_of(begin);
  for (int32_t token = begin; token < end; token += stride) {
    const RowTarget target = next;
    next = target_of(token + stride);
    mover.move(static_cast<const char*>(a.x) + token * a.row_bytes, a.row_bytes,
               deliver(a, shared, target));
  }
}

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_FORWARDER_CUH_
