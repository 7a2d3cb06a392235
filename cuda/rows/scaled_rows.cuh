// The codec of rows that come as float8 with their scales, and so cross; tokens and scales hold them.
#ifndef JAX_EP_CUDA_ROWS_SCALED_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_SCALED_ROWS_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/copy_rows.cuh"
#include "cuda/rows/quantized_rows.cuh"
#include "cuda/rows/row_format.h"

namespace jax_ep::gpu {

// As QuantizedRows, but for what fills a stage: two copies.
class ScaledRows : public QuantizedRows {
 public:
  static constexpr RowFormat kFormat = kScaledFormat;

  __device__ ScaledRows(const DispatchArguments& a, char* ring_memory)
      : QuantizedRows(a, ring_memory) {}

  __device__ void fill_stage(int64_t token, int64_t /*at*/, uint32_t /*bytes*/, char* stage,
                             uint64_t* full) const {
    const char* x = row_of_x(a_, token);
    const float* scales = a_.x_scales + token * num_scales_;
    const auto num_channels = static_cast<uint32_t>(a_.num_channels);
    if (num_scales_ % 4 != 0) {  // not for the copy engine
      scales_to_stage(scales, stage);
      copy_to_stage(x, num_channels, stage, full);
      return;
    }
    if (lane_of_warp() == 0) {
      const auto scale_bytes = static_cast<uint32_t>(num_scales_ * 4);
      mbarrier_arrive_expect_tx(full, num_channels + scale_bytes);
      bulk_load(stage, x, num_channels, full);
      bulk_load(stage + num_channels, scales, scale_bytes, full);
    }
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_SCALED_ROWS_CUH_
