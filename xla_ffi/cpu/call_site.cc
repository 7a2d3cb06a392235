#include "xla_ffi/cpu/call_site.h"

#include <cstring>
#include <utility>

#include "xla_ffi/cpu/meet/rendezvous.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

std::atomic<bool> g_poison_outputs{false};

ffi::ErrorCode Code(cpu::FailureCode code) {
  switch (code) {
    case cpu::FailureCode::kDeadlineExceeded:
      return ffi::ErrorCode::kDeadlineExceeded;
    case cpu::FailureCode::kUnavailable:
      return ffi::ErrorCode::kUnavailable;
    case cpu::FailureCode::kFailedPrecondition:
      return ffi::ErrorCode::kFailedPrecondition;
    case cpu::FailureCode::kInternal:
      break;
  }
  return ffi::ErrorCode::kInternal;
}

}  // namespace

ffi::TypeId CpuSiteState::id = {};

void SetPoisonOutputs(bool poison) { g_poison_outputs = poison; }

ffi::Future FailedFuture(ffi::Error error) {
  ffi::Promise promise;
  ffi::Future future(promise);
  promise.SetError(std::move(error));
  return future;
}

ffi::Future Arrive(const CpuSiteState& state, ffi::RunId run, const Coordinates& coordinates,
                   std::vector<const void*> in, const std::vector<Output>& out,
                   const cpu::OpFactory& make_op) try {
  const cpu::CallSite& site = *state.site;
  const int64_t num_groups = static_cast<int64_t>(site.rank_process.size()) / site.num_ranks;
  const bool pair = coordinates.element_count() == 2;
  const int64_t group = pair ? coordinates.typed_data()[0] : -1;
  const int64_t rank = pair ? coordinates.typed_data()[1] : -1;
  if (group < 0 || group >= num_groups || rank < 0 || rank >= site.num_ranks) {
    return FailedFuture({ffi::ErrorCode::kInvalidArgument,
                         site.op + ": coordinates name rank " + std::to_string(rank) +
                             " of group " + std::to_string(group) + ", but there are " +
                             std::to_string(num_groups) + " groups of " +
                             std::to_string(site.num_ranks) + " ranks"});
  }
  cpu::Member member;
  member.rank = rank;
  member.in = std::move(in);
  for (const Output& output : out) {
    if (g_poison_outputs && output.bytes > 0) std::memset(output.data, 0xff, output.bytes);
    member.out.push_back(output.data);
    member.sizes_hash = Mix(member.sizes_hash, output.bytes);
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  member.done = [promise](const cpu::MaybeFailure& failure) mutable {
    if (failure) {
      promise.SetError({Code(failure->code), failure->message});
    } else {
      promise.SetAvailable();
    }
  };
  cpu::Rendezvous::Get().Arrive(state.site, run.run_id, group, std::move(member), make_op);
  return future;
} catch (const std::exception& e) {
  return FailedFuture({ffi::ErrorCode::kInternal, std::string(state.site->op) + ": " + e.what()});
}

}  // namespace jax_ep
