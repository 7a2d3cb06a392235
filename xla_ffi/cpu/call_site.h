// What the CPU handlers share: the state of a call site and the way into the rendezvous.
#ifndef JAX_EP_XLA_FFI_CPU_CALL_SITE_H_
#define JAX_EP_XLA_FFI_CPU_CALL_SITE_H_

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/attributes.h"
#include "xla_ffi/calls.h"
#include "xla_ffi/cpu/meet/program.h"
#include "xla_ffi/cpu/ops/collective_op.h"
#include "xla_ffi/groups.h"

namespace jax_ep {

// One per call site and executable, shared by the process's devices.
struct CpuSiteState {
  static xla::ffi::TypeId id;
  std::shared_ptr<const cpu::CallSite> site;
};

// While set, every output is filled with 0xff (NaN; -1) before its operation starts. For tests.
void SetPoisonOutputs(bool poison);

template <typename Attributes>
xla::ffi::ErrorOr<std::unique_ptr<CpuSiteState>> Instantiate(Attributes attributes) {
  const xla::ffi::ErrorOr<Groups> groups = GroupsOf(attributes);
  if (!groups.has_value()) return xla::ffi::Unexpected(groups.error());
  auto state = std::make_unique<CpuSiteState>();
  state->site = cpu::MakeCallSite(Attributes::kOp, HashOf(attributes), attributes.num_ranks,
                                  groups->Members());
  return state;
}

xla::ffi::Future FailedFuture(xla::ffi::Error error);

// A result, absent ones included: its address or null.
struct Output {
  void* data;
  size_t bytes;
};

inline Output AsOutput(const Memory& memory) { return {memory.data, memory.bytes}; }

// i32 [2]: the group's index and the rank in it. The first operand of every call; the others are
// those of xla_ffi/calls.h.
using Coordinates = xla::ffi::Buffer<xla::ffi::S32, 1>;

// Brings one rank to its call.
xla::ffi::Future Arrive(const CpuSiteState& state, xla::ffi::RunId run,
                        const Coordinates& coordinates, std::vector<const void*> in,
                        const std::vector<Output>& out, const cpu::OpFactory& make_op);

// What XLA passes to each handler.
template <typename Attributes>
auto CpuCallBinding() {
  return xla::ffi::Ffi::Bind()
      .Ctx<xla::ffi::RunId>()
      .Ctx<xla::ffi::State<CpuSiteState>>()
      .Attrs<Attributes>()
      .template Arg<Coordinates>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CPU_CALL_SITE_H_
