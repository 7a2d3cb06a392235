// What the warps of combine share, and its scout. combine.cu states the protocol.
#ifndef JAX_EP_CUDA_KERNELS_COMBINE_SCOUT_CUH_
#define JAX_EP_CUDA_KERNELS_COMBINE_SCOUT_CUH_

#include "cuda/kernels/kernels.cuh"
#include "cuda/layout/placement.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu::combine {

enum Kind { kForPeers, kOwn };  // of a sum, and of the pipeline that makes it first

constexpr int kAdderWarps = 7;  // of a pipeline
constexpr int kNumAdders = kAdderWarps * 32;
// Roles of the warps after both pipelines' adders; loaders by kind.
constexpr int kLoader = 2 * kAdderWarps, kStorer = kLoader + 2, kMessenger = kStorer + 1,
              kScout = kMessenger + 1;
constexpr int kNumThreads = (kScout + 1) * 32;
constexpr int kVectorsEach = 4;  // of 16 bytes: what an adder has of a piece
constexpr int64_t kMaxPieceBytes = kNumAdders * kVectorsEach * 16;
constexpr int64_t kMinPieceBytes = 1024;
constexpr int kNumResults = 2;
constexpr int kUnread = 1;      // newest results that may still be read
constexpr int kMaxStages = 24;  // of a pipeline
constexpr int kNumJobs = 16;    // of a pipeline, in flight
constexpr int kMaxJobRows = 2;
constexpr int kPatience = 32;               // looks for a result before a pause is used
constexpr int64_t kRingBytes = 220 * 1024;  // of shared memory, for stages, results and tables

// How rows are cut, and the stages of each pipeline.
struct Cut {
  int32_t num_pieces;
  int32_t piece_bytes;
  int32_t num_stages;  // of each pipeline
};

// Rows in consecutive stages (the first follows the last) that the adders add up.
enum : uint32_t {
  kEndsUnit = 1,  // pass the sum on, to `to`
  kStop = 2,
  kAddsOwn = 4,  // before that, add the sum of this rank's rows
};
struct Job {
  float weight[kMaxJobRows];  // of each row
  uint64_t to;
  uint32_t flags;
  uint32_t bytes;    // of each row
  int32_t num_done;  // of units, once this is stored: for the peers
  // Bit i, of own units: row i is the last one of this rank's, whose sum is then rounded; it is a
  // peer's sum; this rank's comes before it.
  uint32_t ends, is_sum, follows_own;
  int32_t first_stage;
  int32_t num_rows;
};
struct Result {
  uint64_t to;  // 0: nowhere
  uint32_t bytes;
  int32_t num_done;
  bool stop;
};

// Rows and weights of 32 sums for peers, and of 32 of this rank's own units: what the scout finds
// for the loader. Two of each, in turn.
constexpr int kTableSums = 32;
constexpr int kNumTables = 2;
struct Tables {
  int32_t* row[2];   // by kind: [kNumTables][kTableSums][K]; kNoRow: none
  float* weight[2];  // likewise, 1 without weights and for peers' rows
  int32_t* rank;     // of own units' rows, likewise

  __host__ __device__ static constexpr int64_t bytes(int64_t top_k) {
    return 5 * kNumTables * kTableSums * top_k * 4;
  }
  __device__ Tables(void* memory, int32_t top_k) {
    const int32_t size = kNumTables * kTableSums * top_k;
    auto* at = static_cast<int32_t*>(memory);
    for (const int kind : {kForPeers, kOwn}) {
      row[kind] = at + (2 * kind) * size;
      weight[kind] = reinterpret_cast<float*>(at + (2 * kind + 1) * size);
    }
    rank = at + 4 * size;
  }
};

struct Pipeline {
  uint64_t full[kNumJobs], empty[kNumJobs];  // [L], [F]
  Job job[kNumJobs];
};

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  uint64_t filled[2][kNumTables], used[2][kNumTables];  // [T], [U], by kind
  Pipeline pipeline[2];                                 // by kind
  uint64_t written[kNumResults], drained[kNumResults];  // [W], [D]
  Result result[kNumResults];
  int32_t next_own;  // own unit that no loader has taken
  Mailbox box;
};

__device__ inline void wait_phase(uint64_t* barrier, uint32_t use) {
  mbarrier_wait_parity(barrier, use & 1);
}

// The units of a block, and the sums that they need.
struct Work {
  const GroupView& g;
  const CombineArguments& a;
  const Cut& cut;
  const int32_t first_unit, num_steps;  // of the block: a step is a unit

  __device__ int32_t num_sums(int kind) const {
    return kind == kOwn ? num_steps : num_steps * (g.num_ranks - 1);
  }
  // Of a sum of that kind. For peers, step by step, each beginning with another peer.
  __device__ int32_t step_of(int kind, int32_t sum) const {
    return kind == kOwn || g.num_ranks == 2 ? sum : sum / (g.num_ranks - 1);
  }
  __device__ int32_t peer_of(int32_t sum) const {
    const int32_t r = g.rank + 1 + (g.num_ranks == 2 ? 0 : sum % (g.num_ranks - 1));
    return r < g.num_ranks ? r : r - g.num_ranks;
  }
  __device__ int64_t token_of(int32_t step) const {
    const int32_t unit = first_unit + step;
    return cut.num_pieces == 1 ? unit : unit / cut.num_pieces;
  }
  // Where a step's piece begins in the row.
  __device__ int64_t offset_of(int32_t step) const {
    return cut.num_pieces == 1 ? 0
                               : int64_t{(first_unit + step) % cut.num_pieces} * cut.piece_bytes;
  }
};

// Fills the tables. Each lane looks after a sum, so that lookups, which depend on one another and
// take long while memory is busy, are made for 32 sums at a time.
class Scout {
  static constexpr int kAtOnce = 8;  // lookups of a lane in flight

 public:
  __device__ Scout(const Work& work, Shared& shared, const Tables& tables)
      : work_(work),
        a_(work.a),
        shared_(shared),
        tables_(tables),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(work.a.top_k)) {}

  // Fills the first tables; needs nothing of the peers.
  __device__ void begin() {
    for (const int kind : {kForPeers, kOwn}) {
      if (work_.num_sums(kind) > 0) fill_table(kind, 0);
    }
  }
  // Fills the others, and sends the values meanwhile.
  __device__ void run() {
    int32_t next[2] = {1, 1};
    const auto is_left = [&](int kind) { return next[kind] * kTableSums < work_.num_sums(kind); };
    if (a_.values != nullptr) send_values();
    while (is_left(kForPeers) || is_left(kOwn)) {
      for (const int kind : {kForPeers, kOwn}) {
        const int32_t slot = next[kind] % kNumTables, use = next[kind] / kNumTables;
        if (!is_left(kind)) continue;
        const bool is_free =
            use == 0 || mbarrier_test_wait_parity(&shared_.used[kind][slot], (use - 1) & 1);  // [U]
        if (__all_sync(0xffffffffu, is_free) == 0) continue;  // the other loader may be waiting
        fill_table(kind, next[kind]++);
      }
    }
  }

 private:
  __device__ int32_t at(int32_t table, int32_t sum, int32_t k) const {
    return (table % kNumTables * kTableSums + sum) * top_k_ + k;
  }

  __device__ void fill_table(int kind, int32_t table) {
    const int32_t sum = table * kTableSums + lane_;
    const bool is_any = sum < work_.num_sums(kind);
    const int64_t t = is_any ? work_.token_of(work_.step_of(kind, sum)) : 0;
    int32_t first = 0, count = 0;
    if (is_any && kind == kForPeers) {
      const int64_t flat_token = work_.peer_of(sum) * a_.num_tokens + t;
      first = a_.recv_offsets[flat_token];
      count = a_.recv_offsets[flat_token + 1] - first;
    }
    for (int32_t begin = 0; begin < top_k_; begin += kAtOnce) {
      // First all loads of a kind, then what depends on them.
      int32_t row[kAtOnce], rank[kAtOnce];
      float weight[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t k = begin + i;
        row[i] = kNoRow;
        rank[i] = 0;
        if (kind == kForPeers) {
          if (k < count) row[i] = a_.recv_order[first + k];
        } else if (is_any && k < top_k_) {
          row[i] = a_.send_row[t * top_k_ + k];
          rank[i] = a_.topk_idx[t * top_k_ + k];
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (kind == kOwn) rank[i] /= static_cast<int32_t>(a_.num_local_experts);
        if (row[i] == kNoRow) rank[i] = INT32_MAX;
        weight[i] = 1.0f;
        if (a_.weights == nullptr || row[i] == kNoRow) continue;
        if (kind == kForPeers || rank[i] == work_.g.rank) weight[i] = a_.weights[row[i]];
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int32_t k = begin + i;
        if (k >= top_k_) break;
        tables_.row[kind][at(table, lane_, k)] = row[i];
        tables_.weight[kind][at(table, lane_, k)] = weight[i];
        if (kind == kOwn) tables_.rank[at(table, lane_, k)] = rank[i];
      }
    }
    __syncwarp();
    if (lane_ == 0) mbarrier_arrive(&shared_.filled[kind][table % kNumTables]);  // [T]
  }

  // Sends the values of all rows that belong to the block's units, at those that begin a token.
  __device__ void send_values() {
    const int64_t pieces = work_.cut.num_pieces;
    const int64_t begin = (work_.first_unit + pieces - 1) / pieces;  // tokens
    const int64_t end = (work_.first_unit + work_.num_steps + pieces - 1) / pieces;
    for (int r = 0; r < work_.g.num_ranks && begin < end; ++r) {
      if (r == work_.g.rank) continue;
      auto* collected = reinterpret_cast<float*>(shared_.address[r][1]);
      const int64_t last = a_.recv_offsets[r * a_.num_tokens + end];
#pragma unroll 4
      for (int64_t i = a_.recv_offsets[r * a_.num_tokens + begin] + lane_; i < last; i += 32) {
        const int32_t row = a_.recv_order[i];
        collected[a_.recv_src[row] - r * a_.num_tokens * a_.top_k] = a_.values[row];
      }
    }
    const auto num_local = static_cast<int32_t>(a_.num_local_experts);
    for (int64_t i = begin * a_.top_k + lane_; i < end * a_.top_k; i += 32) {
      const int32_t row = a_.send_row[i];
      if (row == kNoRow) {
        a_.collected[i] = 0.0f;
      } else if (a_.topk_idx[i] / num_local == work_.g.rank) {
        a_.collected[i] = a_.values[row];
      }
    }
    tell_values(shared_.box);
  }

  const Work& work_;
  const CombineArguments& a_;
  Shared& shared_;
  const Tables& tables_;
  const int32_t lane_, top_k_;
};

}  // namespace jax_ep::gpu::combine

#endif  // JAX_EP_CUDA_KERNELS_COMBINE_SCOUT_CUH_
