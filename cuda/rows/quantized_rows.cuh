// The codec of rows that cross as float8_e4m3fn with their scales, which tokens and scales hold.
#ifndef JAX_EP_CUDA_ROWS_QUANTIZED_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_QUANTIZED_ROWS_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/copy_rows.cuh"
#include "cuda/rows/fp8_rows.cuh"
#include "cuda/rows/row_format.h"
#include "cuda/rows/row_types.cuh"

namespace jax_ep::gpu {

// Fills a stage with a row of x, quantised by the calling warp, as it crosses (cuda/core/wire_row.h).
__device__ inline void quantize_to_stage(const DispatchArguments& a, const char* x, char* stage,
                                         uint64_t* full) {
  auto* scales = reinterpret_cast<float*>(stage + a.num_channels);
  with_vector(a.type, [&](auto vector) { quantize_row<decltype(vector)>(a, x, stage, scales); });
  fence_proxy_async_shared();  // the copy engine reads what was written
  __syncwarp();
  if (lane_of_warp() == 0) mbarrier_arrive(full);
}

class QuantizedRows {
 public:
  static constexpr RowFormat kFormat = kQuantizedFormat;
  struct Extra {
    uint64_t scales;  // where they go
  };

  __device__ QuantizedRows(const DispatchArguments& a, char* /*ring_memory*/)
      : a_(a), num_scales_(static_cast<int32_t>(num_scales(a))) {}

  __device__ static int64_t tokens_row_bytes(const DispatchArguments& a) { return a.num_channels; }
  __device__ static int64_t num_scales(const DispatchArguments& a) { return a.num_scales; }
  __device__ Extra extra_of(uint64_t scales, int32_t row) const {
    return {scales + int64_t{row} * num_scales_ * 4};
  }

  __device__ void fill_stage(int64_t token, int64_t /*at*/, uint32_t /*bytes*/, char* stage,
                             uint64_t* full) const {
    quantize_to_stage(a_, row_of_x(a_, token), stage, full);
  }
  __device__ void fetch_stage(const Crossed& crossed, uint32_t bytes, char* stage,
                              uint64_t* full) const {
    if (!crossed.is_in_landing) {
      bytes = static_cast<uint32_t>(a_.num_channels);
      scales_to_stage(a_.scales + int64_t{crossed.row} * num_scales_, stage);
    }
    copy_to_stage(reinterpret_cast<const void*>(crossed.address), bytes, stage, full);
  }

  __device__ void store(const char* stage, uint32_t bytes, uint64_t to, bool verbatim,
                        const Extra& extra) const {
    if (to != 0) {
      bulk_store(reinterpret_cast<void*>(to), stage,
                 verbatim ? bytes : static_cast<uint32_t>(a_.num_channels));
    }
    store_scales(stage + a_.num_channels, to != 0 && !verbatim ? extra.scales : 0);
    bulk_commit_group();
  }

 protected:
  // Puts a row's scales behind its values.
  __device__ void scales_to_stage(const float* from, char* stage) const {
    auto* scales = reinterpret_cast<float*>(stage + a_.num_channels);
    for (int32_t s = lane_of_warp(); s < num_scales_; s += 32) scales[s] = __ldcg(from + s);
    fence_proxy_async_shared();  // the copy engine reads what was written
  }

  const DispatchArguments& a_;
  const int32_t num_scales_;

 private:
  // Where each lane wants them; 0: nowhere.
  __device__ void store_scales(const char* scales, uint64_t to) const {
    if (num_scales_ % 4 == 0) {
      if (to != 0) {
        bulk_store(reinterpret_cast<void*>(to), scales, static_cast<uint32_t>(num_scales_ * 4));
      }
      return;
    }
    // Not for the copy engine.
    for (uint32_t left = __ballot_sync(0xffffffffu, to != 0); left != 0; left &= left - 1) {
      auto* at =
          reinterpret_cast<float*>(__shfl_sync(0xffffffffu, to, __ffs(static_cast<int>(left)) - 1));
      for (int32_t s = lane_of_warp(); s < num_scales_; s += 32) {
        at[s] = reinterpret_cast<const float*>(scales)[s];
      }
    }
  }
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_QUANTIZED_ROWS_CUH_
