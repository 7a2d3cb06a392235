// The warp that finds out what is to be added, and sends the values. combine.cu states the protocol.
#ifndef JAX_EP_CUDA_DIRECT_COMBINE_SCOUT_CUH_
#define JAX_EP_CUDA_DIRECT_COMBINE_SCOUT_CUH_

#include "cuda/core/placement.h"
#include "cuda/direct/combine/shared.cuh"
#include "cuda/ptx/bulk_copy.cuh"
#include "cuda/sync/progress.cuh"
#include "cuda/sync/timeline.cuh"

namespace jax_ep::gpu::combine {

// Fills the tables. Each lane looks after a sum, so that lookups, which depend on one another and
// take long while memory is busy, are made for 32 sums at a time.
class Scout {
  static constexpr int kAtOnce = 8;  // lookups of a lane in flight

 public:
  __device__ Scout(const Work& work, Shared& shared, const SumTables& tables)
      : work_(work),
        a_(work.a),
        shared_(shared),
        tables_(tables),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        top_k_(static_cast<int32_t>(work.a.top_k)),
        row_bytes_(work.row_bytes) {}

  // Fills the first tables; needs nothing of the peers.
  __device__ void begin() {
    for (const SumKind kind : {kForPeers, kOwn}) {
      if (work_.num_sums(kind) > 0) fill_table(kind, 0);
    }
  }
  // Fills the others, and sends the values meanwhile.
  __device__ void run() {
    int32_t next[2] = {1, 1};
    const auto is_left = [&](int kind) { return next[kind] * kTableSums < work_.num_sums(kind); };
    if (a_.values != nullptr) send_values();
    while (is_left(kForPeers) || is_left(kOwn)) {
      bool is_waiting = true;
      for (const SumKind kind : {kForPeers, kOwn}) {
        const int32_t slot = next[kind] % kNumTables, use = next[kind] / kNumTables;
        if (!is_left(kind)) continue;
        const bool is_free =
            use == 0 || mbarrier_test_wait_parity(&shared_.used[kind][slot], (use - 1) & 1);  // [U]
        if (__all_sync(0xffffffffu, is_free) == 0) continue;  // the other loader may be waiting
        fill_table(kind, next[kind]++);
        is_waiting = false;
      }
      if (is_waiting) __nanosleep(64);  // issues nothing that adders could
    }
    timeline::mark(Role::kScout, Event::kEnd);
  }

 private:
  __device__ void fill_table(SumKind kind, int32_t table) {
    const int32_t sum = table * kTableSums + lane_;
    if (sum < work_.num_sums(kind)) {
      const int32_t entry = SumTables::entry(sum);
      uint64_t* source = tables_.source[kind] + entry * top_k_;
      float* weight = tables_.weight[kind] + entry * top_k_;
      const int32_t num_peers = work_.g.num_ranks - 1;
      const int32_t unit = kind == kOwn ? sum : sum / num_peers;
      const int64_t t = work_.token_of(unit), at = work_.offset_of(unit);
      SumHead head{};
      SumRows rows{};
      head.bytes = static_cast<uint32_t>(min(int64_t{work_.plan.piece_bytes}, row_bytes_ - at));
      if (kind == kForPeers) {
        const int32_t i = sum % num_peers;
        const int32_t peer = work_.peer(i + 1);
        tables_.peer[entry] = peer;
        head.offset = (work_.g.rank * a_.num_tokens + t) * row_bytes_ + at;
        head.units_done = i == num_peers - 1 ? unit + 1 : unit;
        rows.count = rows.num_own = find_for_peer(peer, t, at, source, weight);
      } else {
        head.offset = t * row_bytes_ + at;
        rows = find_own(t, at, source, weight);
      }
      tables_.head[kind][entry] = head;
      tables_.rows[kind][entry] = rows;
    }
    __syncwarp();
    timeline::mark(Role::kScout, Event::kStore);
    if (lane_ == 0) mbarrier_arrive(&shared_.filled[kind][table % kNumTables]);  // [T]
  }

  // This rank's rows of a peer's token; returns how many they are.
  __device__ int32_t find_for_peer(int32_t peer, int64_t t, int64_t at, uint64_t* source,
                                   float* weight) {
    const int64_t flat_token = peer * a_.num_tokens + t;
    const int32_t first = a_.recv_offsets[flat_token];
    // No more than there is room for here, whatever the tables say; where they point to is trusted.
    const int32_t most = a_.expand ? top_k_ : 1;
    const int32_t count = max(0, min(a_.recv_offsets[flat_token + 1] - first, most));
    for (int32_t begin = 0; begin < count; begin += kAtOnce) {
      // First all loads of a kind, then what depends on them.
      int32_t row[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        row[i] = begin + i < count ? a_.recv_order[first + begin + i] : kNoRow;
      }
      if (!a_.expand) keep_one(row, flat_token, false);
      add_rows(row, at, source + begin, weight + begin);
    }
    return count;
  }

  // The rows of one of this rank's tokens: its own, and the sums of peers that have any.
  __device__ SumRows find_own(int64_t t, int64_t at, uint64_t* source, float* weight) {
    const auto num_local = static_cast<int32_t>(a_.num_local_experts);
    SumRows rows{};
    uint64_t peers[2] = {};  // that have rows, a bit each
    static_assert(kMaxPeers <= 128);
    for (int32_t begin = 0; begin < top_k_; begin += kAtOnce) {
      int32_t row[kAtOnce], expert[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const bool is_any = begin + i < top_k_;
        row[i] = is_any ? a_.send_row[t * top_k_ + begin + i] : kNoRow;
        expert[i] = is_any ? a_.topk_idx[t * top_k_ + begin + i] : 0;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (row[i] == kNoRow) continue;
        const int32_t rank = expert[i] / num_local;
        if (rank == work_.g.rank) continue;
        row[i] = kNoRow;
        peers[0] |= rank < 64 ? uint64_t{1} << rank : 0;
        peers[1] |= rank < 64 ? 0 : uint64_t{1} << (rank - 64);
      }
      if (!a_.expand) keep_one(row, work_.g.rank * a_.num_tokens + t, rows.num_own > 0);
      rows.num_own += add_rows(row, at, source + rows.num_own, weight + rows.num_own);
    }
    rows.count = rows.own_before = rows.num_own;
    const uint64_t partial = reinterpret_cast<uint64_t>(a_.partial) + t * row_bytes_ + at;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (uint64_t left = peers[half]; left != 0; left &= left - 1) {
        const int32_t rank = half * 64 + __ffsll(static_cast<long long>(left)) - 1;
        source[rows.count++] = partial + rank * a_.num_tokens * row_bytes_;
        if (rank < work_.g.rank) rows.own_before = rows.count;
      }
    }
    return rows;
  }

  // Of y that is not expanded: in the place of a token's rows its one row, unless that is there.
  __device__ static void keep_one(int32_t (&row)[kAtOnce], int64_t one, bool is_there) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] == kNoRow) continue;
      row[i] = is_there ? kNoRow : static_cast<int32_t>(one);
      is_there = true;
    }
  }

  // Notes those that are rows of y, from `at` on, and their weights; returns how many they are.
  __device__ int32_t add_rows(const int32_t (&row)[kAtOnce], int64_t at, uint64_t* source,
                              float* weight) {
    float w[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      w[i] = a_.weights != nullptr && row[i] != kNoRow ? a_.weights[row[i]] : 1.0f;
    }
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row[i] == kNoRow) continue;
      source[count] = reinterpret_cast<uint64_t>(a_.y) + row[i] * row_bytes_ + at;
      weight[count++] = w[i];
    }
    return count;
  }

  // Sends the values of all rows that belong to the block's units, at those that begin a token.
  __device__ void send_values() {
    const int64_t pieces = work_.plan.num_pieces;
    const int64_t begin = (work_.first_unit + pieces - 1) / pieces;  // tokens
    const int64_t end = (work_.first_unit + work_.num_units + pieces - 1) / pieces;
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
    set_values_written(shared_.box);
  }

  const Work& work_;
  const CombineArguments& a_;
  Shared& shared_;
  const SumTables& tables_;
  const int32_t lane_, top_k_;
  const int64_t row_bytes_;
};

}  // namespace jax_ep::gpu::combine

#endif  // JAX_EP_CUDA_DIRECT_COMBINE_SCOUT_CUH_
