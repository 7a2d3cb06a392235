// How a long row is cut: plain C++17, computed by the host.
#ifndef JAX_EP_CUDA_DIRECT_PIECES_H_
#define JAX_EP_CUDA_DIRECT_PIECES_H_

#include <cstdint>

namespace jax_ep::gpu {

struct Pieces {
  int32_t count;
  int32_t bytes;  // of each but the last, which may be shorter
};

// A row in `count` equal pieces, multiples of 16 bytes; in fewer, if their rounding leaves nothing
// for the last ones.
constexpr Pieces CutRow(int64_t row_bytes, int64_t count) {
  const int64_t bytes = ((row_bytes + count - 1) / count + 15) / 16 * 16;
  return {static_cast<int32_t>((row_bytes + bytes - 1) / bytes), static_cast<int32_t>(bytes)};
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_DIRECT_PIECES_H_
