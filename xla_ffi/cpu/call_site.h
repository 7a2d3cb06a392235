// What the CPU handlers share: the state of a call site and the way into the rendezvous.
#ifndef JAX_EP_XLA_FFI_CPU_CALL_SITE_H_
#define JAX_EP_XLA_FFI_CPU_CALL_SITE_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/cpu/meet/program.h"
#include "xla_ffi/cpu/ops/collective_op.h"
#include "xla_ffi/hash.h"

namespace jax_ep {

// One per call site and executable, shared by the process's devices.
struct CpuSiteState {
  static xla::ffi::TypeId id;
  std::shared_ptr<const cpu::CallSite> site;
};

// While set, every output is filled with 0xff (NaN; -1) before its operation starts. For tests.
void SetPoisonOutputs(bool poison);

template <typename Attributes>
xla::ffi::ErrorOr<std::unique_ptr<CpuSiteState>> Instantiate(
    const Attributes& attributes, std::initializer_list<int64_t> static_values) {
  const int64_t num_members = static_cast<int64_t>(attributes.members.size());
  if (attributes.num_ranks < 1 || num_members < 1 || num_members % attributes.num_ranks != 0) {
    return xla::ffi::Unexpected(xla::ffi::Error(
        xla::ffi::ErrorCode::kInvalidArgument,
        std::string(Attributes::kOp) + ": attribute members has " + std::to_string(num_members) +
            " entries, expected a positive multiple of num_ranks = " +
            std::to_string(attributes.num_ranks)));
  }
  auto state = std::make_unique<CpuSiteState>();
  state->site = cpu::MakeCallSite(
      Attributes::kOp, HashOperation(Attributes::kOp, static_values, attributes.members),
      attributes.num_ranks, {attributes.members.begin(), attributes.members.end()});
  return state;
}

xla::ffi::Future FailedFuture(xla::ffi::Error error);

// A result, absent ones included: its address or null.
struct Output {
  void* data;
  size_t bytes;
};

// Brings one rank to its call. `coordinates` is i32 [2]: the group's index and the rank in it.
xla::ffi::Future Arrive(const CpuSiteState& state, xla::ffi::RunId run,
                        const xla::ffi::Buffer<xla::ffi::S32, 1>& coordinates,
                        std::vector<const void*> in, const std::vector<Output>& out,
                        const cpu::OpFactory& make_op);

template <typename Buffer>
Output AsOutput(const Buffer& buffer) {
  return {buffer.untyped_data(), buffer.size_bytes()};
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_CALL_SITE_H_
