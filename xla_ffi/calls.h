// The custom calls as both platforms receive them: which operands and results each has, in which
// order, and what must hold of their types and shapes. Letters as in TableSizes; H is the length
// of a row.
#ifndef JAX_EP_XLA_FFI_CALLS_H_
#define JAX_EP_XLA_FFI_CALLS_H_

#include <cstddef>
#include <cstdint>
#include <optional>

#include "cuda/core/float_type.h"
#include "cuda/core/placement.h"
#include "cuda/core/tables.h"
#include "cuda/core/wire_row.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/attributes.h"
#include "xla_ffi/checks.h"

namespace jax_ep {

// An operand or a result; null if the call does not have it.
struct Memory {
  void* data = nullptr;
  size_t bytes = 0;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Rows of H numbers.
struct Rows : Memory {
  xla::ffi::DataType type = xla::ffi::DataType::INVALID;
  int64_t num_channels = 0;  // H

  int64_t row_bytes() const {
    return num_channels * static_cast<int64_t>(xla::ffi::ByteWidth(type));
  }
  std::optional<FloatType> float_type() const;
};

// Operand: topk_idx. Results: the tables, expert_counts, expert_load, counters.
struct LayoutCall {
  TableSizes sizes;
  Room room;
  Memory topk_idx;  // int32 [T, K]
  Tables<int32_t> tables;
  Memory expert_counts;  // int32 [L]
  Memory expert_load;    // int32 [E]
  Memory counters;       // int32 [3]: num_recv, num_dropped, num_invalid
};

// What every operation on a layout takes after its rows: topk_idx, then the tables.
struct OnLayout {
  TableSizes sizes;
  const int32_t* topk_idx;  // [T, K]
  TableView tables;
};

// Operands: x, topk_idx, the tables, x_scales, topk_weights. Results: tokens, scales, weights. N
// rows: TableSizes::num_rows(expand).
struct DispatchCall : OnLayout {
  Rows x;               // [T, H]
  Memory x_scales;      // f32 [T, num_scales], if x comes with them
  Memory topk_weights;  // f32 [T, K], if has_weights
  Rows tokens;          // [N, H], of x's type, or float8_e4m3fn if dispatch quantises
  Memory scales;        // f32 [N, num_scales], unless tokens are without
  Memory weights;       // f32 [C], if has_weights
  int64_t num_scales;   // of a row as it crosses; 0: it does so as x is
  QuantizationKind quantization;
  bool dequantize;  // rows cross as float8_e4m3fn, tokens are of x's type
  bool expand;
  bool zero_tail;

  bool has_x_scales() const { return quantization == QuantizationKind::kGivenScales; }
  bool is_quantised() const { return quantization != QuantizationKind::kNone && !has_x_scales(); }
};

// The two in one. Operands: x, topk_idx, x_scales, topk_weights. Results: those of the layout, then
// those of the dispatch, whose tables are the layout's.
struct LayoutAndDispatchCall {
  LayoutCall layout;
  DispatchCall dispatch;
};

// Operands: y, topk_idx, the tables, weights, values. Results: out, collected, partial.
struct CombineCall : OnLayout {
  Rows y;            // [N, H], as dispatch's tokens
  Memory weights;    // f32 [C], if has_weights; 1 otherwise
  Memory values;     // f32 [C], if has_values
  Rows out;          // [T, H]
  Memory collected;  // f32 [T, K], if has_values: values at the row of each (token, k), 0 if none
  Rows partial;  // [R, T, H], scratch of CUDA's kernel; bytes (CombineScratchBytes) across nodes
  int64_t ranks_per_node;
  bool expand;
};

// Of CUDA's kernel over several nodes (cuda/network/rail/combine.h), up to a multiple of 16.
int64_t CombineScratchBytes(const TableSizes& sizes, int64_t ranks_per_node, int64_t row_bytes,
                            bool has_values);

// Operands: g, topk_idx, the tables, y, weights. Results: d_y, d_weights.
struct CombineGradientCall : OnLayout {
  Rows g;            // [T, H]
  Rows y;            // [C, H]
  Memory weights;    // f32 [C]
  Rows d_y;          // [C, H]
  Memory d_weights;  // f32 [C]
  bool zero_tail;
};

// They are to be used only if the checks are ok.
LayoutCall DecodeCall(const LayoutAttributes& a, xla::ffi::RemainingArgs operands,
                      xla::ffi::RemainingRets results, Checks* checks);
DispatchCall DecodeCall(const DispatchAttributes& a, xla::ffi::RemainingArgs operands,
                        xla::ffi::RemainingRets results, Checks* checks);
LayoutAndDispatchCall DecodeCall(const LayoutAndDispatchAttributes& a,
                                 xla::ffi::RemainingArgs operands, xla::ffi::RemainingRets results,
                                 Checks* checks);
CombineCall DecodeCall(const CombineAttributes& a, xla::ffi::RemainingArgs operands,
                       xla::ffi::RemainingRets results, Checks* checks, bool has_scratch);
CombineGradientCall DecodeCall(const CombineGradientAttributes& a, xla::ffi::RemainingArgs operands,
                               xla::ffi::RemainingRets results, Checks* checks);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CALLS_H_
