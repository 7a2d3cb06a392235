// What NVSHMEM leaves to the end of a process that has started it more than once.
//
// NVSHMEM 3.4.5 registers its bootstrap's end with atexit() at each start, and that does not say that it
// has been called. Where NVSHMEM has come to an orderly end it does nothing. Where it has not, for a
// process did not come to it, the second of these calls goes to a library that the first has closed.
#ifndef JAX_EP_XLA_FFI_NETWORK_EXIT_GUARD_H_
#define JAX_EP_XLA_FFI_NETWORK_EXIT_GUARD_H_

namespace jax_ep {

// Before each start: what that registers is called at the process's end, and then, if `has_open_end()`
// says so and it was not the first start, the process ends with its status, without what has been
// registered earlier. By one caller.
void GuardExit(bool (*has_open_end)());

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_NETWORK_EXIT_GUARD_H_
