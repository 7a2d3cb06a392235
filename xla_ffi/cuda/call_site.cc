#include "xla_ffi/cuda/call_site.h"

#include <atomic>
#include <stdexcept>

#include "xla_ffi/memory/driver.h"

namespace jax_ep {
namespace {

namespace ffi = xla::ffi;

constexpr size_t kStagingAlignment = 256;  // of a buffer in the staging region, in bytes
constexpr int kPoison = 0xff;
// Mixed into the operation.
constexpr uint64_t kInSlots = 1;
constexpr uint64_t kOverNetwork = 2;  // and how many ranks a node has

std::atomic<bool> g_poison_outputs{false};

// In place of a kernel, for the other ranks not to wait for it until the arrival timeout:
// `given_up` is in host-mapped memory that stays. When a copy fails, they wait.
void CopyGivenUp(const gpu::GroupView& group, const uint64_t* given_up, cudaStream_t stream) {
  for (int r = 0; r < group.num_ranks; ++r) {
    if (r == group.rank) continue;
    (void)cudaMemcpyAsync(&group.peer[r].control->given_up, given_up, sizeof *given_up,
                          cudaMemcpyDefault, stream);
  }
}

void TellOn(cudaStream_t stream, const GroupCall& group, const uint64_t* given_up) {
  CopyGivenUp(group, given_up, stream);
  if (const NetworkCall* network = group.network()) {
    (void)network->part.launch_tell(group, network->group, stream);
  }
}

// On the call's stream, behind the calls that are under way. While XLA records that for a command
// buffer, which it throws away when the call fails, on another one.
void TellThePeers(const GroupCall& group, const uint64_t* given_up, cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  (void)cudaStreamIsCapturing(stream, &status);
  if (status == cudaStreamCaptureStatusNone) return TellOn(stream, group, given_up);
  const AnyCallScope scope;
  try {
    const OwnStream own("a stream to tell the other ranks");
    TellOn(own.get(), group, given_up);
  } catch (const std::runtime_error&) {
  }
}

}  // namespace

ffi::TypeId CudaSiteState::id = {};

ffi::ErrorOr<std::unique_ptr<CudaSiteState>> MakeCudaSite(const char* op, Groups groups,
                                                          uint64_t operation) {
  if (groups.num_ranks() > gpu::kMaxPeers) {
    return ffi::Unexpected(
        ffi::Error(ffi::ErrorCode::kInvalidArgument,
                   std::string(op) + ": num_ranks is " + std::to_string(groups.num_ranks()) +
                       ", but must be at most " + std::to_string(gpu::kMaxPeers)));
  }
  auto state = std::make_unique<CudaSiteState>();
  state->op = op;
  state->groups = std::move(groups);
  state->operation = operation;
  return state;
}

// Staging: a buffer that peers cannot reach has a place in the device's staging region for the time
// of the call, and every call begins again at the region's start.
//
// That is right because calls of a device follow one another on its stream, and a peer touches the
// region only between two mails (cuda/sync/start_end.cuh). It begins after [S2], which observes
// this call's own [S1], so never before what stands on the stream before the kernel: the copies in.
// It ends before the kernel does: a peer writes nothing after its last [P1], which the kernel waits
// for ([P2]), and reads nothing, which it does in layout alone, after [E1] ([E2]). So what the
// stream does after the kernel, the copies out and the next call's copies in, meets nobody. A
// replayed command buffer repeats copies and kernel in the same order.
//
// A call that fails sees its peers out before it ends (cuda/sync/leave.cuh), here as for XLA's
// buffers; then the group is broken, and the region is used again only after a new beginning.
ffi::Error EnterGroup(const CudaSiteState& state, int32_t ordinal, cudaStream_t stream,
                      std::initializer_list<SharedBuffer> buffers, GroupCall* call,
                      const std::optional<gpu::SlotSizes>& slot_sizes) {
  SymmetricMemory& memory = SymmetricMemory::Get();
  const auto fail = [&](const std::string& what) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, std::string(state.op) + ": " + what);
  };
  const int64_t own = memory.Member(ordinal);
  if (own < 0) {
    return fail("CUDA device " + std::to_string(ordinal) +
                " is not set up: jax_ep.finalize() has been called. Call jax_ep.initialize() in "
                "every process (in a job of one process too)");
  }
  const std::optional<Groups::Place> place = state.groups.Find(own);
  if (!place) {
    return fail("CUDA device " + std::to_string(ordinal) +
                " is not in the mesh that this was compiled for");
  }
  auto num_ranks = static_cast<int>(state.groups.num_ranks());
  int64_t all_members[gpu::kMaxPeers];
  for (int r = 0; r < num_ranks; ++r) all_members[r] = state.groups.MemberAt(place->group, r);
  if (auto problem = Network::Get().Find(all_members, num_ranks, static_cast<int>(place->rank),
                                         &call->network_)) {
    return fail(*problem);
  }
  const NetworkCall* const network = call->network();
  const int64_t* members = all_members;  // of this node
  if (network != nullptr) {
    members += network->first_rank();
    num_ranks = network->region.ranks_per_node;
  }
  bool with_other_processes = false;
  for (int r = 0; r < num_ranks; ++r) {
    with_other_processes |= process_of(members[r]) != process_of(own);
  }
  StagingRegion staging;
  if (auto error = memory.FillGroup(members, num_ranks, ordinal, call, &staging)) {
    return fail(*error);
  }
  if (network != nullptr) call->nodes = network->nodes;
  if (const uint64_t* given_up = memory.GivenUp(ordinal)) {
    TellThePeers(*call, given_up, stream);
    return {ffi::ErrorCode::kDeadlineExceeded, memory.RecordedError().value_or("")};
  }
  // Ranks share the work by block, so their grids must be equal.
  call->operation = state.operation + static_cast<uint64_t>(NumSms(ordinal, 0));
  if (network != nullptr) {
    call->operation = Mix(Mix(call->operation, kOverNetwork), static_cast<uint64_t>(num_ranks));
  }
  call->in_slots_ =
      slot_sizes && gpu::fits_slots(*slot_sizes, call->slot_area_bytes) &&
      (network == nullptr || gpu::fits_far_slots(network->group.slots.at, *slot_sizes));
  if (call->in_slots_) call->operation = Mix(call->operation, kInSlots);
  if (num_ranks == 1 || call->in_slots_) return ffi::Error::Success();

  size_t used = 0;  // of the staging region
  std::string names, reason;
  for (SharedBuffer buffer : buffers) {
    if (buffer.data == nullptr || buffer.bytes == 0) continue;
    if (network != nullptr && buffer.use == Use::kInput) continue;
    if (network != nullptr && buffer.use == Use::kLanding) buffer.use = Use::kOutput;
    auto problem = memory.Share(ordinal, buffer.data, buffer.bytes, with_other_processes);
    if (!problem) continue;
    if (call->num_staged_ == gpu::kNumAddresses) return fail("too many shared buffers");
    call->staged_[call->num_staged_++] = {buffer, reinterpret_cast<void*>(staging.begin + used)};
    used += (buffer.staged_bytes() + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
    names += (names.empty() ? "" : ", ") + std::string(buffer.name);
    reason = std::move(*problem);
  }
  if (used > staging.bytes) {
    return fail("the other ranks cannot reach the memory of " + names + " (" + reason +
                "), so the call needs " + std::to_string(used) +
                " bytes of staging region, but device " + std::to_string(ordinal) + " has " +
                std::to_string(staging.bytes) +
                ". Call jax_ep.initialize(staging_bytes=...) in every process, with the largest "
                "number that a call needs (in a job of several processes after jax_ep.finalize())");
  }
  for (int i = 0; i < call->num_staged_; ++i) {
    const auto& [buffer, at] = call->staged_[i];
    cudaError_t status = cudaSuccess;
    if (buffer.use == Use::kInput) {
      status = cudaMemcpyAsync(at, buffer.data, buffer.bytes, cudaMemcpyDeviceToDevice, stream);
    } else if (g_poison_outputs) {
      status = cudaMemsetAsync(at, kPoison, buffer.staged_bytes(), stream);
    }
    if (status != cudaSuccess) return CudaStatus(state.op, status);
  }
  return ffi::Error::Success();
}

cudaError_t GroupCall::CopyOut(cudaError_t launched, cudaStream_t stream) const {
  for (int i = 0; i < num_staged_ && launched == cudaSuccess; ++i) {
    const auto& [buffer, at] = staged_[i];
    if (buffer.use != Use::kOutput) continue;
    launched = cudaMemcpyAsync(const_cast<void*>(buffer.data), at, buffer.bytes,
                               cudaMemcpyDeviceToDevice, stream);
  }
  return launched;
}

int NumSms(int32_t ordinal, int64_t wanted) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, ordinal);
  if (count < 1) count = 1;
  if (count > gpu::kMaxBlocks) count = gpu::kMaxBlocks;
  return wanted > 0 && wanted < count ? static_cast<int>(wanted) : count;
}

void SetPoisonOutputs(bool poison) { g_poison_outputs = poison; }

XLA_FFI_Error* PoisonResults(XLA_FFI_CallFrame* call) {
  // A call that asks for the handler's metadata has no results.
  if (!g_poison_outputs || call->rets.size == 0) return nullptr;
  XLA_FFI_Stream_Get_Args stream{XLA_FFI_Stream_Get_Args_STRUCT_SIZE, nullptr, call->ctx, nullptr};
  if (XLA_FFI_Error* error = call->api->XLA_FFI_Stream_Get(&stream)) return error;
  for (int64_t i = 0; i < call->rets.size; ++i) {
    const auto* result = static_cast<const XLA_FFI_Buffer*>(call->rets.rets[i]);
    size_t bytes = ffi::ByteWidth(static_cast<ffi::DataType>(result->dtype));
    for (int64_t d = 0; d < result->rank; ++d) bytes *= static_cast<size_t>(result->dims[d]);
    if (bytes == 0) continue;  // there is no memory: its address is null
    // A failure shows in the launch that follows.
    (void)cudaMemsetAsync(result->data, kPoison, bytes, static_cast<cudaStream_t>(stream.stream));
  }
  return nullptr;
}

}  // namespace jax_ep
