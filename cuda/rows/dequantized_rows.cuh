// The codec of rows that cross as float8_e4m3fn with their scales; tokens hold their products.
#ifndef JAX_EP_CUDA_ROWS_DEQUANTIZED_ROWS_CUH_
#define JAX_EP_CUDA_ROWS_DEQUANTIZED_ROWS_CUH_

#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/rows/copy_rows.cuh"
#include "cuda/rows/fp8_rows.cuh"
#include "cuda/rows/quantized_rows.cuh"
#include "cuda/rows/row_format.h"
#include "cuda/rows/row_types.cuh"

namespace jax_ep::gpu {

class DequantizedRows : public RowsOfX {
 public:
  static constexpr RowFormat kFormat = kDequantizedFormat;

  __device__ DequantizedRows(const DispatchArguments& a, char* ring_memory)
      : RowsOfX(a), buffers_(ring_memory) {}

  __device__ void fill_stage(int64_t token, int64_t /*at*/, uint32_t /*bytes*/, char* stage,
                             uint64_t* full) const {
    quantize_to_stage(a_, row_of_x(a_, token), stage, full);
  }

  __device__ void store(const char* stage, uint32_t bytes, uint64_t to, bool verbatim,
                        const Extra&) {
    if (to != 0 && verbatim) bulk_store(reinterpret_cast<void*>(to), stage, bytes);
    bulk_commit_group();
    with_vector(a_.type,
                [&](auto vector) { store_products<decltype(vector)>(stage, verbatim ? 0 : to); });
  }

 private:
  // Of a quantised row with its scales, where the lanes want them; 0: nowhere.
  template <typename Vector>
  __device__ void store_products(const char* quantized, uint64_t to) {
    if (__any_sync(0xffffffffu, to != 0) == 0) return;
    constexpr int kPiece = kProductBufferBytes / 16;  // vectors
    const auto num_vectors = static_cast<int32_t>(a_.num_channels / Vector::kCount);
    for (int32_t begin = 0; begin < num_vectors; begin += kPiece) {
      char* buffer = buffers_ + num_buffered_++ % kNumProductBuffers * kProductBufferBytes;
      bulk_wait_group_read<kNumProductBuffers - 1>();  // each lane of its own stores
      __syncwarp();
      const int32_t size = min(kPiece, num_vectors - begin);
      dequantize_vectors<Vector>(a_, quantized, begin, size, reinterpret_cast<uint4*>(buffer));
      fence_proxy_async_shared();  // the copy engine reads what was written
      __syncwarp();
      if (to != 0) {
        bulk_store(reinterpret_cast<void*>(to + begin * 16), buffer,
                   static_cast<uint32_t>(size * 16));
      }
      bulk_commit_group();
    }
  }

  char* const buffers_;  // [kNumProductBuffers][kProductBufferBytes]
  uint32_t num_buffered_ = 0;
};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_DEQUANTIZED_ROWS_CUH_
