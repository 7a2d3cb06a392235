// combine: each rank sums its rows of every peer's token and writes the sum to the token's rank,
//           which adds the sums.
// After:    out[t] = round(sum over ranks r ascending of round(sum over the kept rows of t on r, in
//           k order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
// Roles:    one block an SM: adders, and three warps more. A unit is a piece of a token's row; adder
//           m of n has the units m, m + n, .. of its block. Adders work on their own: each fetches
//           what it adds by bulk copies into a ring of slots, job by job, adds in registers, and has
//           its sums stored by bulk copies. They access no other global memory, because the copy
//           engine's fences would wait for that. The scout looks up rows and weights, 32 sums at a
//           time; the messenger talks to the peers; the collector sends values to where they are
//           collected. Block b has the same units on every rank, so it only ever meets the blocks b
//           of the peers.
// Buffers:  name                   | lives on       | written by             | read by
//           y                      | XLA, own       | before the call        | own adders
//           weights                | XLA, own       | before the call        | own scouts
//           values                 | XLA, own       | before the call        | own collectors
//           partial [R, T, H]      | XLA, each rank | adders of rank r,      | own adders, [P2]
//             (partial[r]: from r) |                | [S2]..[P1]             |
//           collected              | XLA, each rank | collectors, [S2]..[V]  | later kernels
//           out                    | XLA, own       | own adders             | later kernels
//           slots, results, tables | shared memory  | see [L] [F] [D] [T] [U]|
// Protocol: 1. [S1] show partial and collected, [S2] wait for all.
//           2. Unit by unit, an adder sums its rank's rows of every peer's token into that peer's
//           partial; in turn with that, as soon as all peers have done a unit, it adds up that unit
//           of its own tokens, with what they have sent.
//           3. [P1] when sums are stored, the block tells the peers' blocks how many units are
//           there; [P2] an adder knows the count before it fetches them. [V] are the values. A block
//           ends when it has told all and knows all.
//           In a block: [T] a table is filled, [U] no adder needs it any more. In an adder: [L] a
//           job's rows are loaded (its barrier's phase), [F] the warp has read them, so their slots
//           are free; [D] the copy engine has read a result.
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

#ifndef JAX_EP_DT
#define JAX_EP_DT 2
#endif
#ifndef JAX_EP_CA
#define JAX_EP_CA 10
#endif
#ifndef JAX_EP_CV
#define JAX_EP_CV 4
#endif
constexpr int kNumAdders = JAX_EP_CA;
constexpr int kMessenger = kNumAdders, kCollector = kNumAdders + 1, kScout = kNumAdders + 2;
constexpr int kNumThreads = (kNumAdders + 3) * 32;
constexpr int kVectorsEach = JAX_EP_CV;  // of 16 bytes: what a lane has of a piece
constexpr int64_t kMaxPieceBytes = int64_t{32} * kVectorsEach * 16;
constexpr int kNumResults = 3;  // of an adder
constexpr int kNumJobs = 8;     // of an adder, in flight
constexpr int kMaxJobRows = 4;
constexpr int kMaxSlots = 32;  // of an adder
constexpr int64_t kSharedBytes = 212 * 1024;
static_assert(kNumAdders <= kMaxMovers);

// How rows are cut, and the slots of an adder.
struct Cut {
  int32_t num_pieces;
  int32_t piece_bytes;  // of all but the last
  int32_t num_slots;
};

// Rows in consecutive slots (the first follows the last) that are added up.
struct Job {
  float weight[kMaxJobRows];
  uint64_t to;         // of the sum, if this is its last job; else 0
  int32_t first_slot;
  int32_t num_rows;
  int32_t num_vectors;  // of each row
  uint32_t ends;        // bit i: row i is the last one of a rank's sum, which is rounded and added
  int32_t done;         // once the sum is stored, so many of the adder's units are done for the peers
  bool is_last;         // of its sum
};

// Rows and weights of 32 sums for peers, and of 32 of this rank's own tokens: what the scout finds
// for the adders. Two of each, in turn.
constexpr int kTableSums = 32;
constexpr int kNumTables = 2;
enum Kind { kForPeers, kOwn };
struct Tables {
  int32_t* row[2];   // by kind: [kNumTables][kTableSums][K]; kNoRow: none
  float* weight[2];  // likewise, 1 without weights and for peers' rows
  int32_t* rank;     // of own tokens' rows, likewise

  __host__ __device__ static constexpr int64_t bytes(int64_t top_k) { return 5 * kNumTables * kTableSums * top_k * 4; }
  __device__ Tables(void* memory, int32_t top_k) {
    const int32_t size = kNumTables * kTableSums * top_k;
    auto* at = static_cast<int32_t*>(memory);
    for (int kind = 0; kind < 2; ++kind) {
      row[kind] = at + 2 * kind * size;
      weight[kind] = reinterpret_cast<float*>(at + (2 * kind + 1) * size);
    }
    rank = at + 4 * size;
  }
};

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
  uint64_t filled[2][kNumTables], used[2][kNumTables];  // [T], [U], by kind
  uint64_t full[kNumAdders][kNumJobs];  // [L]
  Job job[kNumAdders][kNumJobs];
  Mailbox box;
};

// The tokens of a block, and their sums: for peers, token by token, each beginning with another
// peer; and own ones.
struct Work {
  const GroupView& g;
  const CombineArguments& a;
  int32_t first_token, num_tokens;

  __device__ int32_t num_sums(int kind) const {
    return kind == kOwn ? num_tokens : num_tokens * (g.num_ranks - 1);
  }
  __device__ int32_t token_of(int kind, int32_t sum) const {
    return first_token + (kind == kOwn || g.num_ranks == 2 ? sum : sum / (g.num_ranks - 1));
  }
  __device__ int32_t peer_of(int32_t sum) const {
    const int32_t r = g.rank + 1 + (g.num_ranks == 2 ? 0 : sum % (g.num_ranks - 1));
    return r < g.num_ranks ? r : r - g.num_ranks;
  }
};

// Fills the tables. Each lane looks after a sum, because lookups depend on one another and take long
// while memory is busy.
class Scout {
  static constexpr int kAtOnce = 8;  // lookups of a lane under way

 public:
  __device__ Scout(const Work& work, Shared& shared, const Tables& tables)
      : work_(work),
        a_(work.a),
        shared_(shared),
        tables_(tables),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(work.a.top_k)) {}

  __device__ void run() {
    int32_t next[2] = {};
    const auto is_left = [&](int kind) { return next[kind] * kTableSums < work_.num_sums(kind); };
    while (is_left(kForPeers) || is_left(kOwn)) {
      for (const Kind kind : {kForPeers, kOwn}) {
        const int32_t slot = next[kind] % kNumTables, use = next[kind] / kNumTables;
        if (!is_left(kind)) continue;
        if (use > 0 && !mbarrier_test_wait_parity(&shared_.used[kind][slot], (use - 1) & 1)) {  // [U]
          continue;  // the other kind may be wanted first
        }
        fill_table(kind, next[kind]++);
        __syncwarp();
        if (lane_ == 0) mbarrier_arrive(&shared_.filled[kind][slot]);  // [T]
      }
    }
  }

 private:
  __device__ void fill_table(Kind kind, int32_t table) {
    const int32_t sum = table * kTableSums + lane_;
    const bool is_any = sum < work_.num_sums(kind);
    const int64_t t = is_any ? work_.token_of(kind, sum) : 0;
    const int32_t at = (table % kNumTables * kTableSums + lane_) * top_k_;
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
        tables_.row[kind][at + k] = row[i];
        tables_.weight[kind][at + k] = weight[i];
        if (kind == kOwn) tables_.rank[at + k] = rank[i];
      }
    }
  }

  const Work& work_;
  const CombineArguments& a_;
  Shared& shared_;
  const Tables& tables_;
  const int32_t lane_, top_k_;
};

template <typename Vector>
class Adder {
 public:
  __device__ Adder(const Work& work, const Cut& cut, Shared& shared, const Tables& tables,
                   int32_t first_unit, char* memory)
      : work_(work),
        g_(work.g),
        a_(work.a),
        cut_(cut),
        shared_(shared),
        tables_(tables),
        index_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        row_bytes_(a_.num_channels * (16 / Vector::kCount)),
        first_unit_(first_unit),
        num_steps_(num_steps(shared.box.num_units, index_, kNumAdders)),
        num_for_peers_(num_steps_ * (g_.num_ranks - 1)),
        slots_(memory),
        results_(memory + cut.num_slots * cut.piece_bytes),
        free_slots_(cut.num_slots),
        // Enough are under way to hide how long a store takes; no more, so that peers hear soon.
        num_untold_(num_steps_ >= 64 ? 8 : num_steps_ >= 32 ? 4 : JAX_EP_DT),
        there_(g_.num_ranks == 1 ? shared.box.num_units : 0) {}

  // False if the group is broken.
  __device__ bool run() {
    while (true) {
      while (has_room() && begin_job()) {
      }
      if (oldest_job_ != next_job_) {
        do_job();
        continue;
      }
      bulk_wait_group<0>();  // nothing to do meanwhile
      tell(done_);
      if (own_ == num_steps_) break;
      there_ = wait_for_more(shared_.box, own_unit());  // [P2]
      if (there_ == kBroken) return false;
    }
    leave_tables(kOwn, INT32_MAX);
    return true;
  }

 private:
  __device__ int32_t unit_of(int32_t step) const {
    return first_unit_ + index_ + step * kNumAdders;
  }
  // Of the tokens of the group, and of the block.
  __device__ int32_t token_of(int32_t step) const { return unit_of(step) / cut_.num_pieces; }
  __device__ int32_t token_here(int32_t step) const { return token_of(step) - work_.first_token; }
  // Where a step's piece begins in the row.
  __device__ int64_t offset_of(int32_t step) const {
    return int64_t{unit_of(step) % cut_.num_pieces} * cut_.piece_bytes;
  }
  // The next own sum's unit, by its place in the block.
  __device__ int32_t own_unit() const { return index_ + own_ * kNumAdders; }
  __device__ uint64_t y_at(int64_t row, int64_t at) const {
    return reinterpret_cast<uint64_t>(a_.y) + row * row_bytes_ + at;
  }

  __device__ bool has_room() const {
    return next_job_ - oldest_job_ < kNumJobs && free_slots_ >= min(kMaxJobRows, cut_.num_slots);
  }

  // Begins the next job: more rows of the sum that is being fetched, or the first ones of another.
  // False if there is none, or not yet.
  __device__ bool begin_job() {
    if (fetched_ == count_ && !next_sum()) return false;
    const int32_t num_rows = min(count_ - fetched_, kMaxJobRows);
    const int32_t i = position_ - fetched_;
    const bool mine = i >= 0 && i < num_rows;  // lanes without a row are at -1
    const uint32_t ends = __reduce_or_sync(0xffffffffu, mine && ends_ ? 1u << i : 0);
    uint64_t* full = &shared_.full[index_][next_job_ % kNumJobs];
    Job& job = shared_.job[index_][next_job_ % kNumJobs];
    if (mine) job.weight[i] = weight_;
    fetched_ += num_rows;
    if (lane_ == 0) {
      job.is_last = fetched_ == count_;
      job.to = job.is_last ? to_ : 0;
      job.first_slot = slot_;
      job.num_rows = num_rows;
      job.num_vectors = num_vectors_;
      job.ends = ends;
      job.done = job.is_last ? sum_done_ : 0;
      mbarrier_arrive_expect_tx(full, static_cast<uint32_t>(num_rows * num_vectors_ * 16));
    }
    __syncwarp();
    if (mine) {
      int32_t slot = slot_ + i;
      if (slot >= cut_.num_slots) slot -= cut_.num_slots;
      bulk_load(slots_ + slot * cut_.piece_bytes, reinterpret_cast<const void*>(source_),
                static_cast<uint32_t>(num_vectors_ * 16), full);  // [L]
    }
    slot_ += num_rows;
    if (slot_ >= cut_.num_slots) slot_ -= cut_.num_slots;
    free_slots_ -= num_rows;
    ++next_job_;
    return true;
  }

  // Turns to the next sum: one for a peer or an own one, in turn. False if there is none, or if the
  // peers have not done their part of it.
  __device__ bool next_sum() {
    bool may_add = own_ < num_steps_;
    if (may_add && own_unit() >= there_) {
      there_ = units_there(shared_.box);  // [P2]
      may_add = there_ != kBroken && own_unit() < there_;
    }
    if (for_peers_ < num_for_peers_ && !(may_add && own_in_turn_)) {
      begin_for_peer(for_peers_++);
      return true;
    }
    if (!may_add) return false;
    begin_own(own_++);
    own_in_turn_ = false;
    return true;
  }

  // This lane's place in the tables for a sum.
  __device__ int32_t enter_table(Kind kind, int32_t sum) {
    const int32_t table = sum / kTableSums;
    leave_tables(kind, table);
    if (!is_filled_[kind]) {
      wait_table(kind);
      is_filled_[kind] = true;
    }
    return (table % kNumTables * kTableSums + sum % kTableSums) * static_cast<int32_t>(a_.top_k) +
           lane_;
  }
  // Leaves the tables before `table`, one after the other, as every adder does with each.
  __device__ void leave_tables(Kind kind, int32_t table) {
    const int32_t num_tables = (work_.num_sums(kind) + kTableSums - 1) / kTableSums;
    for (; table_[kind] < min(table, num_tables); ++table_[kind]) {
      if (!is_filled_[kind]) wait_table(kind);
      is_filled_[kind] = false;
      __syncwarp();
      if (lane_ == 0) mbarrier_arrive(&shared_.used[kind][table_[kind] % kNumTables]);  // [U]
    }
  }
  __device__ void wait_table(Kind kind) {
    mbarrier_wait_parity(&shared_.filled[kind][table_[kind] % kNumTables],
                         table_[kind] / kNumTables & 1);  // [T]
    __syncwarp();
  }

  __device__ void begin_for_peer(int32_t number) {
    const int32_t num_peers = g_.num_ranks - 1;
    const int32_t step = num_peers == 1 ? number : number / num_peers;
    const int32_t sum = token_here(step) * num_peers + (num_peers == 1 ? 0 : number % num_peers);
    const int32_t src = work_.peer_of(sum);
    const int64_t t = token_of(step), at = offset_of(step);
    const int32_t entry = enter_table(kForPeers, sum);
    const int32_t row = lane_ < a_.top_k ? tables_.row[kForPeers][entry] : kNoRow;
    weight_ = row != kNoRow ? tables_.weight[kForPeers][entry] : 0.0f;
    begin_sum(__popc(__ballot_sync(0xffffffffu, row != kNoRow)), at);
    position_ = row != kNoRow ? lane_ : -1;
    source_ = y_at(row, at);
    ends_ = lane_ == count_ - 1;
    if (count_ > 0) to_ = shared_.address[src][0] + (g_.rank * a_.num_tokens + t) * row_bytes_ + at;
    own_in_turn_ = (number + 1) % num_peers == 0;  // the last peer's: the unit is done
    sum_done_ = own_in_turn_ ? step + 1 : 0;
    if (number + 1 == num_for_peers_) leave_tables(kForPeers, INT32_MAX);
  }
  __device__ void begin_own(int32_t step) {
    const int64_t t = token_of(step), at = offset_of(step);
    const int32_t entry = enter_table(kOwn, token_here(step));
    int32_t row = kNoRow, rank_of_lane = INT32_MAX;
    float weight = 1.0f;
    if (lane_ < a_.top_k) {
      row = tables_.row[kOwn][entry];
      rank_of_lane = tables_.rank[entry];
      weight = tables_.weight[kOwn][entry];
    }
    const uint32_t lower = (1u << lane_) - 1;
    // Own rows in k order, and one sum of each peer that has rows, by ascending rank.
    const bool is_own = rank_of_lane == g_.rank;
    const uint32_t own = __ballot_sync(0xffffffffu, is_own);
    const uint32_t same = __match_any_sync(0xffffffffu, rank_of_lane);
    const bool is_peer = rank_of_lane != INT32_MAX && !is_own && (same & lower) == 0;
    const uint32_t peers = __ballot_sync(0xffffffffu, is_peer);
    const int32_t num_own = __popc(own);
    begin_sum(num_own + __popc(peers), at);
    int32_t position = is_own ? __popc(own & lower) : rank_of_lane > g_.rank ? num_own : 0;
    for (uint32_t left = peers; left != 0; left &= left - 1) {
      const int32_t rank = __shfl_sync(0xffffffffu, rank_of_lane, __ffs(static_cast<int>(left)) - 1);
      position += rank < rank_of_lane ? 1 : 0;
    }
    position_ = is_own || is_peer ? position : -1;
    source_ = is_peer ? reinterpret_cast<uint64_t>(a_.partial) +
                            (rank_of_lane * a_.num_tokens + t) * row_bytes_ + at
                      : y_at(row, at);
    weight_ = weight;
    ends_ = is_peer || (is_own && (own >> lane_) == 1);
    to_ = reinterpret_cast<uint64_t>(a_.out) + t * row_bytes_ + at;
    sum_done_ = 0;
  }
  // A sum of nothing is a job without rows.
  __device__ void begin_sum(int32_t count, int64_t at) {
    fetched_ = 0;
    count_ = count;
    num_vectors_ = static_cast<int32_t>(min(int64_t{cut_.piece_bytes}, row_bytes_ - at) / 16);
    to_ = 0;
  }

  // Adds the oldest job's rows, and stores the sum if it is the last job of one.
  __device__ void do_job() {
    const Job& job = shared_.job[index_][oldest_job_ % kNumJobs];
    mbarrier_wait_parity(&shared_.full[index_][oldest_job_ % kNumJobs],
                         oldest_job_ / kNumJobs & 1);  // [L]
    __syncwarp();
    const int32_t num_rows = job.num_rows, num_vectors = job.num_vectors;
    const uint32_t ends = job.ends;
    int32_t slot = job.first_slot;
    for (int32_t i = 0; i < num_rows; ++i) {
      const auto* row = reinterpret_cast<const uint4*>(slots_ + slot * cut_.piece_bytes) + lane_;
      const float weight = job.weight[i];
#pragma unroll
      for (int v = 0; v < kVectorsEach; ++v) {
        float x[Vector::kCount];
        Vector::load(row[32 * v], x);  // beyond the row's end: any numbers, which nobody stores
#pragma unroll
        for (int c = 0; c < Vector::kCount; ++c) {
          sum_[v][c] = __fadd_rn(sum_[v][c], __fmul_rn(weight, x[c]));
        }
      }
      if (++slot == cut_.num_slots) slot = 0;
      if ((ends >> i & 1) == 0) continue;
#pragma unroll
      for (int v = 0; v < kVectorsEach; ++v) {
        float x[Vector::kCount];
        Vector::load(Vector::store(sum_[v]), x);  // rounded, as what crosses a link
#pragma unroll
        for (int c = 0; c < Vector::kCount; ++c) {
          total_[v][c] = __fadd_rn(total_[v][c], x[c]);
          sum_[v][c] = 0.0f;
        }
      }
    }
    const uint64_t to = job.to;
    const int32_t done = job.done;
    const bool is_last = job.is_last;
    free_slots_ += num_rows;
    ++oldest_job_;
    __syncwarp();  // [F]
    if (!is_last) return;
    char* result = results_ + num_stored_++ % kNumResults * cut_.piece_bytes;
#pragma unroll
    for (int v = 0; v < kVectorsEach; ++v) {
      if (to != 0 && lane_ + 32 * v < num_vectors) {
        reinterpret_cast<uint4*>(result)[lane_ + 32 * v] = Vector::store(total_[v]);
      }
#pragma unroll
      for (int c = 0; c < Vector::kCount; ++c) total_[v][c] = 0.0f;
    }
    fence_proxy_async_shared();  // the copy engine reads what was written
    __syncwarp();
    if (lane_ == 0) {
      if (to != 0) {
        bulk_store(reinterpret_cast<void*>(to), result, static_cast<uint32_t>(num_vectors * 16));
      }
      bulk_commit_group();
      bulk_wait_group_read<kNumResults - 1>();  // [D] of the one whose memory is next
    }
    if (done != 0) done_ = done;
    tell(wait_written());
  }

  // Waits until all but the newest results are written; returns how many units are done for the
  // peers up to the last written one.
  __device__ int32_t wait_written() {
    // Of the newest results, the newest last: a lane keeps each.
    const int32_t written = __shfl_sync(0xffffffffu, done_up_to_, 32 - num_untold_);
    const int32_t before = __shfl_down_sync(0xffffffffu, done_up_to_, 1);
    done_up_to_ = lane_ == 31 ? done_ : before;
    if (written == told_) return told_;
    switch (num_untold_) {
      case 2:
        bulk_wait_group<2>();
        break;
      case 4:
        bulk_wait_group<4>();
        break;
      default:
        bulk_wait_group<8>();
    }
    return written;
  }


  // Units whose sums for the peers are written: for the messenger, [P1].
  __device__ void tell(int32_t num_units) {
    __syncwarp();
    if (num_units == told_) return;
    told_ = num_units;
    if (lane_ == 0) st_release_cta_shared(&shared_.box.done[index_], num_units);
  }

  const Work& work_;
  const GroupView& g_;
  const CombineArguments& a_;
  const Cut& cut_;
  Shared& shared_;
  const Tables& tables_;
  const int32_t index_, lane_;
  const int64_t row_bytes_;
  const int32_t first_unit_;                // of the block
  const int32_t num_steps_, num_for_peers_;  // of this adder: units, and sums for peers
  char* const slots_;                       // [num_slots][piece_bytes]
  char* const results_;                     // [kNumResults][piece_bytes]
  int32_t for_peers_ = 0, own_ = 0;         // the next sums
  bool own_in_turn_ = false;
  int32_t table_[2] = {};  // by kind: the one in use, and whether it is known to be filled
  bool is_filled_[2] = {};
  // The sum that is being fetched, and this lane's row of it.
  int32_t count_ = 0, fetched_ = 0;  // rows
  int32_t num_vectors_ = 0, sum_done_ = 0;
  uint64_t to_ = 0;
  int32_t position_ = -1;
  uint64_t source_ = 0;
  float weight_ = 0.0f;
  bool ends_ = false;
  // Jobs in flight: [oldest, next); the next slot, and how many are free from there on.
  uint32_t next_job_ = 0, oldest_job_ = 0;
  int32_t slot_ = 0, free_slots_;
  // The sum that is being added.
  float sum_[kVectorsEach][Vector::kCount] = {}, total_[kVectorsEach][Vector::kCount] = {};
  uint32_t num_stored_ = 0;
  const int32_t num_untold_;
  // Units whose sums for the peers are stored, and told; those up to the result 31 - lane before
  // the newest.
  int32_t done_ = 0, told_ = 0, done_up_to_ = 0;
  int32_t there_;                // units that all peers have done, as far as is known
};

// Sends values of rows to their tokens, by a warp: what belongs to a block's units that begin a
// token.
__device__ void collect_values(const GroupView& g, const CombineArguments& a, const Cut& cut,
                               Shared& shared, int32_t first_unit) {
  const int64_t end_unit = first_unit + shared.box.num_units;
  const int64_t begin = (first_unit + cut.num_pieces - 1) / cut.num_pieces;  // tokens
  const int64_t end = (end_unit + cut.num_pieces - 1) / cut.num_pieces;
  const auto lane = static_cast<int64_t>(threadIdx.x) % 32;
  for (int r = 0; r < g.num_ranks && begin < end; ++r) {
    if (r == g.rank) continue;
    auto* collected = reinterpret_cast<float*>(shared.address[r][1]);
    const int64_t last = a.recv_offsets[r * a.num_tokens + end];
#pragma unroll 4
    for (int64_t i = a.recv_offsets[r * a.num_tokens + begin] + lane; i < last; i += 32) {
      const int32_t row = a.recv_order[i];
      collected[a.recv_src[row] - r * a.num_tokens * a.top_k] = a.values[row];
    }
  }
  const auto num_local = static_cast<int32_t>(a.num_local_experts);
  for (int64_t i = begin * a.top_k + lane; i < end * a.top_k; i += 32) {
    const int32_t row = a.send_row[i];
    if (row == kNoRow) {
      a.collected[i] = 0.0f;
    } else if (a.topk_idx[i] / num_local == g.rank) {
      a.collected[i] = a.values[row];
    }
  }
  release_values(shared.box);
}

template <typename Vector>
__global__ __launch_bounds__(kNumThreads,
                             1) void combine_kernel(const __grid_constant__ GroupView g,
                                                    const __grid_constant__ CombineArguments a,
                                                    const __grid_constant__ Cut cut) {
  extern __shared__ __align__(128) char memory[];
  // Lanes read as far as the longest piece goes, wherever their slot is: the tables come last.
  __shared__ Shared shared;
  const auto warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const int32_t first = first_unit(num_units, blockIdx.x);
  const int32_t num_here = first_unit(num_units, blockIdx.x + 1) - first;
  const int32_t first_token = first / cut.num_pieces;
  const Work work{g, a, first_token, (first + num_here - 1) / cut.num_pieces + 1 - first_token};
  const Tables tables(memory + kSharedBytes - Tables::bytes(a.top_k), static_cast<int32_t>(a.top_k));
  if (threadIdx.x == 0) {
    for (const Kind kind : {kForPeers, kOwn}) {
      for (int i = 0; i < kNumTables; ++i) {
        mbarrier_init(&shared.filled[kind][i], 1);
        mbarrier_init(&shared.used[kind][i], kNumAdders);
      }
    }
    for (int m = 0; m < kNumAdders; ++m) {
      for (int i = 0; i < kNumJobs; ++i) mbarrier_init(&shared.full[m][i], 1);
    }
    fence_mbarrier_init();
    shared.box = {{}, kNumAdders, num_here, 0, a.values == nullptr};
  }
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected)};
  if (blockIdx.x == 0) send_start(g, OpKind::kCombine, own);          // [S1]
  bool ok = receive_start(g, OpKind::kCombine, own, shared.address);  // [S2]
  if (ok) {
    if (warp == kMessenger) {
      ok = run_messenger(g, OpKind::kCombine, shared.box);
    } else if (warp == kCollector) {
      if (a.values != nullptr) collect_values(g, a, cut, shared, first);
    } else if (warp == kScout) {
      Scout(work, shared, tables).run();
    } else {
      char* own_memory = memory + warp * (cut.num_slots + kNumResults) * cut.piece_bytes;
      ok = Adder<Vector>(work, cut, shared, tables, first, own_memory).run();
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
  // Equal pieces, multiples of 16 bytes.
  const int64_t num_pieces = (row_bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  Cut cut;
  cut.num_pieces = static_cast<int32_t>(num_pieces);
  cut.piece_bytes =
      static_cast<int32_t>(((row_bytes + num_pieces - 1) / num_pieces + 15) / 16 * 16);
  const int64_t shared_bytes = kSharedBytes - Tables::bytes(a.top_k) - kMaxPieceBytes;
  const int64_t num_slots = shared_bytes / kNumAdders / cut.piece_bytes - kNumResults;
  cut.num_slots = static_cast<int32_t>(num_slots < kMaxSlots ? num_slots : kMaxSlots);
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const auto num_blocks = static_cast<int>(num_units < num_sms ? num_units : num_sms);
  if ((num_units + num_blocks - 1) / num_blocks > kMaxUnitsPerBlock || num_units > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  combine_kernel<Vector><<<num_blocks, kNumThreads, kSharedBytes, stream>>>(group, a, cut);
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
  for (auto* kernel :
       {combine_kernel<F32Vector>, combine_kernel<F16Vector>, combine_kernel<Bf16Vector>}) {
    if (cudaError_t e = PrepareKernel(kernel, kSharedBytes); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t PrepareKernels() {
  if (cudaError_t e = PrepareLayout(); e != cudaSuccess) return e;
  if (cudaError_t e = PrepareDispatch(); e != cudaSuccess) return e;
  return PrepareCombine();
}

}  // namespace jax_ep::gpu
