// Comparing results with what they must be, and counting what is wrong.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_COMPARE_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_COMPARE_H_

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "tests/native/kernels_oracle.h"

// Counts as wrong, and goes on, if the condition does not hold.
#define REQUIRE(condition, ...)                                           \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: not so: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                           \
      std::printf("\n");                                                  \
      ++::jax_ep::gpu::test::g_tally.num_wrong;                           \
    }                                                                     \
  } while (0)

namespace jax_ep::gpu::test {

struct Tally {
  bool control = false;  // spoils one number of each result before it is compared
  int num_wrong = 0, num_compared = 0;
};
inline Tally g_tally;

inline void Report(const char* name, int rank, size_t at, size_t num_wrong, size_t size) {
  ++g_tally.num_wrong;
  if (g_tally.num_wrong <= 20) {
    std::printf("WRONG: %s of rank %d: %zu of %zu, first at %zu\n", name, rank, num_wrong, size,
                at);
  }
}

template <typename T>
void Compare(const char* name, int rank, std::vector<T> actual, const std::vector<T>& expected,
             size_t num_specified) {
  ++g_tally.num_compared;
  if (g_tally.control && num_specified > 0) {
    reinterpret_cast<uint8_t*>(&actual[num_specified / 2])[0] ^= 0x10;
  }
  size_t num_wrong = 0, first = 0;
  for (size_t i = 0; i < num_specified; ++i) {
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) == 0) continue;
    if (num_wrong++ == 0) first = i;
  }
  if (num_wrong > 0) Report(name, rank, first, num_wrong, num_specified);
}

template <typename T>
void Compare(const char* name, int rank, const std::vector<T>& actual,
             const std::vector<T>& expected) {
  Compare(name, rank, actual, expected, expected.size());
}

inline void CompareNumbers(const char* name, int rank, FloatType type, std::vector<uint8_t> actual,
                           const std::vector<uint8_t>& expected) {
  ++g_tally.num_compared;
  const size_t bytes = TypeBytes(type), size = expected.size() / bytes;
  if (g_tally.control && size > 0) actual[size / 2 * bytes] ^= 0x10;
  size_t num_wrong = 0, first = 0;
  for (size_t i = 0; i < size; ++i) {
    const uint8_t *a = &actual[i * bytes], *b = &expected[i * bytes];
    if (std::memcmp(a, b, bytes) == 0) continue;
    if (std::isnan(ReadNumber(type, a)) && std::isnan(ReadNumber(type, b))) continue;
    if (num_wrong++ == 0) first = i;
  }
  if (num_wrong > 0) Report(name, rank, first, num_wrong, size);
}

inline void CompareWithin(const char* name, int rank, std::vector<float> actual,
                          const std::vector<double>& expected, const std::vector<double>& bound) {
  ++g_tally.num_compared;
  const size_t middle = actual.size() / 2;
  if (g_tally.control) actual[middle] += 1.0f + 3.0f * static_cast<float>(bound[middle]);
  size_t num_wrong = 0, first = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    if (std::abs(actual[i] - expected[i]) <= bound[i]) continue;  // false for NaN
    if (num_wrong++ == 0) first = i;
  }
  if (num_wrong > 0) Report(name, rank, first, num_wrong, actual.size());
}

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_COMPARE_H_
