#include <cstdint>

#include "cuda/rows/row_types.cuh"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_pairs.h"

namespace jax_ep::gpu::test {
namespace {

struct Wrong {
  unsigned long long count, one;  // pairs, and one of them
};

// Spoiled, the expected sums do not begin with 0, which -0 + -0 alone shows.
template <typename Vector, bool kSpoiled>
__global__ void AddPairs(Wrong* wrong) {
  const uint64_t stride = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < uint64_t{1} << 32;
       i += stride) {
    const auto a = static_cast<uint32_t>(i & 0xffff), b = static_cast<uint32_t>(i >> 16);
    // In either half of a word.
    const uint4 v{a | b << 16, b | a << 16, 0, 0}, w{b | a << 16, a | b << 16, 0, 0};
    float x[Vector::kCount], y[Vector::kCount];
    Vector::load(v, x);
    Vector::load(w, y);
    for (int c = 0; c < Vector::kCount; ++c) {
      x[c] = __fadd_rn(kSpoiled ? x[c] : __fadd_rn(0.0f, x[c]), y[c]);
    }
    const uint4 expected = Vector::store(x), actual = Vector::add_two(v, w);
    if (expected.x == actual.x && expected.y == actual.y) continue;
    atomicAdd(&wrong->count, 1ull);
    wrong->one = i;
  }
}

template <typename Vector>
void TestPairsOf(const char* name) {
  Wrong *on_device, wrong;
  CHECK_CUDA(cudaMalloc(&on_device, sizeof *on_device));
  CHECK_CUDA(cudaMemset(on_device, 0, sizeof *on_device));
  auto* kernel = g_tally.control ? AddPairs<Vector, true> : AddPairs<Vector, false>;
  kernel<<<1056, 256>>>(on_device);
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaMemcpy(&wrong, on_device, sizeof wrong, cudaMemcpyDeviceToHost));
  CHECK_CUDA(cudaFree(on_device));
  ++g_tally.num_compared;
  REQUIRE(wrong.count == 0, "%s: %llu pairs, one of them %08llx", name, wrong.count, wrong.one);
}

}  // namespace

void TestPairs() {
  TestPairsOf<Bf16Vector>("bf16");
  TestPairsOf<F16Vector>("f16");
}

}  // namespace jax_ep::gpu::test
