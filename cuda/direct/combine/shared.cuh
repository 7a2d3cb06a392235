// What the warps of a block of combine share. combine.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_COMBINE_SHARED_CUH_
#define JAX_EP_CUDA_DIRECT_COMBINE_SHARED_CUH_

#include "cuda/direct/combine/plan.h"
#include "cuda/launch.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/progress.cuh"

namespace jax_ep::gpu::combine {

// A sum of this rank's rows for a peer, or all of a unit of this rank's own tokens.
enum SumKind { kForPeers, kOwn };
// Loader and adders that work on one sum after the other: one pipeline begins with the sums for peers
// and then takes own ones, too; the other has own ones only.
enum PipelineIndex { kPeersFirst, kOwnOnly };

// Roles of the warps after both pipelines' adders.
constexpr int kLoaders = 2 * kAdderWarps, kStorer = kLoaders + 2, kMessenger = kStorer + 1,
              kScout = kMessenger + 1;
constexpr int kNumThreads = (kScout + 1) * 32;
constexpr int kNumJobs = 16;  // of a pipeline, in flight
constexpr int kMaxJobRows = 2;
static_assert(kNumJobs <= 16 && kMaxJobRows < 4);  // the loader keeps two bits a job

// What the scout finds for the loaders and adders, by kind of sum: tables of 32 sums, in turn.
// A sum's rows in the order in which they are added: this rank's in k order, then, of own units, the
// peers' sums by rank.
struct alignas(16) SumHead {
  uint64_t offset;     // of the sum, in partial or in out
  uint32_t bytes;      // of each row
  int32_t units_done;  // for the peers, once this sum is stored
};
struct alignas(16) SumRows {
  int32_t count;
  int32_t num_own;     // of this rank, which come first; the others are peers' sums
  int32_t own_before;  // of own units: this rank's sum is added before this row, `count`: after all
};
static_assert(sizeof(SumHead) + sizeof(SumRows) == kHeadBytes);
struct SumTables {
  SumHead* head[2];     // by kind: [kNumTables][kTableSums]
  SumRows* rows[2];     // likewise
  uint64_t* source[2];  // by kind: [kNumTables][kTableSums][K], where the row begins
  float* weight[2];     // likewise, 1 without weights
  int32_t* peer;        // for whom a sum is: [kNumTables][kTableSums]; the first table is filled
                        // before [S2], so that it cannot hold that rank's address

  __device__ SumTables(char* memory, int32_t top_k) {
    auto* heads = reinterpret_cast<SumHead*>(memory);
    auto* all_rows = reinterpret_cast<SumRows*>(heads + 2 * kSumsInTables);
    auto* sources = reinterpret_cast<uint64_t*>(all_rows + 2 * kSumsInTables);
    auto* weights = reinterpret_cast<float*>(sources + 2 * kSumsInTables * top_k);
    for (const int kind : {kForPeers, kOwn}) {
      head[kind] = heads + kind * kSumsInTables;
      rows[kind] = all_rows + kind * kSumsInTables;
      source[kind] = sources + kind * kSumsInTables * top_k;
      weight[kind] = weights + kind * kSumsInTables * top_k;
    }
    peer = reinterpret_cast<int32_t*>(weights + 2 * kSumsInTables * top_k);
  }
  // Where a sum stands in them.
  __device__ static int32_t entry(int32_t sum) { return sum % kSumsInTables; }
};

// Rows of a sum that the adders add up, in consecutive stages (the first follows the last): some of
// this rank's, then some that are peers' sums.
struct alignas(16) Job {
  int32_t sum;  // kStop: there are no more jobs
  int32_t first_stage;
  int32_t num_own, num_sums;
  int32_t first_weight;  // of the tables
  uint32_t flags;
};
constexpr int32_t kStop = -1;
enum JobFlag : uint32_t {
  kEndsSum = 1,     // no more rows of the sum come
  kEndsOwn = 2,     // of own units: no more of this rank's, whose sum is then rounded
  kAddsOwn = 4,     // which is added after all others
  kIsPair = 8,      // one or two rounded sums are to be added, which takes no f32
  kIsSecond = 16,   // of those the first peer's sum here is the second one
  kIsSingle = 32,   // there is but one
  kFollowsOwn = 64  // shifted by i: this rank's sum is added before the i-th peer's sum here
};
static_assert(kMaxJobRows <= 8);

struct Result {
  uint64_t to;
  uint32_t bytes;  // 0: nothing more comes
  int32_t units_done;
};

struct Pipeline {
  uint64_t full[kNumJobs], empty[kNumJobs];  // [L], [F]
  Job job[kNumJobs];
};

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  uint64_t filled[2][kNumTables], used[2][kNumTables];  // [T], [U], by kind
  Pipeline pipeline[2];
  uint64_t written[kNumResults], drained[kNumResults];  // [W], [D]
  Result result[kNumResults];
  int32_t next_own;  // own unit that no loader has taken
  Mailbox box;
};

__device__ inline void wait_phase(uint64_t* barrier, uint32_t use) {
  mbarrier_wait_parity(barrier, use & 1);
}

// The units of a block, and the sums that they need. Units are numbered within the block.
struct Work {
  const GroupView& g;
  const CombineArguments& a;
  const Plan& plan;
  const int64_t row_bytes;
  const int32_t first_unit, num_units;  // of the block

  __device__ int32_t num_sums(int kind) const {
    return kind == kOwn ? num_units : num_units * (g.num_ranks - 1);
  }
  // The i-th peer after this rank: sums for peers go unit by unit, and in this order.
  __device__ int32_t peer(int32_t i) const {
    const int32_t r = g.rank + i;
    return r < g.num_ranks ? r : r - g.num_ranks;
  }
  __device__ int64_t token_of(int32_t unit) const {
    const int32_t in_grid = first_unit + unit;
    return plan.num_pieces == 1 ? in_grid : in_grid / plan.num_pieces;
  }
  // Where a unit's piece begins in the row.
  __device__ int64_t offset_of(int32_t unit) const {
    return plan.num_pieces == 1 ? 0
                                : int64_t{(first_unit + unit) % plan.num_pieces} * plan.piece_bytes;
  }
};

}  // namespace jax_ep::gpu::combine

#endif  // JAX_EP_CUDA_DIRECT_COMBINE_SHARED_CUH_
