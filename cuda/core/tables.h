// The tables of a layout: which there are, their order and their shapes. A layout writes them,
// every operation on it reads them; wherever they are passed on, they stand in this order.
#ifndef JAX_EP_CUDA_CORE_TABLES_H_
#define JAX_EP_CUDA_CORE_TABLES_H_

#include <cstdint>
#include <initializer_list>

namespace jax_ep {

// The static sizes of a layout that its tables have their shapes from.
struct TableSizes {
  int64_t num_ranks;    // R
  int64_t num_tokens;   // T, of a rank
  int64_t top_k;        // K
  int64_t num_experts;  // E
  int64_t capacity;     // C

  constexpr int64_t num_local_experts() const { return num_experts / num_ranks; }  // L
  // Rows that dispatch makes: one per (token, k), or, not expanded, one per (rank, token) of the
  // group in that order, and one of zeros.
  constexpr int64_t num_rows(bool expand) const {
    return expand ? capacity : num_ranks * num_tokens + 1;
  }
};

// Int is int32_t where a layout makes them, const int32_t where they are read.
template <typename Int>
struct Tables {
  Int* send_row;      // [T, K] row at the destination, -1 if none
  Int* recv_src;      // [C] (src rank * T + token) * K + k of each row, -1 if none
  Int* recv_order;    // [C] rows by ascending recv_src, then -1
  Int* recv_offsets;  // [R * T + 1] where each (src rank, token)'s rows begin in recv_order
  Int* group_sizes;   // [L] rows of each expert, padding included

  // Calls f(name, pointer, shape) for each table, in order.
  template <typename F>
  static void ForEach(Tables& tables, const TableSizes& sizes, F&& f) {
    using Shape = std::initializer_list<int64_t>;
    f("send_row", tables.send_row, Shape{sizes.num_tokens, sizes.top_k});
    f("recv_src", tables.recv_src, Shape{sizes.capacity});
    f("recv_order", tables.recv_order, Shape{sizes.capacity});
    f("recv_offsets", tables.recv_offsets, Shape{sizes.num_ranks * sizes.num_tokens + 1});
    f("group_sizes", tables.group_sizes, Shape{sizes.num_local_experts()});
  }
};

using TableView = Tables<const int32_t>;

}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_TABLES_H_
