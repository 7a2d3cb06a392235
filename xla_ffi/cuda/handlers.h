// The XLA FFI handlers for CUDA. Each operation of a group has an instantiate handler, which makes the call
// site's state, and an execute handler; module.cc registers them.
#ifndef JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
#define JAX_EP_XLA_FFI_CUDA_HANDLERS_H_

#include <cuda_runtime_api.h>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cuda/call_site.h"

namespace jax_ep {

XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateLayoutCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateCombineCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateCombineGradientCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kInstantiateLayoutAndDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDispatchCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineGradientCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutAndDispatchCuda);

// The same, with the trait that lets XLA record their calls in command buffers. It is a trait of
// the handler itself, for not every CUDA plugin takes it at registration; module.cc hands out
// either.
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kDispatchCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kCombineGradientCudaRecordable);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kLayoutAndDispatchCudaRecordable);

// Of this device alone: what a dispatch across nodes is preceded by. Without a state.
inline constexpr char kQuantizeOp[] = "jax_ep_quantize";
XLA_FFI_DECLARE_HANDLER_SYMBOL(kQuantizeCuda);
XLA_FFI_DECLARE_HANDLER_SYMBOL(kQuantizeCudaRecordable);

// What XLA passes to each: the operands and results of xla_ffi/calls.h.
template <typename Attributes>
auto CudaCallBinding() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
      .Ctx<xla::ffi::DeviceOrdinal>()
      .Ctx<xla::ffi::State<CudaSiteState>>()
      .Attrs<Attributes>()
      .RemainingArgs()
      .RemainingRets();
}

// The three handlers of an operation whose execute function is called so.
#define JAX_EP_DEFINE_CUDA_HANDLERS(Execute, Attributes)                                   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(kInstantiate##Execute##Cuda, InstantiateCuda<Attributes>,  \
                                ::xla::ffi::Ffi::BindInstantiate().Attrs<Attributes>());   \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(k##Execute##Cuda, Execute, CudaCallBinding<Attributes>()); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(k##Execute##CudaRecordable, Execute,                       \
                                CudaCallBinding<Attributes>(),                             \
                                {::xla::ffi::Traits::kCmdBufferCompatible})

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_HANDLERS_H_
