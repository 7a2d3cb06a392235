// The seam: what the handlers pass to the kernels. Raw pointers, sizes and a stream.
#ifndef JAX_EP_CUDA_LAUNCH_H_
#define JAX_EP_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/core/float_type.h"
#include "cuda/core/limits.h"
#include "cuda/core/placement.h"
#include "cuda/core/tables.h"
#include "cuda/core/wire_row.h"
#include "cuda/memory/control.h"

namespace jax_ep::gpu {

// How this device reaches one rank of its group.
struct PeerView {
  ControlBlock* control;  // of that rank, mapped here
  int64_t shift;          // added to an address of that rank to get one that is valid here
  uint64_t staging;       // its staging region, mapped here; 0 without
  int32_t slot_here;      // its slot in this device's control block
  int32_t slot_there;     // this device's slot in its control block
};

// A group across nodes as ranks of all of them, beside its part on this one: by what they tell each other
// that they have given up (cuda/network/tell.cuh). All null, and 0, of one on one node.
struct NodesView {
  uint64_t* given_up;  // [num_ranks], of a hop's signals: as ControlBlock::given_up, from each rank
  uint64_t* has_told;  // of this device: whether it has
  int32_t rank, num_ranks;
};

struct GroupView {
  ControlBlock* control;  // of this device
  ErrorRecord* error;     // host-mapped
  uint64_t operation;     // hash that all ranks of the call share
  uint64_t call;     // not 0, another number for each launch of this device, or node of a graph
  uint64_t staging;  // what peers are shown as offsets: this device's staging region, or 0
  uint64_t staging_bytes;
  uint64_t slot_area_bytes;  // slot_area_bytes(..) of all devices' slots; 0 without slots
  int32_t rank;
  int32_t num_ranks;
  PeerView peer[kMaxPeers];  // by rank
  NodesView nodes;
};
static_assert(sizeof(GroupView) <= 2560, "fits the 4 KB of kernel parameters");

struct LayoutArguments : Tables<int32_t> {
  const int32_t* topk_idx;
  int64_t num_tokens, top_k, num_experts;
  Room room;
  int32_t *expert_counts, *expert_load, *counters;
};

enum class DispatchMode : int32_t {
  kCopy,
  kQuantize,    // tokens are float8_e4m3fn, with scales
  kDequantize,  // rows cross as float8_e4m3fn; tokens are products with their scales
  kScaled,      // x is float8 with scales; tokens and scales are those
  kWeighted,    // tokens are products with row_weights; their products with y are summed to dots
};

struct DispatchArguments : TableView {
  const int32_t* topk_idx;
  const void* x;
  const float* topk_weights;  // null without
  void* tokens;               // [num_rows]
  float* scales;              // [num_rows, num_scales] with kQuantize and kScaled, else null
  float* weights;             // with topk_weights, else null
  // With kWeighted, else null: [C, row], [C], [C].
  const void* y;
  const float* row_weights;
  float* dots;
  // Null if peers reach `tokens`. Else where they write rows in its place:
  // [R, T, WireRowBytes], by source.
  void* landing;
  int64_t num_tokens, top_k, capacity, num_local_experts;
  int64_t num_channels, row_bytes;  // of a row of x
  int64_t num_rows;                 // of tokens: TableSizes::num_rows(expand)
  bool expand;                      // always with kWeighted
  DispatchMode mode;
  FloatType type;  // of x, if not kCopy or kScaled
  bool power_of_two_scales, zero_tail;
  bool is_integer;  // x's type
  // Of a row as it crosses: 0, if it does so as x is.
  int64_t num_scales;
  const float* x_scales;  // [T, num_scales] with kScaled, else null
};

// Of a row of x, as it crosses and in the landing area.
constexpr int64_t WireRowBytes(int64_t row_bytes, int64_t num_channels, int64_t num_scales) {
  return num_scales > 0 ? wire_row_bytes(num_channels, num_scales) : row_bytes;
}

struct CombineArguments : TableView {
  const int32_t* topk_idx;
  const void* y;
  const float* weights;  // null: 1
  const float* values;   // null without
  void* partial;         // [R, T, H], scratch that peers write
  void* out;
  float* collected;  // with values
  int64_t num_tokens, top_k, num_local_experts, num_channels;
  FloatType type;
  bool expand;  // as in DispatchArguments, of y; without it there are no weights
};

// Layout and dispatch in one. What DispatchArguments has too is as there; mode is not kWeighted.
struct LayoutAndDispatchArguments : LayoutArguments {
  const void* x;
  const float* topk_weights;  // null without
  const float* x_scales;
  void* tokens;
  float* scales;
  float* weights;  // with topk_weights, else null
  int64_t num_channels, row_bytes, num_rows, num_scales;
  bool expand;
  DispatchMode mode;
  FloatType type;
  bool power_of_two_scales, zero_tail, is_integer;
};

cudaError_t LaunchLayout(const GroupView& group, const LayoutArguments& arguments, int num_sms,
                         cudaStream_t stream);
cudaError_t LaunchDispatch(const GroupView& group, const DispatchArguments& arguments, int num_sms,
                           cudaStream_t stream);
cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& arguments, int num_sms,
                          cudaStream_t stream);
// In slots, for calls that fit (fits_slots, cuda/slots/fits.h); results are those of the above.
// CombineArguments::partial is not used.
cudaError_t LaunchLayoutAndDispatchInSlots(const GroupView& group,
                                           const LayoutAndDispatchArguments& arguments, int num_sms,
                                           cudaStream_t stream);
cudaError_t LaunchCombineInSlots(const GroupView& group, const CombineArguments& arguments,
                                 int num_sms, cudaStream_t stream);

// Loads every kernel on the current device and sets its limits, so that no first launch
// synchronises while a peer waits.
cudaError_t PrepareKernels();

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_LAUNCH_H_
