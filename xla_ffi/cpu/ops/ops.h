// The collective operations on plain memory. Shapes: T tokens, K experts per token,
// E experts, R ranks, L = E / R, C capacity, H row length; see docs of jax_ep for their meaning.
#ifndef JAX_EP_XLA_FFI_CPU_OPS_OPS_H_
#define JAX_EP_XLA_FFI_CPU_OPS_OPS_H_

#include <cstdint>
#include <memory>

#include "cuda/core/placement.h"
#include "xla_ffi/cpu/ops/collective_op.h"
#include "xla_ffi/cpu/ops/row_math.h"

namespace jax_ep::cpu {

// ---- layout: where every row goes --------------------------------------------------------------
struct LayoutSizes {
  int64_t num_ranks, num_tokens, top_k, num_experts;
  Room room;
};
enum LayoutIn { kLayoutTopkIdx };  // i32 [T, K]
enum LayoutOut {
  kLayoutSendRow,       // i32 [T, K]  row at the destination, -1 if none
  kLayoutRecvSrc,       // i32 [C]     (src rank * T + token) * K + k of each row, -1 if none
  kLayoutRecvOrder,     // i32 [C]     rows by ascending recv_src, then -1
  kLayoutRecvOffsets,   // i32 [R * T + 1]  where each (src rank, token)'s rows begin in recv_order
  kLayoutGroupSizes,    // i32 [L]
  kLayoutExpertCounts,  // i32 [L]
  kLayoutExpertLoad,    // i32 [E]
  kLayoutCounters,      // i32 [3]     num_recv, num_dropped, num_invalid
  kNumLayoutOut
};
inline constexpr size_t kNumLayoutPublished = 1;  // words of a rank
std::unique_ptr<CollectiveOp> MakeLayoutOp(const LayoutSizes& sizes, const Members& members);

// ---- dispatch: rows to their experts -----------------------------------------------------------
struct DispatchSizes {
  int64_t num_ranks, num_tokens, top_k, capacity, num_local_experts;
  int64_t num_rows;      // N, of tokens: TableSizes::num_rows(expand)
  int64_t row_bytes;     // of x
  int64_t num_channels;  // H
  int64_t num_scales;    // of a row as it travels; 0: it does so as x is
  QuantizationKind quantization;
  FloatType type;   // of x, if it is quantised here
  bool dequantize;  // rows come out as x is, and there is no scales result
  bool expand;      // as TableSizes::num_rows has it
  bool zero_tail;
};
enum DispatchIn {
  kDispatchX,            // [T, H]
  kDispatchRecvSrc,      // i32 [C]
  kDispatchRecvOrder,    // i32 [C]
  kDispatchRecvOffsets,  // i32 [R * T + 1]
  kDispatchGroupSizes,   // i32 [L]
  kDispatchXScales,      // f32 [T, num_scales] or null
  kDispatchTopkWeights   // f32 [T, K] or null
};
enum DispatchOut {
  kDispatchTokens,   // [N, H]
  kDispatchScales,   // f32 [N, num_scales] or null
  kDispatchWeights,  // f32 [C] or null
  kNumDispatchOut
};
std::unique_ptr<CollectiveOp> MakeDispatchOp(const DispatchSizes& sizes, const Members& members);

// ---- both in one -------------------------------------------------------------------------------
enum LayoutAndDispatchIn {
  kLayoutAndDispatchTopkIdx,     // as kLayoutTopkIdx
  kLayoutAndDispatchX,           // as kDispatchX
  kLayoutAndDispatchXScales,     // as kDispatchXScales
  kLayoutAndDispatchTopkWeights  // as kDispatchTopkWeights
};
// Out: LayoutOut, then DispatchOut.
std::unique_ptr<CollectiveOp> MakeLayoutAndDispatchOp(const LayoutSizes& layout,
                                                      const DispatchSizes& dispatch,
                                                      const Members& members);

// ---- combine: rows back to their tokens, summed ------------------------------------------------
struct CombineSizes {
  int64_t num_ranks, num_tokens, top_k, capacity, num_local_experts;
  int64_t num_channels;    // H
  int64_t ranks_per_node;  // a divisor of num_ranks
  FloatType type;
  bool expand;  // as in DispatchSizes, of y; weights only where it is set
};
enum CombineIn {
  kCombineY,            // [N, H]
  kCombineTopkIdx,      // i32 [T, K]
  kCombineSendRow,      // i32 [T, K]
  kCombineRecvSrc,      // i32 [C]
  kCombineRecvOrder,    // i32 [C]
  kCombineRecvOffsets,  // i32 [R * T + 1]
  kCombineWeights,      // f32 [C] or null: all 1
  kCombineValues        // f32 [C] or null
};
enum CombineOut {
  kCombineOut,        // [T, H]
  kCombineCollected,  // f32 [T, K] or null: values at the rows of (token, k), 0 if none
  kNumCombineOut
};
std::unique_ptr<CollectiveOp> MakeCombineOp(const CombineSizes& sizes, const Members& members);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_OPS_OPS_H_
