// The XLA FFI handlers for CUDA. Each operation has an instantiate handler, which makes the call
// site's state, and an execute handler; module.cc registers them.
#ifndef JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
#define JAX_EP_XLA_FFI_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateLayoutCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateCombineCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateCombineGradientCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineGradientCuda);

// The same, with the trait that lets XLA record their calls in command buffers.
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDispatchCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineGradientCudaRecordable);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
