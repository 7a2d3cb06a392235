// What the kernels of a timeline build (JAX_EP_TIMELINE) have noted, for Python.
#ifndef JAX_EP_XLA_FFI_CUDA_TIMELINE_H_
#define JAX_EP_XLA_FFI_CUDA_TIMELINE_H_

#include <nanobind/nanobind.h>

namespace jax_ep {

// Adds the function `timeline`.
void RegisterTimeline(nanobind::module_& m);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_TIMELINE_H_
