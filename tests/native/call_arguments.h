// One rank's buffers on its device, and the kernels' arguments that are made of them: for
// kernels_test and kernels_bench.
#ifndef JAX_EP_TESTS_NATIVE_CALL_ARGUMENTS_H_
#define JAX_EP_TESTS_NATIVE_CALL_ARGUMENTS_H_

#include <cstdint>

#include "cuda/launch.h"

namespace jax_ep::gpu::test {

struct CallSizes {
  int64_t num_ranks, num_tokens, top_k, num_experts, alignment, capacity, num_channels, row_bytes;
  FloatType type;
  bool zero_tail;
  int64_t expert_capacity = 0;  // where each expert has room of its own
};

// Device memory; Row is what the caller sees rows as. Pointers that a call does not use may be
// null.
template <typename Row>
struct CallBuffers {
  int32_t *ids, *send_row, *recv_src, *recv_order, *recv_offsets, *group_sizes, *expert_counts,
      *expert_load, *counters;
  Row *x, *y, *tokens, *partial, *out;
  float *topk_weights, *weights, *row_weights, *dots, *scales, *x_scales, *collected;
};

template <typename Row>
LayoutArguments LayoutOf(const CallSizes& sizes, const CallBuffers<Row>& b) {
  LayoutArguments a{};
  a.topk_idx = b.ids;
  a.num_tokens = sizes.num_tokens;
  a.top_k = sizes.top_k;
  a.num_experts = sizes.num_experts;
  a.room = {sizes.capacity, sizes.alignment, sizes.expert_capacity};
  a.send_row = b.send_row;
  a.recv_src = b.recv_src;
  a.recv_order = b.recv_order;
  a.recv_offsets = b.recv_offsets;
  a.group_sizes = b.group_sizes;
  a.expert_counts = b.expert_counts;
  a.expert_load = b.expert_load;
  a.counters = b.counters;
  return a;
}

template <typename Row>
LayoutAndDispatchArguments LayoutAndDispatchOf(const CallSizes& sizes, const CallBuffers<Row>& b,
                                               bool weighted) {
  LayoutAndDispatchArguments a{};
  static_cast<LayoutArguments&>(a) = LayoutOf(sizes, b);
  a.x = b.x;
  a.tokens = b.tokens;
  a.topk_weights = weighted ? b.topk_weights : nullptr;
  a.weights = weighted ? b.weights : nullptr;
  a.num_channels = sizes.num_channels;
  a.row_bytes = sizes.row_bytes;
  a.num_rows = sizes.capacity;
  a.expand = true;
  a.type = sizes.type;
  a.zero_tail = sizes.zero_tail;
  return a;
}

// With weights, or as the gradient of combine; no landing area. Expanded, as CombineOf.
template <typename Row>
DispatchArguments DispatchOf(const CallSizes& sizes, const CallBuffers<Row>& b, DispatchMode mode) {
  DispatchArguments a{};
  a.x = b.x;
  a.topk_idx = b.ids;
  a.send_row = b.send_row;
  a.recv_src = b.recv_src;
  a.recv_order = b.recv_order;
  a.recv_offsets = b.recv_offsets;
  a.group_sizes = b.group_sizes;
  a.tokens = b.tokens;
  a.num_tokens = sizes.num_tokens;
  a.top_k = sizes.top_k;
  a.capacity = sizes.capacity;
  a.num_local_experts = sizes.num_experts / sizes.num_ranks;
  a.num_channels = sizes.num_channels;
  a.row_bytes = sizes.row_bytes;
  a.num_rows = sizes.capacity;
  a.expand = true;
  a.mode = mode;
  a.type = sizes.type;
  a.zero_tail = sizes.zero_tail;
  if (mode == DispatchMode::kWeighted) {
    a.y = b.y;
    a.row_weights = b.row_weights;
    a.dots = b.dots;
  } else {
    a.topk_weights = b.topk_weights;
    a.weights = b.weights;
  }
  if (mode == DispatchMode::kCopy || mode == DispatchMode::kWeighted) return a;
  a.num_scales = num_block_scales(sizes.num_channels);
  if (mode != DispatchMode::kDequantize) a.scales = b.scales;
  if (mode == DispatchMode::kScaled) {
    a.row_bytes = sizes.num_channels;  // x is taken for float8
    a.x_scales = b.x_scales;
  }
  return a;
}

// Without weights and values.
template <typename Row>
CombineArguments CombineOf(const CallSizes& sizes, const CallBuffers<Row>& b) {
  CombineArguments a{};
  a.y = b.y;
  a.topk_idx = b.ids;
  a.send_row = b.send_row;
  a.recv_src = b.recv_src;
  a.recv_order = b.recv_order;
  a.recv_offsets = b.recv_offsets;
  a.partial = b.partial;
  a.out = b.out;
  a.num_tokens = sizes.num_tokens;
  a.top_k = sizes.top_k;
  a.num_local_experts = sizes.num_experts / sizes.num_ranks;
  a.num_channels = sizes.num_channels;
  a.type = sizes.type;
  a.expand = true;
  return a;
}

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_CALL_ARGUMENTS_H_
