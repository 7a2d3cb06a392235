#include "xla_ffi/call_site_cuda.h"

#include <atomic>

#include "xla_ffi/hash.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

std::atomic<uint64_t> g_timeout_ns{uint64_t{30} * 1000 * 1000 * 1000};

}  // namespace

ffi::TypeId CudaSiteState::id = {};

void SetCudaTimeout(uint64_t nanoseconds) { g_timeout_ns = nanoseconds; }

ffi::ErrorOr<std::unique_ptr<CudaSiteState>> MakeCudaSite(
    const char* op, int64_t num_ranks, ffi::Span<const int64_t> members,
    std::initializer_list<int64_t> static_values) {
  const auto num_members = static_cast<int64_t>(members.size());
  if (num_ranks < 1 || num_ranks > gpu::kMaxPeers || num_members % num_ranks != 0) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInvalidArgument,
                   std::string(op) + ": attribute members has " + std::to_string(num_members) +
                       " entries, expected a multiple of num_ranks = " + std::to_string(num_ranks) +
                       ", which must be at most " + std::to_string(gpu::kMaxPeers)));
  }
  auto state = std::make_unique<CudaSiteState>();
  state->op = op;
  state->num_ranks = static_cast<int>(num_ranks);
  state->members.assign(members.begin(), members.end());
  state->operation = HashOperation(op, static_values, members);
  return state;
}

ffi::Error EnterGroup(const CudaSiteState& state, int32_t ordinal,
                      std::initializer_list<SharedBuffer> buffers, gpu::GroupView* view) {
  SymmetricMemory& memory = SymmetricMemory::Get();
  const auto fail = [&](const std::string& what) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, std::string(state.op) + ": " + what);
  };
  if (auto error = memory.RecordedError()) {
    return {ffi::ErrorCode::kDeadlineExceeded, *error};
  }
  const int64_t own = memory.Member(ordinal);
  const int64_t* group = nullptr;
  for (size_t i = 0; i < state.members.size(); ++i) {
    if (state.members[i] == own)
      group = state.members.data() + i / state.num_ranks * state.num_ranks;
  }
  if (group == nullptr) {
    return fail("CUDA device " + std::to_string(ordinal) +
                " is not in the mesh that this was compiled for");
  }
  if (auto error = memory.FillGroup(group, state.num_ranks, ordinal, view)) return fail(*error);
  for (const SharedBuffer& buffer : buffers) {
    if (auto error = memory.Share(ordinal, buffer.data, buffer.bytes)) {
      return fail(std::string(buffer.name) + ": " + *error);
    }
  }
  // Ranks share the work by block, so their grids must be equal.
  view->operation = state.operation + static_cast<uint64_t>(NumSms(ordinal, 0));
  view->timeout_ns = g_timeout_ns;
  return ffi::Error::Success();
}

int NumSms(int32_t ordinal, int64_t wanted) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal);
  if (count < 1) count = 1;
  if (count > gpu::kMaxBlocks) count = gpu::kMaxBlocks;
  return wanted > 0 && wanted < count ? static_cast<int>(wanted) : count;
}

}  // namespace jax_ep
