// What the kernels demand of a call beyond what holds on every platform (xla_ffi/calls.h).
#ifndef JAX_EP_XLA_FFI_CUDA_CHECKS_H_
#define JAX_EP_XLA_FFI_CUDA_CHECKS_H_

#include "xla_ffi/calls.h"

namespace jax_ep {

void CheckForKernel(const LayoutCall& call, Checks* checks);
void CheckForKernel(const DispatchCall& call, Checks* checks);
void CheckForKernel(const LayoutAndDispatchCall& call, Checks* checks);
void CheckForKernel(const CombineCall& call, Checks* checks);
void CheckForKernel(const CombineGradientCall& call, Checks* checks);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_CHECKS_H_
