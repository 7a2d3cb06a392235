// combine: each rank sums its rows of every peer's token and writes the sum to the token's rank,
//           which adds the sums.
// After:    out[t] = round(sum over ranks r ascending of round(sum over the kept rows of t on r, in
//           k order, of weight * y)), sums and products f32, each rounded on its own, from +0.
//           collected[t, k] = values[row of (t, k)], 0 if there is none.
// Roles:    one block an SM, 17 warps. The loader (warp 0) decides what to add and fetches it by
//           bulk copies into a ring of stages, job by job; the adders (warps 3..16) add up job
//           after job in registers and write each finished sum to a ring of results; the storer
//           (warp 1) stores results by bulk copies; the messenger (warp 2) talks to the peers. A
//           unit is a piece of a token's row. Block b has the same units on every rank, so it only
//           ever meets the blocks b of the peers.
// Buffers:  name                   | lives on       | written by              | read by
//           y, weights, values     | XLA, own       | before the call         | loader
//           partial [R, T, H]      | XLA, each rank | storers of rank r,      | own loaders, [P2]
//             (partial[r]: from r) |                | [S2]..[P1]              |
//           collected              | XLA, each rank | peers, [S2]..[P1]; own  | later kernels
//           out                    | XLA, own       | storer                  | later kernels
//           stages, results        | shared memory  | see [L] [F] [W] [D]
// Protocol: 1. [S1] show partial and collected, [S2] wait for all.
//           2. Unit by unit, a block sums its own rows of every peer's token into that peer's
//           partial; in turn with that, as soon as all peers have done a unit, it adds up that unit
//           of its own tokens, with what they have sent.
//           3. [P1] when sums are stored, the block tells the peers' blocks how many units are
//           there; [P2] a loader knows the count before it reads them. A block ends when it has told
//           all and knows all.
//           In the block: [L] a job's rows are loaded (its barrier's phase), [F] all adders have
//           read them, [W] a result is written, [D] the copy engine has read it.
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

constexpr int kNumWarps = 17;
constexpr int kNumThreads = kNumWarps * 32;
constexpr int kFirstAdder = 3;
constexpr int kNumAdderWarps = kNumWarps - kFirstAdder;
constexpr int kNumAdders = kNumAdderWarps * 32;
constexpr int kVectorsEach = 2;  // of 16 bytes: what an adder has of a piece
constexpr int64_t kMaxPieceBytes = kNumAdders * kVectorsEach * 16;
constexpr int64_t kMinPieceBytes = 1024;
constexpr int kNumResults = 4;
constexpr int kMaxStages = 32;
constexpr int kNumJobs = 16;                // in flight
constexpr int kMaxJobRows = 4;
constexpr int kPatience = 32;               // looks for a result before a pause is used
constexpr int64_t kRingBytes = 216 * 1024;  // of shared memory, for stages and results

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

struct Shared {
  uint64_t address[kMaxPeers][kNumAddresses];
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

// A sum of this rank's rows for one unit of a peer's tokens, or for one unit of its own. Lane k
// looks after the k-th row. Metadata comes from chains of dependent loads; each link is loaded a
// job before it is needed.
struct ForPeer {
  int32_t step = -1;  // none
  int32_t q = 0;      // which peer
  int32_t first_slot = 0, count = 0;
  int32_t row = kNoRow;
  float weight = 1.0f;
};
struct Own {
  int32_t step = -1;  // none
  int32_t row = kNoRow;
  int32_t expert = 0;
  int32_t rank = INT32_MAX;  // of the row, known with the weight
  float weight = 1.0f;
};

class Loader {
 public:
  __device__ Loader(const GroupView& g, const CombineArguments& a, const Cut& cut, Shared& shared,
                    char* stages)
      : g_(g),
        a_(a),
        cut_(cut),
        shared_(shared),
        stages_(stages),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        row_bytes_(a.num_channels * (a.type == RowType::kF32 ? 4 : 2)),
        first_unit_(first_unit(a.num_tokens * cut.num_pieces, blockIdx.x)),
        num_steps_(shared.box.num_units),
        max_rows_(min(kMaxJobRows, cut.num_stages)),
        free_stages_(cut.num_stages) {}

  // Ends with a job that stops the others.
  __device__ void run() {
    for (int i = 0; i < 3; ++i) advance_for_peers();
    for (int i = 0; i < 2; ++i) advance_own();
    int32_t there = g_.num_ranks == 1 ? num_steps_ : 0;
    bool may_sum = false;  // in turn with the sums of a unit for the peers
    while (for_peers_[0].step >= 0 || own_[0].step >= 0) {
      if (for_peers_[0].step >= 0 && !(may_sum && own_[0].step < there)) {
        const ForPeer job = for_peers_[0];
        advance_for_peers();
        sum(job);
        may_sum = job.q == g_.num_ranks - 2;
        if (may_sum) there = units_there(shared_.box);  // [P2]
        continue;
      }
      if (own_[0].step >= there) there = wait_for_more(shared_.box, own_[0].step);
      if (there == kBroken) break;
      const Own job = own_[0];
      advance_own();
      sum(job);
      may_sum = false;
    }
    emit(0, false, 0, 0, 0.0f, false, kStop, 0, 0, 0);
  }

 private:
  // Moves on by one job and begins the loads that the ones to come need next.
  __device__ void advance_for_peers() {
    for_peers_[0] = for_peers_[1];
    if (for_peers_[0].row != kNoRow && a_.weights != nullptr) {
      for_peers_[0].weight = a_.weights[for_peers_[0].row];
    }
    for_peers_[1] = for_peers_[2];
    ForPeer& placed = for_peers_[1];
    if (lane_ < placed.count) placed.row = a_.recv_order[placed.first_slot + lane_];
    for_peers_[2] = ForPeer{};
    if (next_for_peers_.step == num_steps_ || g_.num_ranks == 1) return;
    for_peers_[2].step = next_for_peers_.step;
    for_peers_[2].q = next_for_peers_.q;
    const int64_t flat_token =
        peer_of(for_peers_[2].q) * a_.num_tokens + token_of(for_peers_[2].step);
    for_peers_[2].first_slot = a_.recv_offsets[flat_token];
    for_peers_[2].count = a_.recv_offsets[flat_token + 1] - for_peers_[2].first_slot;
    if (++next_for_peers_.q == g_.num_ranks - 1) {
      next_for_peers_.q = 0;
      ++next_for_peers_.step;
    }
  }
  __device__ void advance_own() {
    own_[0] = own_[1];
    if (own_[0].row != kNoRow) {
      own_[0].rank = own_[0].expert / static_cast<int32_t>(a_.num_local_experts);
      if (own_[0].rank == g_.rank && a_.weights != nullptr) {
        own_[0].weight = a_.weights[own_[0].row];
      }
    }
    own_[1] = Own{};
    if (next_own_ == num_steps_) return;
    own_[1].step = next_own_++;
    if (lane_ < a_.top_k) {
      const int64_t i = token_of(own_[1].step) * a_.top_k + lane_;
      own_[1].row = a_.send_row[i];
      own_[1].expert = a_.topk_idx[i];
    }
  }

  __device__ int64_t token_of(int32_t step) const {
    const int32_t unit = first_unit_ + step;
    return cut_.num_pieces == 1 ? unit : unit / cut_.num_pieces;
  }
  // Where a step's piece begins in the row.
  __device__ int64_t offset_of(int32_t step) const {
    return cut_.num_pieces == 1
               ? 0
               : int64_t{(first_unit_ + step) % cut_.num_pieces} * cut_.piece_bytes;
  }
  // Ranks begin with different peers.
  __device__ int32_t peer_of(int32_t q) const {
    const int32_t r = g_.rank + 1 + q;
    return r < g_.num_ranks ? r : r - g_.num_ranks;
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

  __device__ void sum(const ForPeer& job) {
    const int32_t src = peer_of(job.q);
    const int64_t t = token_of(job.step), at = offset_of(job.step);
    if (a_.values != nullptr && at == 0 && lane_ < job.count) {
      const int64_t k = a_.recv_src[job.row] - (src * a_.num_tokens + t) * a_.top_k;
      reinterpret_cast<float*>(shared_.address[src][1])[t * a_.top_k + k] = a_.values[job.row];
    }
    __syncwarp();
    const uint64_t to =
        shared_.address[src][0] + (g_.rank * a_.num_tokens + t) * row_bytes_ + at;
    // The last sum of a step tells that the step is done.
    const uint32_t signal = job.q == g_.num_ranks - 2 ? job.step + 1 : 0;
    if (job.count == 0 && signal == 0) return;
    emit(job.count, lane_ < job.count, lane_, y_at(job.row, at), job.weight,
         lane_ == job.count - 1, kEndsUnit, bytes_at(at), signal, job.count == 0 ? 0 : to);
  }

  __device__ void sum(const Own& job) {
    const int64_t t = token_of(job.step), at = offset_of(job.step);
    if (a_.values != nullptr && at == 0 && lane_ < a_.top_k) {
      float* value = a_.collected + t * a_.top_k + lane_;
      if (job.row == kNoRow) {
        *value = 0.0f;
      } else if (job.rank == g_.rank) {
        *value = a_.values[job.row];
      }
    }
    const uint64_t to = reinterpret_cast<uint64_t>(a_.out) + t * row_bytes_ + at;
    const uint32_t lower = (1u << lane_) - 1;
    // Own rows in k order, and one sum of each peer that has rows, by ascending rank.
    const uint32_t own = __ballot_sync(0xffffffffu, job.rank == g_.rank);
    const uint32_t same = __match_any_sync(0xffffffffu, job.rank);
    const bool is_own = job.rank == g_.rank;
    const bool is_peer = job.rank != INT32_MAX && !is_own && (same & lower) == 0;
    const uint32_t peers = __ballot_sync(0xffffffffu, is_peer);
    const int32_t num_own = __popc(own);
    const int32_t count = num_own + __popc(peers);
    int32_t position = is_own ? __popc(own & lower) : job.rank > g_.rank ? num_own : 0;
    for (uint32_t left = peers; left != 0; left &= left - 1) {
      const int32_t rank = __shfl_sync(0xffffffffu, job.rank, __ffs(static_cast<int>(left)) - 1);
      position += rank < job.rank ? 1 : 0;
    }
    const bool ends = is_peer || (is_own && (own >> lane_) == 1);
    uint64_t source = y_at(job.row, at);
    if (is_peer) {
      source = reinterpret_cast<uint64_t>(a_.partial) +
               (job.rank * a_.num_tokens + t) * row_bytes_ + at;
    }
    emit(count, is_own || is_peer, position, source, is_own ? job.weight : 1.0f, ends, kEndsUnit,
         bytes_at(at), 0, to);
  }

  const GroupView& g_;
  const CombineArguments& a_;
  const Cut& cut_;
  Shared& shared_;
  char* const stages_;
  const int32_t lane_;
  const int64_t row_bytes_;
  const int32_t first_unit_, num_steps_, max_rows_;
  ForPeer for_peers_[3];
  Own own_[2];
  struct {
    int32_t step = 0, q = 0;
  } next_for_peers_;
  int32_t next_own_ = 0;
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
  constexpr int kInFlight = kNumResults - 2;  // stores whose results may still be read
  // Units whose sums are stored; those of them that are to be told next; those that are told.
  uint32_t stored = 0, next = 0, told = 0;
  int age = 0;  // stores since `next`
  const auto tell = [&](uint32_t num_units) {
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
    bulk_wait_group_read<kInFlight>();
    if (n >= kInFlight) mbarrier_arrive(&shared.drained[(n - kInFlight) % kNumResults]);  // [D]
    if (result.signal != 0) stored = result.signal;
    if (next > told && ++age == kInFlight) {
      bulk_wait_group<kInFlight>();
      tell(next);
    }
    if (next <= told && stored > told) {
      next = stored;
      age = 0;
    }
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
  if (threadIdx.x == 0) {
    for (int i = 0; i < kNumJobs; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], kNumAdderWarps);
    }
    for (int i = 0; i < kNumResults; ++i) {
      mbarrier_init(&shared.written[i], kNumAdderWarps);
      mbarrier_init(&shared.drained[i], 1);
    }
    fence_mbarrier_init();
    const int64_t num_units = a.num_tokens * cut.num_pieces;
    const int32_t num_steps =
        first_unit(num_units, blockIdx.x + 1) - first_unit(num_units, blockIdx.x);
    shared.box = {{}, 1, num_steps, 0};
  }
  const uint64_t own[kNumAddresses] = {reinterpret_cast<uint64_t>(a.partial),
                                       reinterpret_cast<uint64_t>(a.collected)};
  if (blockIdx.x == 0) send_start(g, OpKind::kCombine, own);  // [S1]
  bool ok = receive_start(g, OpKind::kCombine, own, shared.address);  // [S2]
  if (ok) {
    char* results = ring + cut.num_stages * cut.piece_bytes;
    const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
    if (warp == 0) {
      Loader loader(g, a, cut, shared, ring);
      loader.run();
    } else if (warp == 1) {
      if (threadIdx.x == 32) run_storer(cut, shared, results);
    } else if (warp == 2) {
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
  const int64_t stages = kRingBytes / cut.piece_bytes - kNumResults;
  cut.num_stages = static_cast<int32_t>(stages < kMaxStages ? stages : kMaxStages);
  const int64_t num_units = a.num_tokens * cut.num_pieces;
  const auto num_blocks = static_cast<int>(num_units < num_sms ? num_units : num_sms);
  if ((num_units + num_blocks - 1) / num_blocks + 1 > kMaxUnitsPerBlock) {
    return cudaErrorInvalidValue;
  }
  combine_kernel<Vector>
      <<<num_blocks, kNumThreads, (cut.num_stages + kNumResults) * cut.piece_bytes, stream>>>(
          group, a, cut);
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
