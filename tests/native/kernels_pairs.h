// Sums of two 16-bit numbers, all of them, on the device.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_PAIRS_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_PAIRS_H_

namespace jax_ep::gpu::test {

// add_two of f16 and bf16 (cuda/rows/row_types.cuh) has the bits of 0 + x + y in f32, rounded: of all
// 2^32 pairs, with -0, subnormal numbers, infinities and NaNs.
void TestPairs();

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_PAIRS_H_
