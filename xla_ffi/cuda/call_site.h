// What the CUDA handlers share: the state of a call site, and the view of its group.
#ifndef JAX_EP_XLA_FFI_CUDA_CALL_SITE_H_
#define JAX_EP_XLA_FFI_CUDA_CALL_SITE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "cuda/launch.h"
#include "cuda/slots/fits.h"
#include "xla/ffi/api/ffi.h"
#include "xla_ffi/attributes.h"
#include "xla_ffi/cuda/network.h"
#include "xla_ffi/groups.h"
#include "xla_ffi/hash.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {

// One per call site and executable, shared by the process's devices.
struct CudaSiteState {
  static xla::ffi::TypeId id;
  const char* op;
  Groups groups;
  uint64_t operation;  // hash of the operation and its attributes
};

xla::ffi::ErrorOr<std::unique_ptr<CudaSiteState>> MakeCudaSite(const char* op, Groups groups,
                                                               uint64_t operation);

template <typename Attributes>
xla::ffi::ErrorOr<std::unique_ptr<CudaSiteState>> InstantiateCuda(Attributes attributes) {
  xla::ffi::ErrorOr<Groups> groups = GroupsOf(attributes);
  if (!groups.has_value()) return xla::ffi::Unexpected(groups.error());
  return MakeCudaSite(Attributes::kOp, std::move(*groups), HashOf(attributes));
}

// What happens to a shared buffer during the call.
enum class Use {
  kInput,    // peers read it
  kScratch,  // peers write it; nobody needs it after the call
  kOutput,   // peers and this device write it
  kLanding,  // likewise; if peers cannot reach it, they write a landing area in its place, from which
             // this device moves on what it finds
};

// A buffer that peers read or write during the call.
struct SharedBuffer {
  const char* name;
  const void* data;
  size_t bytes;
  Use use = Use::kInput;
  size_t landing_bytes = 0;  // of the landing area

  size_t staged_bytes() const { return use == Use::kLanding ? landing_bytes : bytes; }
};

// A call of one device: its view of the group, or, where that lies on several nodes, of its own
// node's part, and where its shared buffers are.
class GroupCall : public gpu::GroupView {
 public:
  // Null on one node.
  const NetworkCall* network() const { return network_ ? &*network_ : nullptr; }

  // Whether the call goes through slots: then peers touch no buffer of it.
  bool in_slots() const { return in_slots_; }

  // What the kernel takes in place of a shared buffer: the buffer, or its place in the staging
  // region.
  template <typename T>
  T* At(T* buffer) const {
    const Staged* staged = Find(buffer);
    const bool moves = staged != nullptr && staged->buffer.use != Use::kLanding;
    return moves ? static_cast<T*>(staged->at) : buffer;
  }

  // The landing area of a buffer; null if peers reach the buffer.
  void* LandingOf(const void* buffer) const {
    const Staged* staged = Find(buffer);
    return staged != nullptr && staged->buffer.use == Use::kLanding ? staged->at : nullptr;
  }

  // Ranks whose sizes differ find that they are in different calls.
  void Distinguish(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) operation = Mix(operation, static_cast<uint64_t>(size));
  }

  // After the kernel's launch, on the same stream: outputs go from the staging region to where they
  // belong. Passes a failed launch on.
  cudaError_t CopyOut(cudaError_t launched, cudaStream_t stream) const;

 private:
  friend xla::ffi::Error EnterGroup(const CudaSiteState&, int32_t, cudaStream_t,
                                    std::initializer_list<SharedBuffer>, GroupCall*,
                                    const std::optional<gpu::SlotSizes>&);
  struct Staged {
    SharedBuffer buffer;
    void* at;
  };
  const Staged* Find(const void* buffer) const {
    for (int i = 0; i < num_staged_; ++i) {
      if (staged_[i].buffer.data == buffer) return &staged_[i];
    }
    return nullptr;
  }
  Staged staged_[gpu::kNumAddresses];
  int num_staged_ = 0;
  bool in_slots_ = false;
  std::optional<NetworkCall> network_;
};

// Begins a call: makes the buffers reachable for the group's other ranks, or stages them, and fills
// the view. Fails if a kernel has recorded an error, and tells the other ranks.
//
// `slot_sizes`: of a call that slots may take; they do if it fits. That follows from what the ranks
// have agreed on (attributes, slots, devices), and is part of the operation all the same. A group
// across nodes has no landing areas, and nobody reads another rank's buffers.
xla::ffi::Error EnterGroup(const CudaSiteState& state, int32_t ordinal, cudaStream_t stream,
                           std::initializer_list<SharedBuffer> buffers, GroupCall* call,
                           const std::optional<gpu::SlotSizes>& slot_sizes = std::nullopt);

// SMs that a call uses, of `wanted` ones (0: all).
int NumSms(int32_t ordinal, int64_t wanted);

// For tests, as on CPU: every result is filled with 0xff, NaN in floats and -1 in integers, before
// its operation begins, so that what an operation forgets to write is not right by luck. A command
// buffer that was recorded before does not change.
void SetPoisonOutputs(bool poison);
XLA_FFI_Error* PoisonResults(XLA_FFI_CallFrame* call);

// The handler, with its results poisoned if they are to be.
template <XLA_FFI_Handler* kHandler>
XLA_FFI_Error* Poisoned(XLA_FFI_CallFrame* call) {
  XLA_FFI_Error* error = PoisonResults(call);
  return error != nullptr ? error : kHandler(call);
}

// A call that kernels over the network do not take.
inline xla::ffi::Error Refused(const char* op, const std::string& problem) {
  return {xla::ffi::ErrorCode::kUnimplemented, std::string(op) + ": " + problem};
}

inline xla::ffi::Error CudaStatus(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return xla::ffi::Error::Success();
  return {xla::ffi::ErrorCode::kInternal, std::string(op) + ": " + cudaGetErrorString(status)};
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_CALL_SITE_H_
