// Compiles the layout arithmetic for the device, so that host and device cannot drift apart.
#include "cuda/layout/placement.h"

namespace jax_ep {

// Row `row_in_expert` of a local expert of rows `counts[0 .. num_local_experts)`, or kNoRow if it
// lies beyond the capacity.
__device__ int64_t place_row(const int64_t* counts, int32_t local_expert, int64_t row_in_expert,
                             int64_t alignment, int64_t capacity) {
  int64_t offset = 0;
  for (int32_t e = 0; e < local_expert; ++e) offset += padded_rows(counts[e], alignment);
  return rows_below(offset + row_in_expert, 1, capacity) == 1 ? offset + row_in_expert
                                                              : int64_t{kNoRow};
}

}  // namespace jax_ep
