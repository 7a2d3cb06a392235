// The parts of network_simulated.
#ifndef JAX_EP_TESTS_NATIVE_NETWORK_SIMULATED_H_
#define JAX_EP_TESTS_NATIVE_NETWORK_SIMULATED_H_

#include "tests/native/simulated_network.h"

namespace jax_ep::gpu::test {

// How many of its checks have failed.
int TestLayouts(const NetworkModel& model, bool is_small);

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_NETWORK_SIMULATED_H_
