// A warp that sends rows to other nodes. cuda/network/rail/dispatch.cuh states the protocol.
#ifndef JAX_EP_CUDA_NETWORK_RAIL_SENDER_CUH_
#define JAX_EP_CUDA_NETWORK_RAIL_SENDER_CUH_

#include "cuda/core/placement.h"
#include "cuda/launch.h"
#include "cuda/network/rail/chunks.cuh"
#include "cuda/network/rail/rail.h"
#include "cuda/network/warp_copy.cuh"

namespace jax_ep::gpu::rail {

// Of the tokens begin, begin + stride, .. below end those that have a row on one node, in their order:
// 32 at a time, one a lane.
class NodeTokens {
 public:
  __device__ NodeTokens(const DispatchArguments& a, int32_t first_expert, int32_t end_expert,
                        int32_t begin, int32_t end, int32_t stride)
      : a_(a),
        first_expert_(first_expert),
        end_expert_(end_expert),
        next_(begin),
        end_(end),
        stride_(stride) {
    find();
  }

  __device__ bool has_next() const { return left_ != 0; }
  __device__ int32_t take() {
    const int32_t token = begin_ + (__ffs(static_cast<int>(left_)) - 1) * stride_;
    left_ &= left_ - 1;
    find();
    return token;
  }
  // Whether the id at `flat` makes a row there.
  __device__ bool is_there(int32_t row, int32_t expert) const {
    return row != kNoRow && expert >= first_expert_ && expert < end_expert_;
  }

 private:
  __device__ void find() {
    for (; left_ == 0 && next_ < end_; next_ += 32 * stride_) {
      begin_ = next_;
      const int32_t token = begin_ + static_cast<int32_t>(threadIdx.x) % 32 * stride_;
      bool is_wanted = false;
      if (token < end_) {
        const int64_t flat = token * a_.top_k;
        for (int64_t k = 0; k < a_.top_k; ++k) {
          is_wanted |= is_there(a_.send_row[flat + k], a_.topk_idx[flat + k]);
        }
      }
      left_ = __ballot_sync(~0u, is_wanted);
    }
  }

  const DispatchArguments& a_;
  const int32_t first_expert_, end_expert_;
  int32_t next_;
  const int32_t end_, stride_;
  int32_t begin_ = 0;
  uint32_t left_ = 0;  // of the 32 from begin on: those to come, a bit each
};

// Sends a channel's tokens.
template <typename Hop>
class Sender {
 public:
  __device__ Sender(const Channel<Hop>& channel, const RailView& rail, const DispatchArguments& a,
                    const Plan& plan)
      : channel_(channel),
        rail_(rail),
        a_(a),
        plan_(plan),
        format_(plan.format),
        lane_(static_cast<int32_t>(threadIdx.x) % 32) {}

  // All rows of the tokens begin, begin + stride, .. below end that belong to a node. False if the
  // group is broken.
  __device__ bool send(int32_t node, int32_t begin, int32_t end, int32_t stride) {
    const auto num_local = static_cast<int32_t>(a_.num_local_experts);
    const int32_t on_node = num_local * rail_.ranks_per_node, first_expert = node * on_node;
    NodeTokens tokens(a_, first_expert, first_expert + on_node, begin, end, stride);
    RailChunks& chunks = channel_.chunks(node);
    const uint64_t first = chunks.sent;
    uint64_t chunk = first;
    for (bool is_last = false; !is_last; ++chunk) {
      if (!channel_.await_credit(node, chunk, first)) return false;  // [R1]
      char* staging = channel_.staging(node, chunk);
      int32_t num_rows = 0;
      for (; num_rows < plan_.rows_per_chunk && tokens.has_next(); ++num_rows) {
        write_row(staging, num_rows, tokens, tokens.take(), first_expert, num_local);
      }
      is_last = !tokens.has_next();
      const int64_t num_bytes = format_.num_bytes(num_rows);
      if (!channel_.send(node, chunk, num_rows, is_last, num_bytes)) return false;  // [R2]
    }
    __syncwarp();
    if (lane_ == 0) chunks.sent = chunk;
    return true;
  }

 private:
  __device__ void write_row(char* staging, int32_t i, const NodeTokens& tokens, int32_t token,
                            int32_t first_expert, int32_t num_local) const {
    const RowHead head{static_cast<int32_t>(a_.top_k)};
    char* at = format_.row_head(staging, i);
    if (lane_ < a_.top_k) {
      const int64_t flat = token * a_.top_k + lane_;
      const int32_t row = a_.send_row[flat], expert = a_.topk_idx[flat];
      const bool is_there = tokens.is_there(row, expert);
      head.row(at)[lane_] = is_there ? row : kNoRow;
      head.index(at)[lane_] =
          static_cast<uint8_t>(is_there ? (expert - first_expert) / num_local : 0);
      if (a_.topk_weights != nullptr) head.weight(at)[lane_] = a_.topk_weights[flat];
    }
    if (lane_ == 0) *head.token(at) = token;
    char* row = format_.row(staging, i);
    copy_by_warp(row, static_cast<const char*>(a_.x) + token * a_.row_bytes, a_.row_bytes);
    auto* scales = reinterpret_cast<float*>(row + a_.row_bytes);
    for (int64_t s = lane_; s < a_.num_scales; s += 32) {
      scales[s] = a_.x_scales[token * a_.num_scales + s];
    }
  }

  const Channel<Hop>& channel_;
  const RailView& rail_;
  const DispatchArguments& a_;
  const Plan& plan_;
  const ChunkFormat& format_;
  const int32_t lane_;
};

}  // namespace jax_ep::gpu::rail

#endif  // JAX_EP_CUDA_NETWORK_RAIL_SENDER_CUH_
