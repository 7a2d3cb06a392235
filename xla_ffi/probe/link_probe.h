// The part of jax_ep._cuda that measures links and memory, for the benchmark and the doctor.
#ifndef JAX_EP_XLA_FFI_PROBE_LINK_PROBE_H_
#define JAX_EP_XLA_FFI_PROBE_LINK_PROBE_H_

#include <nanobind/nanobind.h>

namespace jax_ep {

// Adds the functions probe_*.
void RegisterLinkProbe(nanobind::module_& m);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_PROBE_LINK_PROBE_H_
