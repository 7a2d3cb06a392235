// quantize: rows of this device as float8 with their scales, without peers. A dispatch across nodes
// takes such rows, with their scales, in place of x.
#ifndef JAX_EP_CUDA_ROWS_QUANTIZE_H_
#define JAX_EP_CUDA_ROWS_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/float_type.h"

namespace jax_ep::gpu {

// Rows of x are multiples of 16 bytes at 16-byte addresses, and so are those of values.
struct QuantizeArguments {
  const void* x;  // [T, H]
  void* values;   // float8_e4m3fn [T, H]
  float* scales;  // [T, num_block_scales(H)]
  int64_t num_rows, num_channels;
  FloatType type;  // of x
  bool power_of_two_scales;
};
cudaError_t LaunchQuantize(const QuantizeArguments& arguments, int num_sms, cudaStream_t stream);
cudaError_t PrepareQuantize();

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_QUANTIZE_H_
