// A warp that brings rows of other nodes to the ranks of this one, and one that does so with rows of
// its own. cuda/network/rail/dispatch.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_FORWARDER_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_FORWARDER_CUH_

#include "cuda/core/placement.h"
#include "cuda/launch.h"
#include "cuda/network/rail/chunks.cuh"
#include "cuda/network/rail/row_mover.cuh"

namespace jax_ep::gpu::rail {

// What one lane knows of a row: one of the places where it goes, kNoRow if none.
struct RowTarget {
  int32_t row;
  float weight;
  uint8_t index;  // of the rank on this node
};

// Brings rows that are on this node to its ranks.
class Deliverer {
 public:
  __device__ Deliverer(const DispatchArguments& a, const Shared& shared, RowMover& mover)
      : a_(a), shared_(shared), mover_(mover) {}

  // Of a token of rank src: its row and scales, to where the lanes say. They are read when `drain`
  // returns, and there when `finish` does.
  __device__ void deliver(const char* row, const float* scales, const RowTarget& target,
                          int32_t src, int32_t token) const {
    bool has_row = target.row != kNoRow;
    const uint64_t* address = shared_.address[target.index];
    if (has_row && a_.topk_weights != nullptr) {
      reinterpret_cast<float*>(address[kWeights])[target.row] = target.weight;
    }
    int64_t at = target.row;
    if (!a_.expand) {  // one for each rank
      const uint32_t same = __match_any_sync(~0u, has_row ? target.index : 256);
      has_row = has_row && __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x % 32);
      at = src * a_.num_tokens + token;
    }
    mover_.move(row, a_.row_bytes, has_row ? address[kTokens] + at * a_.row_bytes : 0);
    if (a_.num_scales == 0) return;
    const uint64_t to = has_row ? address[kScales] + at * a_.num_scales * sizeof(float) : 0;
    for (uint32_t left = __ballot_sync(~0u, has_row); left != 0; left &= left - 1) {
      auto* out = reinterpret_cast<float*>(__shfl_sync(~0u, to, __ffs(static_cast<int>(left)) - 1));
      for (int64_t s = threadIdx.x % 32; s < a_.num_scales; s += 32) out[s] = scales[s];
    }
  }
  __device__ void drain() const { mover_.drain(); }

 private:
  const DispatchArguments& a_;
  const Shared& shared_;
  RowMover& mover_;
};

template <typename Hop>
class Forwarder {
 public:
  __device__ Forwarder(const Channel<Hop>& channel, const DispatchArguments& a, const Plan& plan,
                       const Deliverer& deliverer)
      : channel_(channel),
        a_(a),
        plan_(plan),
        deliverer_(deliverer),
        format_(plan.format),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  // All rows that a node sends over the block's channel, which its rank src does. False if the group is
  // broken.
  __device__ bool forward(int32_t node, int32_t src) {
    RailChunks& chunks = channel_.chunks(node);
    const uint64_t first = chunks.received;
    uint64_t chunk = first;
    for (bool is_last = false; !is_last; ++chunk) {
      ChunkHead head;
      if (!channel_.receive(node, chunk, first, head)) return false;  // [R3]
      fence_proxy_async_global();
      __syncwarp();
      forward_rows(channel_.landing(node, chunk),
                   min(static_cast<int32_t>(head.num_rows), plan_.rows_per_chunk), src);
      is_last = head.is_last != 0;
      if (!channel_.give_credit(node, chunk)) return false;  // [R4]
    }
    if (lane_ == 0) chunks.received = chunk;
    return true;
  }

 private:
  // All have been read from the chunk when this returns.
  __device__ void forward_rows(char* landing, int32_t num_rows, int32_t src) {
    Head next = head_of(landing, 0, num_rows);
    for (int32_t i = 0; i < num_rows; ++i) {
      const Head head = next;
      next = head_of(landing, i + 1, num_rows);
      const char* row = format_.row(landing, i);
      deliverer_.deliver(row, reinterpret_cast<const float*>(row + a_.row_bytes), head.target, src,
                         head.token);
    }
    deliverer_.drain();
  }

  struct Head {
    RowTarget target;
    int32_t token;
  };
  __device__ Head head_of(char* landing, int32_t i, int32_t num_rows) const {
    if (i >= num_rows) return {{kNoRow, 0.0f, 0}, 0};
    const RowHead head{static_cast<int32_t>(a_.top_k)};
    char* at = format_.row_head(landing, i);
    if (lane_ >= a_.top_k) return {{kNoRow, 0.0f, 0}, *head.token(at)};
    return {{head.row(at)[lane_], head.weight(at)[lane_], head.index(at)[lane_]}, *head.token(at)};
  }

  const Channel<Hop>& channel_;
  const DispatchArguments& a_;
  const Plan& plan_;
  const Deliverer& deliverer_;
  const ChunkFormat& format_;
  const int32_t lane_;
};

// Of this rank's tokens [begin, end) every stride-th: their rows on this node.
__device__ inline void move_own_rows(const GroupView& g, const RailView& rail,
                                     const DispatchArguments& a, const Deliverer& deliverer,
                                     int32_t begin, int32_t end, int32_t stride) {
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
  const int32_t self = rail.rank_of(rail.node, g.rank);
  RowTarget next = target_of(begin);
  for (int32_t token = begin; token < end; token += stride) {
    const RowTarget target = next;
    next = target_of(token + stride);
    deliverer.deliver(static_cast<const char*>(a.x) + token * a.row_bytes,
                      a.x_scales + token * a.num_scales, target, self, token);
  }
}

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_FORWARDER_CUH_
