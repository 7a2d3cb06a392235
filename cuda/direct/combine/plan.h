// How combine cuts rows and shares a block's memory: plain C++17, computed by the host. combine.cu
// states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_COMBINE_PLAN_H_
#define JAX_EP_CUDA_DIRECT_COMBINE_PLAN_H_

#include <cstdint>

#include "cuda/direct/pieces.h"
#include "cuda/memory/control.h"

namespace jax_ep::gpu::combine {

constexpr int kAdderWarps = 7;  // of a pipeline
constexpr int kNumAdders = kAdderWarps * 32;
constexpr int kVectorsEach = 4;  // of 16 bytes: what an adder has of a piece
constexpr int64_t kMaxPieceBytes = kNumAdders * kVectorsEach * 16;
constexpr int64_t kMinPieceBytes = 1024;
constexpr int kNumResults = 2;
constexpr int kMaxStages = 24;              // of a pipeline
constexpr int kMinStages = 2;               // likewise
constexpr int64_t kRingBytes = 220 * 1024;  // of shared memory, for stages, results and tables

// The scout's tables: of each kind of sum, so many of so many sums.
constexpr int kTableSums = 32;
constexpr int kNumTables = 2;
constexpr int32_t kSumsInTables = kNumTables * kTableSums;
constexpr int64_t kHeadBytes = 32;      // of a sum
constexpr int64_t kTableRowBytes = 12;  // of one of its K rows: where it begins, its weight
JAX_EP_HOST_DEVICE constexpr int64_t TablesBytes(int64_t top_k) {
  return kSumsInTables * (4 + 2 * (kHeadBytes + kTableRowBytes * top_k));
}

struct Plan {
  int32_t num_pieces;   // of a row
  int32_t piece_bytes;  // of each but the last, which may be shorter
  int32_t num_stages;   // of each pipeline, a piece each
};

// Also the number of blocks. False if there are too many rows, or none.
constexpr bool MakePlan(int64_t num_tokens, int64_t top_k, int64_t row_bytes, int32_t num_sms,
                        Plan* plan, int32_t* num_blocks) {
  if (num_tokens <= 0 || row_bytes <= 0) return false;
  // Few tokens are cut so that every block has some.
  const int64_t fewest = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  const int64_t most = row_bytes < kMinPieceBytes ? 1 : row_bytes / kMinPieceBytes;
  int64_t num_pieces = num_sms / num_tokens;
  if (num_pieces > most) num_pieces = most;
  if (num_pieces < fewest) num_pieces = fewest;
  const Pieces pieces = CutRow(row_bytes, num_pieces);
  plan->num_pieces = pieces.count;
  plan->piece_bytes = pieces.bytes;
  // Adders read as far as the longest piece goes, wherever their stage is.
  const int64_t bytes = kRingBytes - TablesBytes(top_k) - (kMaxPieceBytes - pieces.bytes);
  const int64_t stages = (bytes / pieces.bytes - kNumResults) / 2;
  plan->num_stages = static_cast<int32_t>(stages < kMaxStages ? stages : kMaxStages);
  const int64_t num_units = num_tokens * pieces.count;
  *num_blocks = static_cast<int32_t>(num_units < num_sms ? num_units : num_sms);
  return num_units <= INT32_MAX && (num_units + *num_blocks - 1) / *num_blocks <= kMaxUnitsPerBlock;
}

}  // namespace jax_ep::gpu::combine

#endif  // JAX_EP_CUDA_DIRECT_COMBINE_PLAN_H_
