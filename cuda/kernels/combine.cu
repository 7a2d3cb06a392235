// combine: each rank sums its rows of every peer's token and writes the sum to the token's rank,
//           which adds the sums.
// After:    out[t] = round(sum over ranks r ascending of round(sum over the kept rows of t on r, in
//           k order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
// Roles:    one block an SM, 18 warps. The scout (warp 3) looks up rows and weights, 32 sums at a
//           time, and writes values to where they are collected; the loader (warp 0) decides what
//           to add and fetches it by bulk copies into a ring of stages, job by job; the adders
//           (warps 4..17) add up job after job in registers and write each finished sum to a ring
//           of results; the storer (warp 1) stores results by bulk copies; the messenger (warp 2)
//           talks to the peers. A unit is a piece of a token's row. Block b has the same units on
//           every rank, so it only ever meets the blocks b of the peers.
// Buffers:  name                   | lives on       | written by              | read by
//           y                      | XLA, own       | before the call         | loader
//           weights, values        | XLA, own       | before the call         | scout
//           partial [R, T, H]      | XLA, each rank | storers of rank r,      | own loaders, [P2]
//             (partial[r]: from r) |                | [S2]..[P1]              |
//           collected              | XLA, each rank | peers, [S2]..[P1]; own  | later kernels
//           out                    | XLA, own       | storer                  | later kernels
//           stages, results, tables| shared memory  | see [L] [F] [W] [D] [T] [U]
// Protocol: 1. [S1] show partial and collected, [S2] wait for all.
//           2. Unit by unit, a block sums its own rows of every peer's token into that peer's
//           partial; in turn with that, as soon as all peers have done a unit, it adds up that unit
//           of its own tokens, with what they have sent.
//           3. [P1] when sums are stored, the block tells the peers' blocks how many units are
//           there; [P2] a loader knows the count before it reads them. A block ends when it has told
//           all and knows all.
//           In the block: [T] a table is filled, [U] used up; [L] a job's rows are loaded (its
//           barrier's phase), [F] all adders have read them; [W] a result is written, [D] the copy
//           engine has read it.
// Reuse:    partial is the call's own scratch. Progress is epoch and count, so it only grows.
// Progress: sums for peers wait only for [S2]; an own sum waits for peers' sums of the same unit,
//           which wait for nothing of it. Blocks of a grid do not wait for each other, and begin in
//           order, so fewer SMs than blocks will do.
// Failure:  a timeout fills out and collected with NaN; see group_sync.cuh.
// Limits:   rows are multiples of 16 bytes at 16-byte addresses; K <= 32; at most kMaxUnitsPerBlock
//           units a block; compiled without -ftz, -fmad=false.
#include "cuda/kernels/kernels.cuh"
#include "cuda/kernels/row_types.cuh"
#include "cuda/layout/placement.h"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/group_sync.cuh"

namespace jax_ep::gpu {
namespace {

constexpr int kNumWarps = 18;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kLoader = 0, kStorer = 1, kMessenger = 2, kScout = 3, kFirstAdder = 4;
constexpr int kNumAdderWarps = kNumWarps - kFirstAdder;
constexpr int kNumAdders = kNumAdderWarps * 32;
constexpr int kVectorsEach = 2;  // of 16 bytes: what an adder has of a piece
constexpr int64_t kMaxPieceBytes = kNumAdders * kVectorsEach * 16;
constexpr int64_t kMinPieceBytes = 1024;
#ifndef JAX_EP_DG
#define JAX_EP_DG 4
#endif
#ifndef JAX_EP_NR
#define JAX_EP_NR 4
#endif
constexpr int kNumResults = JAX_EP_NR;
constexpr int kUnwritten = JAX_EP_DG;  // newest stores that peers have not been told of
constexpr int kMaxStages = 32;
constexpr int kNumJobs = 16;                // in flight
constexpr int kMaxJobRows = 4;
constexpr int kPatience = 32;               // looks for a result before a pause is used
constexpr int64_t kRingBytes = 221 * 1024;  // of shared memory, for stages, results and tables

// Rows in consecutive stages (the first follows the last) that the adders add up.
enum : uint32_t {
  kEndsUnit = 1,  // pass the sum on, to `to` if that is given, with `signal`
  kStop = 2,
};
struct Job {
  float weight[kMaxJobRows];  // of each row
  uint64_t to;
  uint32_t flags;
  uint32_t bytes;       // of each row
  uint32_t signal;      // 0, or so many units are done once this is stored: tell the peers
  uint32_t ends;        // bit i: row i is the last one of a rank's sum, which is rounded and added
  int32_t first_stage;
  int32_t num_rows;
};
struct Result {
  uint64_t to;
  uint32_t bytes;
  uint32_t signal;
  bool stop;
};

// Rows and weights of 32 sums for peers, and of 32 of this rank's own units: what the scout finds
// for the loader. Two of each, in turn.
constexpr int kTableSums = 32;
constexpr int kNumTables = 2;
enum Kind { kForPeers, kOwn };
struct Tables {
  int32_t* row[2];    // by kind: [kNumTables][kTableSums][K]; kNoRow: none
  float* weight[2];   // likewise, 1 without weights and for peers' rows
  int32_t* rank;      // of own units' rows, likewise

  static int64_t bytes(int64_t top_k) { return 5 * kNumTables * kTableSums * top_k * 4; }
  __device__ Tables(void* memory, int32_t top_k) {
    const int32_t size = kNumTables * kTableSums * top_k;
    auto* at = static_cast<int32_t*>(memory);
    for (int kind : {kForPeers, kOwn}) {
      row[kind] = at + (2 * kind) * size;
      weight[kind] = reinterpret_cast<float*>(at + (2 * kind + 1) * size);
    }
    rank = at + 4 * size;
  }
};

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  uint64_t filled[2][kNumTables], used[2][kNumTables];  // [T], [U], by kind
  uint64_t full[kNumJobs], empty[kNumJobs];             // [L], [F]
  uint64_t written[kNumResults], drained[kNumResults];  // [W], [D]
  Job job[kNumJobs];
  Result result[kNumResults];
  Mailbox box;
};

// How rows are cut, and the stages of the ring.
struct Cut {
  int32_t num_pieces;
  int32_t piece_bytes;
  int32_t num_stages;
};

__device__ void wait_phase(uint64_t* barrier, uint32_t use) {
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
    return cut.num_pieces == 1 ? 0 : int64_t{(first_unit + step) % cut.num_pieces} * cut.piece_bytes;
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

  // The first tables; needs nothing of the peers.
  __device__ void begin() {
    for (int kind : {kForPeers, kOwn}) {
      if (work_.num_sums(kind) > 0) look_up(kind, 0);
    }
  }
  __device__ void run() {
    int32_t next[2] = {};
    const auto is_left = [&](int kind) { return next[kind] * kTableSums < work_.num_sums(kind); };
    while (is_left(kForPeers) || is_left(kOwn)) {
      for (int kind : {kForPeers, kOwn}) {
        const int32_t n = next[kind], slot = n % kNumTables, use = n / kNumTables;
        if (!is_left(kind)) continue;
        if (use > 0 && !mbarrier_test_wait_parity(&shared_.used[kind][slot], (use - 1) & 1)) {  // [U]
          continue;  // the loader may need the other kind first
        }
        if (n > 0) look_up(kind, n);
        if (a_.values != nullptr) send_values(kind, n);
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(&shared_.filled[kind][slot]);  // [T]
        ++next[kind];
      }
    }
  }

 private:
  __device__ int32_t at(int32_t table, int32_t sum, int32_t k) const {
    return (table % kNumTables * kTableSums + sum) * top_k_ + k;
  }

  __device__ void look_up(int kind, int32_t table) {
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
  }

  // Values of a table's rows, to where they are collected.
  __device__ void send_values(int kind, int32_t table) {
    const int32_t sum = table * kTableSums + lane_;
    if (sum >= work_.num_sums(kind)) return;
    const int32_t step = work_.step_of(kind, sum);
    if (work_.offset_of(step) != 0) return;
    const int64_t t = work_.token_of(step);
    const int32_t src = kind == kOwn ? work_.g.rank : work_.peer_of(sum);
    auto* collected = reinterpret_cast<float*>(shared_.address[src][1]) + t * top_k_;
#pragma unroll 4
    for (int32_t k = 0; k < top_k_; ++k) {
      const int32_t row = tables_.row[kind][at(table, lane_, k)];
      if (kind == kForPeers) {
        if (row == kNoRow) continue;
        collected[a_.recv_src[row] - (src * a_.num_tokens + t) * top_k_] = a_.values[row];
      } else {
        const int32_t rank = tables_.rank[at(table, lane_, k)];
        if (rank == INT32_MAX) {
          collected[k] = 0.0f;
        } else if (rank == work_.g.rank) {
          collected[k] = a_.values[row];
        }
      }
    }
  }

  const Work& work_;
  const CombineArguments& a_;
  Shared& shared_;
  const Tables& tables_;
  const int32_t lane_, top_k_;
};

class Loader {
 public:
  __device__ Loader(const Work& work, Shared& shared, const Tables& tables, char* stages)
      : work_(work),
        g_(work.g),
        a_(work.a),
        cut_(work.cut),
        shared_(shared),
        tables_(tables),
        stages_(stages),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        row_bytes_(a_.num_channels * (a_.type == RowType::kF32 ? 4 : 2)),
        max_rows_(min(kMaxJobRows, cut_.num_stages)),
        free_stages_(cut_.num_stages) {}

  // Ends with a job that stops the others.
  __device__ void run() {
    const int32_t num_for_peers = work_.num_sums(kForPeers);
    int32_t for_peers = 0, own = 0;  // next sums
    int32_t there = g_.num_ranks == 1 ? work_.num_steps : 0;
    bool may_sum = false;  // in turn with the sums of a unit for the peers
    while (for_peers < num_for_peers || own < work_.num_steps) {
      if (for_peers < num_for_peers && !(may_sum && own < there)) {
        sum_for_peer(for_peers++);
        may_sum = for_peers % (g_.num_ranks - 1) == 0;
        if (may_sum) there = units_there(shared_.box);  // [P2]
        continue;
      }
      if (own >= there) there = wait_for_more(shared_.box, own);
      if (there == kBroken) break;
      sum_own(own++);
      may_sum = false;
    }
    emit(0, false, 0, 0, 0.0f, false, kStop, 0, 0, 0);
  }

 private:
  // What the scout has found for a sum: this lane's place in the tables.
  __device__ int32_t enter(int kind, int32_t sum) {
    const int32_t table = sum / kTableSums, slot = table % kNumTables;
    if (sum % kTableSums == 0) wait_phase(&shared_.filled[kind][slot], table / kNumTables);  // [T]
    return (slot * kTableSums + sum % kTableSums) * static_cast<int32_t>(a_.top_k) + lane_;
  }
  __device__ void leave(int kind, int32_t sum) {
    __syncwarp();
    if (sum % kTableSums == kTableSums - 1 && lane_ == 0) {
      mbarrier_arrive(&shared_.used[kind][sum / kTableSums % kNumTables]);  // [U]
    }
  }

  // A new job's slot, and `count` stages for it, as soon as the adders have left them. [F]
  __device__ Job& reserve(int32_t count) {
    while (free_stages_ < count || next_job_ - oldest_job_ == kNumJobs) {
      const uint32_t slot = oldest_job_ % kNumJobs;
      wait_phase(&shared_.empty[slot], oldest_job_ / kNumJobs);
      free_stages_ += shared_.job[slot].num_rows;
      ++oldest_job_;
    }
    free_stages_ -= count;
    return shared_.job[next_job_ % kNumJobs];
  }

  // A sum of `count` rows, by the whole warp: a lane that has one gives its `position` in
  // [0, count), its weight, and whether it ends the sum of a rank.
  __device__ void emit(int32_t count, bool has_row, int32_t position, uint64_t source, float weight,
                       bool ends, uint32_t flags, uint32_t bytes, uint32_t signal, uint64_t to) {
    int32_t first = 0;
    do {
      const int32_t num_rows = min(count - first, max_rows_);
      Job& job = reserve(num_rows);
      const int32_t i = position - first;
      const bool mine = has_row && i >= 0 && i < num_rows;
      const uint32_t all_ends = __reduce_or_sync(0xffffffffu, mine && ends ? 1u << i : 0);
      if (mine) job.weight[i] = weight;
      const bool is_last = first + num_rows == count;
      uint64_t* full = &shared_.full[next_job_ % kNumJobs];
      if (lane_ == 0) {
        job.to = to;
        job.flags = is_last ? flags : 0;
        job.bytes = bytes;
        job.signal = signal;
        job.ends = all_ends;
        job.first_stage = stage_;
        job.num_rows = num_rows;
      }
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(num_rows) * bytes);
      if (mine) {
        int32_t stage = stage_ + i;
        if (stage >= cut_.num_stages) stage -= cut_.num_stages;
        bulk_load(stages_ + stage * cut_.piece_bytes, reinterpret_cast<const void*>(source), bytes,
                  full);  // [L]
      }
      ++next_job_;
      stage_ += num_rows;
      if (stage_ >= cut_.num_stages) stage_ -= cut_.num_stages;
      first += num_rows;
    } while (first < count);
  }

  __device__ uint64_t y_at(int64_t row, int64_t at) const {
    return reinterpret_cast<uint64_t>(a_.y) + row * row_bytes_ + at;
  }
  __device__ uint32_t bytes_at(int64_t at) const {
    return static_cast<uint32_t>(min(int64_t{cut_.piece_bytes}, row_bytes_ - at));
  }

  __device__ void sum_for_peer(int32_t sum) {
    const int32_t at_table = enter(kForPeers, sum);
    const int32_t row = lane_ < a_.top_k ? tables_.row[kForPeers][at_table] : kNoRow;
    const float weight = row != kNoRow ? tables_.weight[kForPeers][at_table] : 0.0f;
    leave(kForPeers, sum);
    const int32_t count = __popc(__ballot_sync(0xffffffffu, row != kNoRow));
    const int32_t src = work_.peer_of(sum), step = work_.step_of(kForPeers, sum);
    const int64_t t = work_.token_of(step), at = work_.offset_of(step);
    // The last sum of a step tells that the step is done.
    const bool is_last = (sum + 1) % (g_.num_ranks - 1) == 0;
    if (count == 0 && !is_last) return;
    const uint64_t to =
        shared_.address[src][0] + (g_.rank * a_.num_tokens + t) * row_bytes_ + at;
    emit(count, row != kNoRow, lane_, y_at(row, at), weight, lane_ == count - 1, kEndsUnit,
         bytes_at(at), is_last ? step + 1 : 0, count == 0 ? 0 : to);
  }

  __device__ void sum_own(int32_t step) {
    const int32_t at_table = enter(kOwn, step);
    int32_t row = kNoRow, rank = INT32_MAX;
    float weight = 1.0f;
    if (lane_ < a_.top_k) {
      row = tables_.row[kOwn][at_table];
      rank = tables_.rank[at_table];
      weight = tables_.weight[kOwn][at_table];
    }
    leave(kOwn, step);
    const int64_t t = work_.token_of(step), at = work_.offset_of(step);
    const uint64_t to = reinterpret_cast<uint64_t>(a_.out) + t * row_bytes_ + at;
    const uint32_t lower = (1u << lane_) - 1;
    // Own rows in k order, and one sum of each peer that has rows, by ascending rank.
    const uint32_t own = __ballot_sync(0xffffffffu, rank == g_.rank);
    const uint32_t same = __match_any_sync(0xffffffffu, rank);
    const bool is_own = rank == g_.rank;
    const bool is_peer = rank != INT32_MAX && !is_own && (same & lower) == 0;
    const uint32_t peers = __ballot_sync(0xffffffffu, is_peer);
    const int32_t num_own = __popc(own);
    const int32_t count = num_own + __popc(peers);
    int32_t position = is_own ? __popc(own & lower) : rank > g_.rank ? num_own : 0;
    for (uint32_t left = peers; left != 0; left &= left - 1) {
      position += __shfl_sync(0xffffffffu, rank, __ffs(static_cast<int>(left)) - 1) < rank ? 1 : 0;
    }
    const bool ends = is_peer || (is_own && (own >> lane_) == 1);
    uint64_t source = y_at(row, at);
    if (is_peer) {
      source = reinterpret_cast<uint64_t>(a_.partial) +
               (rank * a_.num_tokens + t) * row_bytes_ + at;
    }
    emit(count, is_own || is_peer, position, source, weight, ends, kEndsUnit,
         bytes_at(at), 0, to);
  }

  const Work& work_;
  const GroupView& g_;
  const CombineArguments& a_;
  const Cut& cut_;
  Shared& shared_;
  const Tables& tables_;
  char* const stages_;
  const int32_t lane_;
  const int64_t row_bytes_;
  const int32_t max_rows_;
  int32_t stage_ = 0, free_stages_;  // the next one, and how many are free from there on
  uint32_t next_job_ = 0, oldest_job_ = 0;  // in flight: [oldest, next)
};

// Adds up what the loader fetches, in the order in which it does.
template <typename Vector>
__device__ void run_adder(const Cut& cut, Shared& shared, const char* stages, char* results) {
  const int32_t adder = static_cast<int32_t>(threadIdx.x) - kFirstAdder * 32;
  const int32_t lane = adder % 32;
  float sum[kVectorsEach][Vector::kCount] = {}, total[kVectorsEach][Vector::kCount] = {};
  uint32_t num_results = 0;
  for (uint32_t n = 0;; ++n) {
    const Job& job = shared.job[n % kNumJobs];
    wait_phase(&shared.full[n % kNumJobs], n / kNumJobs);  // [L]
    const auto num_vectors = static_cast<int32_t>(job.bytes / 16);
    const int32_t num_rows = job.num_rows;
    const uint32_t ends = job.ends, flags = job.flags, signal = job.signal;
    const uint64_t to = job.to;
    const auto load = [&](int32_t i, uint4(&row)[kVectorsEach]) {
      int32_t stage = job.first_stage + i;
      if (stage >= cut.num_stages) stage -= cut.num_stages;
      const auto* vectors = reinterpret_cast<const uint4*>(stages + stage * cut.piece_bytes);
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        if (adder + j * kNumAdders < num_vectors) row[j] = vectors[adder + j * kNumAdders];
      }
    };
    uint4 row[kVectorsEach] = {};
    if (num_rows > 0) load(0, row);
    for (int32_t i = 0; i < num_rows; ++i) {
      uint4 next[kVectorsEach] = {};
      const float weight = job.weight[i];
      if (i + 1 < num_rows) load(i + 1, next);  // under way while this row is added
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[Vector::kCount];
        Vector::load(row[j], x);
#pragma unroll
        for (int c = 0; c < Vector::kCount; ++c) {
          sum[j][c] = __fadd_rn(sum[j][c], __fmul_rn(weight, x[c]));
        }
        row[j] = next[j];
      }
      if ((ends >> i & 1) == 0) continue;
#pragma unroll
      for (int j = 0; j < kVectorsEach; ++j) {
        float x[Vector::kCount];
        Vector::load(Vector::store(sum[j]), x);  // rounded, as what crosses a link
#pragma unroll
        for (int c = 0; c < Vector::kCount; ++c) {
          total[j][c] = __fadd_rn(total[j][c], x[c]);
          sum[j][c] = 0.0f;
        }
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.empty[n % kNumJobs]);  // [F]
    if ((flags & (kEndsUnit | kStop)) == 0) continue;
    const uint32_t slot = num_results % kNumResults;
    if (num_results >= kNumResults) {
      wait_phase(&shared.drained[slot], num_results / kNumResults - 1);  // [D]
    }
    ++num_results;
    auto* result = reinterpret_cast<uint4*>(results + slot * cut.piece_bytes);
#pragma unroll
    for (int j = 0; j < kVectorsEach; ++j) {
      if (adder + j * kNumAdders < num_vectors) {
        result[adder + j * kNumAdders] = Vector::store(total[j]);
      }
#pragma unroll
      for (int c = 0; c < Vector::kCount; ++c) total[j][c] = 0.0f;
    }
    if (adder == 0) {
      shared.result[slot] = {to, static_cast<uint32_t>(num_vectors * 16), signal,
                             (flags & kStop) != 0};
    }
    fence_proxy_async_shared();  // the copy engine reads what was written
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.written[slot]);  // [W]
    if ((flags & kStop) != 0) return;
  }
}

// By one thread: stores results, and says so.
__device__ void run_storer(const Cut& cut, Shared& shared, const char* results) {
  constexpr int kUnread = kNumResults - 2;  // newest stores whose results may still be read
  uint32_t signal[kUnwritten] = {};         // of the newest stores: units that are done with them
  uint32_t stored = 0, told = 0;
  const auto tell = [&](uint32_t num_units) {
    if (num_units <= told) return;
    told = num_units;
    st_release_cta_shared(&shared.box.done[0], static_cast<int32_t>(num_units));  // then [P1]
  };
  for (uint32_t n = 0;; ++n) {
    const uint32_t slot = n % kNumResults, use = n / kNumResults;
    for (int i = 0; !mbarrier_test_wait_parity(&shared.written[slot], use & 1); ++i) {  // [W]
      if (i < kPatience || stored == told) continue;
      bulk_wait_group<0>();  // nothing to do meanwhile
      tell(stored);
    }
    const Result result = shared.result[slot];
    if (result.to != 0) {
      bulk_store(reinterpret_cast<void*>(result.to), results + slot * cut.piece_bytes,
                 result.bytes);
    }
    bulk_commit_group();
    if (result.signal != 0) stored = result.signal;
    bulk_wait_group_read<kUnread>();
    if (n >= kUnread) mbarrier_arrive(&shared.drained[(n - kUnread) % kNumResults]);  // [D]
    if (signal[0] > told) bulk_wait_group<kUnwritten>();
    tell(signal[0]);
#pragma unroll
    for (int i = 0; i + 1 < kUnwritten; ++i) signal[i] = signal[i + 1];
    signal[kUnwritten - 1] = stored;
    if (!result.stop) continue;
    bulk_wait_group<0>();
    return tell(stored);
  }
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads,
                             1) void combine_kernel(const __grid_constant__ GroupView g,
                                                    const __grid_constant__ CombineArguments a,
                                                    const __grid_constant__ Cut cut) {
  extern __shared__ __align__(128) char ring[];
  __shared__ Shared shared;
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const int32_t first = first_unit(num_units, blockIdx.x);
  const Work work{g, a, cut, first, first_unit(num_units, blockIdx.x + 1) - first};
  char* results = ring + cut.num_stages * cut.piece_bytes;
  const Tables tables(results + kNumResults * cut.piece_bytes, static_cast<int32_t>(a.top_k));
  Scout scout(work, shared, tables);
  if (threadIdx.x == 0) {
    for (int kind : {kForPeers, kOwn}) {
      for (int i = 0; i < kNumTables; ++i) {
        mbarrier_init(&shared.filled[kind][i], 1);
        mbarrier_init(&shared.used[kind][i], 1);
      }
    }
    for (int i = 0; i < kNumJobs; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kNumAdderWarps);
    }
    for (int i = 0; i < kNumResults; ++i) {
      mbarrier_init(&shared.written[i], kNumAdderWarps);
      mbarrier_init(&shared.drained[i], 1);
    }
    fence_mbarrier_init();
    shared.box = {{}, 1, work.num_steps, 0};
  }
  if (warp == kScout) scout.begin();
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected)};
  if (blockIdx.x == 0) send_start(g, OpKind::kCombine, own);  // [S1]
  bool ok = receive_start(g, OpKind::kCombine, own, shared.address);  // [S2]
  if (ok) {
    if (warp == kLoader) {
      Loader loader(work, shared, tables, ring);
      loader.run();
    } else if (warp == kScout) {
      scout.run();
    } else if (warp == kStorer) {
      if (threadIdx.x == 32 * kStorer) run_storer(cut, shared, results);
    } else if (warp == kMessenger) {
      ok = run_messenger(g, OpKind::kCombine, shared.box);
    } else {
      run_adder<Vector>(cut, shared, ring, results);
    }
  }
  const Finish finish = finish_block(g, ok);
  if (finish == Finish::kNotLast) return;
  if (finish == Finish::kFail) {
    fill(a.out, a.num_tokens * a.num_channels * (16 / Vector::kCount), kNan);
    if (a.values != nullptr) fill(a.collected, a.num_tokens * a.top_k * 4, kNan);
  }
  end_call(g);
}

template <typename Vector>
cudaError_t Launch(const GroupView& group, const CombineArguments& a, int num_sms,
                   cudaStream_t stream) {
  const int64_t row_bytes = a.num_channels * (16 / Vector::kCount);
  // Few tokens are cut so that every block has some; equal pieces, multiples of 16 bytes.
  const int64_t fewest = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  const int64_t most = row_bytes < kMinPieceBytes ? 1 : row_bytes / kMinPieceBytes;
  int64_t num_pieces = num_sms / a.num_tokens;
  if (num_pieces > most) num_pieces = most;
  if (num_pieces < fewest) num_pieces = fewest;
  Cut cut;
  cut.piece_bytes =
      static_cast<int32_t>(((row_bytes + num_pieces - 1) / num_pieces + 15) / 16 * 16);
  cut.num_pieces = static_cast<int32_t>((row_bytes + cut.piece_bytes - 1) / cut.piece_bytes);
  const int64_t tables = Tables::bytes(a.top_k);
  const int64_t stages = (kRingBytes - tables) / cut.piece_bytes - kNumResults;
  cut.num_stages = static_cast<int32_t>(stages < kMaxStages ? stages : kMaxStages);
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const auto num_blocks = static_cast<int>(num_units < num_sms ? num_units : num_sms);
  if ((num_units + num_blocks - 1) / num_blocks + 1 > kMaxUnitsPerBlock) {
    return cudaErrorInvalidValue;
  }
  combine_kernel<Vector>
      <<<num_blocks, kNumThreads, (cut.num_stages + kNumResults) * cut.piece_bytes + tables,
         stream>>>(group, a, cut);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCombine(const GroupView& group, const CombineArguments& a, int num_sms,
                          cudaStream_t stream) {
  switch (a.type) {
    case RowType::kF32:
      return Launch<F32Vector>(group, a, num_sms, stream);
    case RowType::kF16:
      return Launch<F16Vector>(group, a, num_sms, stream);
    case RowType::kBF16:
      return Launch<Bf16Vector>(group, a, num_sms, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t PrepareCombine() {
  if (cudaError_t e = PrepareKernel(combine_kernel<F32Vector>, kRingBytes); e != cudaSuccess) {
    return e;
  }
  if (cudaError_t e = PrepareKernel(combine_kernel<F16Vector>, kRingBytes); e != cudaSuccess) {
    return e;
  }
  return PrepareKernel(combine_kernel<Bf16Vector>, kRingBytes);
}

cudaError_t PrepareKernels() {
  if (cudaError_t e = PrepareLayout(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareDispatch(); e != cudaSuccess) return e;
  return PrepareCombine();
}

}  // namespace jax_ep::gpu
