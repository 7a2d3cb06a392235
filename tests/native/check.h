// How the tests of the host side end when something is not so.
#ifndef JAX_EP_TESTS_NATIVE_CHECK_H_
#define JAX_EP_TESTS_NATIVE_CHECK_H_

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                                 \
    }                                                                                \
  } while (false)

#endif  // JAX_EP_TESTS_NATIVE_CHECK_H_
