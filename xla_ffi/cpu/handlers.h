// The XLA FFI handlers by platform. Each operation has an instantiate handler, which makes the call
// site's state, and an execute handler; module.cc registers them.
#ifndef JAX_EP_XLA_FFI_CPU_HANDLERS_H_
#define JAX_EP_XLA_FFI_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateLayoutCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateDispatchCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateLayoutAndDispatchCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateCombineCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDispatchCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutAndDispatchCpu);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineCpu);

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_HANDLERS_H_
