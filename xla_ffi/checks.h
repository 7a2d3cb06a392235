// Checks of a call, with messages that name the operation and the argument.
#ifndef JAX_EP_XLA_FFI_CHECKS_H_
#define JAX_EP_XLA_FFI_CHECKS_H_

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Collects the first complaint.
class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  bool ok() const { return message_.empty(); }
  xla::ffi::Error error() const { return {xla::ffi::ErrorCode::kInvalidArgument, message_}; }

  void Require(bool condition, const std::string& what) {
    if (!condition && ok()) Fail(what);
  }

  // Takes the place of an earlier complaint, which it explains.
  void Fail(const std::string& what) { message_ = std::string(op_) + ": " + what; }

  void Type(const char* name, xla::ffi::DataType type, xla::ffi::DataType expected) {
    Require(type == expected, std::string(name) + " has element type " +
                                  std::to_string(static_cast<int>(type)) + ", expected " +
                                  std::to_string(static_cast<int>(expected)));
  }

  // A dimension of -1 may be anything.
  template <typename Dimensions>
  void Shape(const char* name, const Dimensions& dims, std::initializer_list<int64_t> expected) {
    bool same = dims.size() == expected.size();
    std::string want, got;
    size_t i = 0;
    for (int64_t d : expected) {
      want += (i ? ", " : "") + (d < 0 ? std::string("any") : std::to_string(d));
      if (same && d >= 0) same = dims[i] == d;
      ++i;
    }
    for (i = 0; i < dims.size(); ++i) got += (i ? ", " : "") + std::to_string(dims[i]);
    Require(same, std::string(name) + " has shape [" + got + "], expected [" + want + "]");
  }

 private:
  const char* op_;
  std::string message_;
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CHECKS_H_
