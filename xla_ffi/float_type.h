// XLA's element types as the CPU arithmetic names them.
#ifndef JAX_EP_XLA_FFI_FLOAT_TYPE_H_
#define JAX_EP_XLA_FFI_FLOAT_TYPE_H_

#include <optional>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cpu/ops/row_math.h"

namespace jax_ep {

inline std::optional<cpu::FloatType> ToFloatType(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::F32:
      return cpu::FloatType::kF32;
    case xla::ffi::F16:
      return cpu::FloatType::kF16;
    case xla::ffi::BF16:
      return cpu::FloatType::kBF16;
    default:
      return std::nullopt;
  }
}

// Types narrower than a byte are packed by XLA, and FFI counts a byte for each: rows of them
// cannot be told apart.
inline bool IsWholeBytes(xla::ffi::DataType type) {
  switch (type) {
    case xla::ffi::S1:
    case xla::ffi::S2:
    case xla::ffi::S4:
    case xla::ffi::U1:
    case xla::ffi::U2:
    case xla::ffi::U4:
    case xla::ffi::F4E2M1FN:
      return false;
    default:
      return true;
  }
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_FLOAT_TYPE_H_
