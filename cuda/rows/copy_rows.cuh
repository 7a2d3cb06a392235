// The codec of rows that tokens hold as x does, and what other codecs take from it.
#ifndef JAX_EP_CUDA_ROWS_COPY_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_COPY_ROWS_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/row_format.h"

namespace jax_ep::gpu {

__device__ inline int32_t lane_of_warp() { return static_cast<int32_t>(threadIdx.x) % 32; }

// Fills a stage by one copy, which completes the phase of `full`.
__device__ inline void copy_to_stage(const void* source, uint32_t bytes, char* stage,
                                     uint64_t* full) {
  if (lane_of_warp() == 0) {
    mbarrier_arrive_expect_tx(full, bytes);
    bulk_load(stage, source, bytes, full);
  }
}

// A token's row of x, from byte `at` on.
__device__ inline const char* row_of_x(const DispatchArguments& a, int64_t token, int64_t at = 0) {
  return static_cast<const char*>(a.x) + token * a.row_bytes + at;
}

// A row that has crossed.
struct Crossed {
  uint64_t address;
  int32_t row;  // of tokens, if it does not lie in the landing area
  bool is_in_landing;
};

// Codecs whose tokens are of x's type take this from it, where they do not say otherwise.
class RowsOfX {
 public:
  struct Extra {};

  __device__ static int64_t tokens_row_bytes(const DispatchArguments& a) { return a.row_bytes; }
  __device__ static int64_t num_scales(const DispatchArguments&) { return 0; }
  __device__ Extra extra_of(uint64_t /*scales*/, int32_t /*row*/) const { return {}; }
  __device__ void fill_stage(int64_t token, int64_t at, uint32_t bytes, char* stage,
                             uint64_t* full) const {
    copy_to_stage(row_of_x(a_, token, at), bytes, stage, full);
  }
  __device__ void fetch_stage(const Crossed& crossed, uint32_t bytes, char* stage,
                              uint64_t* full) const {
    copy_to_stage(reinterpret_cast<const void*>(crossed.address), bytes, stage, full);
  }

 protected:
  __device__ explicit RowsOfX(const DispatchArguments& a) : a_(a) {}
  const DispatchArguments& a_;
};

class CopyRows : public RowsOfX {
 public:
  static constexpr RowFormat kFormat = kCopyFormat;

  __device__ CopyRows(const DispatchArguments& a, char* /*ring_memory*/) : RowsOfX(a) {}

  __device__ void store(const char* stage, uint32_t bytes, uint64_t to, bool /*verbatim*/,
                        const Extra&) const {
    if (to != 0) bulk_store(reinterpret_cast<void*>(to), stage, bytes);
    bulk_commit_group();
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_COPY_ROWS_CUH_
