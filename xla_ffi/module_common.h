// What both Python modules hand to JAX.
#ifndef JAX_EP_XLA_FFI_MODULE_COMMON_H_
#define JAX_EP_XLA_FFI_MODULE_COMMON_H_

#include <nanobind/nanobind.h>

#include <chrono>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

inline std::chrono::nanoseconds Nanoseconds(double seconds) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
      std::chrono::duration<double>(seconds));
}

// The stages of a target, as jax.ffi.register_ffi_target takes them.
inline nanobind::dict Stages(XLA_FFI_Handler* instantiate, XLA_FFI_Handler* execute) {
  nanobind::dict stages;
  stages["instantiate"] = nanobind::capsule(reinterpret_cast<void*>(instantiate));
  stages["execute"] = nanobind::capsule(reinterpret_cast<void*>(execute));
  return stages;
}

// The call sites' state, as jax.ffi.register_ffi_type takes it.
template <typename State>
nanobind::dict StateType() {
  static auto type_info = xla::ffi::MakeTypeInfo<State>();
  nanobind::dict type;
  type["type_id"] = nanobind::capsule(&State::id);
  type["type_info"] = nanobind::capsule(&type_info);
  return type;
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_MODULE_COMMON_H_
