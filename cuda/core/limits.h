// What one call may be: one home for host, device and Python, which checks it while it traces
// (jax_ep/limits.py).
#ifndef JAX_EP_CUDA_CORE_LIMITS_H_
#define JAX_EP_CUDA_CORE_LIMITS_H_

#include <cstdint>

namespace jax_ep {

// Rows and ids are counted in int32. R * T * K ids and E experts' padding, R * T * K + E * A, and a
// capacity may come to this. The margin is for how far beyond the last id the blocks of a kernel
// reckon.
inline constexpr int64_t kMaxRows = (int64_t{1} << 31) - (int64_t{1} << 20);

inline constexpr int kRowAlignment = 16;  // bytes: kernels move rows by so many
inline constexpr int kScaleBlock = 128;   // channels that share a scale, where dispatch quantises

namespace gpu {

inline constexpr int kMaxPeers = 72;  // devices of the largest NVLink domain
inline constexpr int kMaxExperts = 1024;
inline constexpr int kMaxTopK = 32;
inline constexpr int64_t kMaxUnitsPerBlock = (int64_t{1} << 24) - 1;  // a token has one or more
inline constexpr int64_t kMaxFp8Channels = 1 << 15;         // of a row that dispatch quantises
inline constexpr int64_t kMaxScaledRowBytes = 48 * 1024;    // of a float8 row with given scales
inline constexpr int64_t kMaxWeightedRowBytes = 40 * 1024;  // that combine's gradient takes

}  // namespace gpu
}  // namespace jax_ep

#endif  // JAX_EP_CUDA_CORE_LIMITS_H_
