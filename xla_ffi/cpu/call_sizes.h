// What the CPU operations take of a decoded call: its sizes, and where its results go.
#ifndef JAX_EP_XLA_FFI_CPU_CALL_SIZES_H_
#define JAX_EP_XLA_FFI_CPU_CALL_SIZES_H_

#include <vector>

#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/call_site.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep {

inline cpu::LayoutSizes SizesOf(const LayoutCall& call) {
  const TableSizes& sizes = call.sizes;
  return {sizes.num_ranks, sizes.num_tokens, sizes.top_k, sizes.num_experts, call.room};
}

// In the order of cpu::LayoutOut.
inline std::vector<Output> OutputsOf(LayoutCall& call) {
  std::vector<Output> outputs;
  Tables<int32_t>::ForEach(call.tables, call.sizes,
                           [&](const char*, int32_t* table, std::initializer_list<int64_t> shape) {
                             size_t bytes = sizeof(int32_t);
                             for (int64_t size : shape) bytes *= static_cast<size_t>(size);
                             outputs.push_back({table, bytes});
                           });
  for (const Memory& counts : {call.expert_counts, call.expert_load, call.counters}) {
    outputs.push_back(AsOutput(counts));
  }
  return outputs;
}

inline cpu::DispatchSizes SizesOf(const DispatchCall& call) {
  const TableSizes& sizes = call.sizes;
  return {sizes.num_ranks,
          sizes.num_tokens,
          sizes.top_k,
          sizes.capacity,
          sizes.num_local_experts(),
          sizes.num_rows(call.expand),
          call.x.row_bytes(),
          call.x.num_channels,
          call.num_scales,
          call.quantization,
          call.x.float_type().value_or(FloatType::kF32),
          call.dequantize,
          call.expand,
          call.zero_tail};
}

// In the order of cpu::DispatchOut.
inline std::vector<Output> OutputsOf(const DispatchCall& call) {
  return {AsOutput(call.tokens), AsOutput(call.scales), AsOutput(call.weights)};
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_CALL_SIZES_H_
