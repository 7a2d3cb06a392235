#include <algorithm>

#include "cuda/core/wire_row.h"
#include "cuda/direct/kernels.cuh"
#include "cuda/launch.h"
#include "cuda/rows/copy_rows.cuh"
#include "cuda/rows/fp8_rows.cuh"
#include "cuda/rows/quantize.h"
#include "cuda/rows/row_types.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Warps take rows in turn.
__global__ __launch_bounds__(kThreads,
                             1) void quantize_kernel(const __grid_constant__ DispatchArguments a) {
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < a.num_tokens;
       row += stride) {
    char* values = static_cast<char*>(a.tokens) + row * a.num_channels;
    with_vector(a.type, [&](auto vector) {
      quantize_row<decltype(vector)>(a, row_of_x(a, row), values, a.scales + row * a.num_scales);
    });
  }
}

}  // namespace

cudaError_t LaunchQuantize(const QuantizeArguments& arguments, int num_sms, cudaStream_t stream) {
  if (arguments.num_rows == 0) return cudaSuccess;
  DispatchArguments a{};
  a.x = arguments.x;
  a.tokens = arguments.values;
  a.scales = arguments.scales;
  a.num_tokens = arguments.num_rows;
  a.num_channels = arguments.num_channels;
  a.row_bytes = arguments.num_channels * (arguments.type == FloatType::kF32 ? 4 : 2);
  a.num_scales = num_block_scales(arguments.num_channels);
  a.type = arguments.type;
  a.power_of_two_scales = arguments.power_of_two_scales;
  const int64_t num_blocks = std::min<int64_t>(num_sms, (a.num_tokens + kWarps - 1) / kWarps);
  quantize_kernel<<<static_cast<unsigned>(num_blocks), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t PrepareQuantize() { return PrepareKernel(quantize_kernel, 0); }

}  // namespace jax_ep::gpu
