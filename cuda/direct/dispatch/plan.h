// How dispatch cuts rows and shares a block's memory among its rings: plain C++17, computed by the
// host. dispatch.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_DISPATCH_PLAN_H_
#define JAX_EP_CUDA_DIRECT_DISPATCH_PLAN_H_

#include <cstdint>

#include "cuda/direct/pieces.h"
#include "cuda/memory/control.h"
#include "cuda/rows/row_format.h"

namespace jax_ep::gpu::dispatch {

constexpr int64_t kRingBytes = 204 * 1024;  // of shared memory, for all rings
constexpr int kMaxStages = 32;              // of a block
constexpr int kMinStages = 2;               // of a ring
constexpr int64_t kMaxPieceBytes = 16384;
constexpr int kFewUnits = 64;    // of a block
constexpr int kRowsAtOnce = 32;  // that a warp looks at, for those to be zeroed
// Rows of y are fetched into the L2 cache ahead of the helpers on so many SMs at most, for what they
// wait for there is latency (on more it is memory, and this made it worse); and if that much stays
// in the cache until it is used.
constexpr int kMaxFetchingSms = 64;
constexpr int64_t kMaxFetchedBytes = 48 << 20;

// What a plan depends on.
struct Sizes {
  int64_t num_tokens;
  int64_t rows_of_token;  // at one rank, at most
  int64_t row_bytes;      // as a row crosses a link
  int32_t num_ranks, num_sms;
  bool has_landing;  // peers' rows come to a landing area
};

struct Plan {
  int32_t num_pieces;                  // of a row
  int32_t piece_bytes;                 // of each but the last, which may be shorter
  int32_t num_senders, num_receivers;  // rings of a block
  int32_t num_stages;                  // of a ring
  bool fetches_ahead;                  // with helpers: what they read beside the rows
};

constexpr int32_t StageBytes(const RowFormat& format, const Plan& plan) {
  return plan.piece_bytes + format.beside_row_bytes;
}

// Of a block's shared memory.
JAX_EP_HOST_DEVICE constexpr int64_t RingBytes(int64_t num_rings) {
  return kRingBytes / num_rings / 128 * 128;
}

// False if the rows are too long for the codec's stages, or too many.
constexpr bool MakePlan(const RowFormat& format, const Sizes& sizes, Plan* plan) {
  if (sizes.row_bytes <= 0) return false;
  int64_t most_pieces = 1;
  if (format.is_cut) most_pieces = (sizes.row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  if (!format.is_cut && sizes.row_bytes > kRingBytes) return false;
  const Pieces pieces = CutRow(sizes.row_bytes, most_pieces);
  plan->num_pieces = pieces.count;
  plan->piece_bytes = pieces.bytes;
  const int64_t num_units = sizes.num_tokens * pieces.count;
  if (num_units > INT32_MAX ||
      (num_units + sizes.num_sms - 1) / sizes.num_sms > kMaxUnitsPerBlock) {
    return false;
  }
  const bool has_few = num_units <= int64_t{kFewUnits} * sizes.num_sms;
  int32_t num_rings = (has_few ? format.few_rings : format.max_rings) + 2;
  int64_t num_stages = 0;
  do {
    num_rings -= 2;
    if (num_rings == 0) return false;
    num_stages = (RingBytes(num_rings) - format.ring_bytes) / StageBytes(format, *plan);
  } while (num_stages < kMinStages);
  const int64_t most_stages = kMaxStages / num_rings;
  plan->num_stages = static_cast<int32_t>(num_stages < most_stages ? num_stages : most_stages);
  // Half of the rings receive, unless all that crosses is where it belongs.
  const bool is_final =
      sizes.rows_of_token == 1 && !sizes.has_landing && format.is_stored_as_it_crosses;
  plan->num_receivers = sizes.num_ranks == 1 || is_final ? 0 : num_rings / 2;
  plan->num_senders = num_rings - plan->num_receivers;
  // Of a unit, about.
  const int64_t rows = (sizes.rows_of_token + sizes.num_ranks - 1) / sizes.num_ranks;
  plan->fetches_ahead =
      format.num_helpers > 0 && sizes.num_sms <= kMaxFetchingSms &&
      int64_t{sizes.num_sms} * num_rings * (plan->num_stages - 1) * rows * sizes.row_bytes <=
          kMaxFetchedBytes;
  return true;
}

// Of the grid: one an SM, if each has units, or some of the `num_rows` to look at.
constexpr int32_t NumBlocks(int64_t num_units, int64_t num_rows, int32_t num_sms) {
  const int64_t to_look = (num_rows + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t wanted = num_units > to_look ? num_units : to_look;
  return static_cast<int32_t>(wanted < num_sms ? wanted : num_sms);
}
static_assert(NumBlocks(1, 32, 132) == 1 && NumBlocks(1, 33, 132) == 2 &&
              NumBlocks(4096, 33, 132) == 132 && NumBlocks(1, 16384, 132) == 132);

}  // namespace jax_ep::gpu::dispatch

#endif  // JAX_EP_CUDA_DIRECT_DISPATCH_PLAN_H_
