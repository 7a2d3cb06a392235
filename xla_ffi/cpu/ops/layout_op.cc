// Every process reads all ranks' ids and computes its ranks' tables from them: one exchange, no
// answer to wait for. Time and memory are linear in R * T * K + R * E.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/core/placement.h"
#include "xla_ffi/cpu/meet/worker_pool.h"
#include "xla_ffi/cpu/ops/ops.h"
#include "xla_ffi/invalid_ids.h"

namespace jax_ep::cpu {
namespace {

class LayoutOp final : public CollectiveOp {
 public:
  LayoutOp(const LayoutSizes& sizes, const Members& members) : sizes_(sizes) {
    for (const Member& member : members) {
      ids_.push_back(member.in.empty() ? nullptr
                                       : static_cast<const int32_t*>(member.in[kLayoutTopkIdx]));
      out_.push_back(member.out);
    }
  }

  void Prepare(const PeerMemory&) override {}

  std::vector<uint64_t> Published(int64_t rank) const override {
    return {reinterpret_cast<uint64_t>(ids_[rank])};
  }

  MaybeFailure Finish(const PeerMemory& peers) override {
    const int64_t num_ids = sizes_.num_tokens * sizes_.top_k;
    std::vector<std::vector<int32_t>> copies(sizes_.num_ranks);
    for (int64_t r = 0; r < sizes_.num_ranks; ++r) {
      if (peers.is_local(r)) continue;
      copies[r].resize(num_ids);
      MaybeFailure failure =
          peers.Read(r, peers.published(r).at(0), copies[r].data(), num_ids * sizeof(int32_t));
      if (failure) return failure;
      ids_[r] = copies[r].data();
    }
    CountRows();
    TellOfInvalidIds();
    PlaceExperts();
    WorkerPool& pool = WorkerPool::Get();
    pool.ParallelFor(sizes_.num_ranks, [this](int64_t r) { ClearTables(r); });
    pool.ParallelFor(sizes_.num_ranks, [this](int64_t r) { PlaceRows(r); });
    pool.ParallelFor(sizes_.num_ranks, [this](int64_t r) { WriteSummary(r); });
    return std::nullopt;
  }

 private:
  bool is_local(int64_t rank) const { return !out_[rank].empty(); }
  int32_t* out(int64_t rank, LayoutOut which) const {
    return static_cast<int32_t*>(out_[rank][which]);
  }
  int64_t num_local_experts() const { return sizes_.num_experts / sizes_.num_ranks; }
  int64_t& at(std::vector<int64_t>& table, int64_t src_rank, int64_t expert) const {
    return table[src_rank * sizes_.num_experts + expert];
  }

  // count_[src][e]: rows from a source rank to an expert; num_invalid_[src].
  void CountRows() {
    count_.assign(sizes_.num_ranks * sizes_.num_experts, 0);
    num_invalid_.assign(sizes_.num_ranks, 0);
    WorkerPool::Get().ParallelFor(sizes_.num_ranks, [this](int64_t src) {
      for (int64_t i = 0; i < sizes_.num_tokens * sizes_.top_k; ++i) {
        const int32_t expert = ids_[src][i];
        if (is_routed(expert, sizes_.num_experts)) ++at(count_, src, expert);
        num_invalid_[src] += is_invalid(expert, sizes_.num_experts);
      }
    });
  }

  // Once in a process.
  void TellOfInvalidIds() const {
    static std::atomic<bool> told{false};
    for (int64_t rank = 0; rank < sizes_.num_ranks; ++rank) {
      if (!is_local(rank) || num_invalid_[rank] == 0 || told.exchange(true)) continue;
      const std::string line =
          "jax_ep: " + InvalidIdsText(rank, num_invalid_[rank], sizes_.num_experts) + "\n";
      std::fputs(line.c_str(), stderr);
    }
  }

  // offset_[e]: first row of an expert on its rank. first_[src][e]: rows of the expert before a
  // source's part. first_slot_[src][d]: where the source's part of rank d's recv_order begins.
  void PlaceExperts() {
    const int64_t num_local = num_local_experts();
    const int64_t num_ranks = sizes_.num_ranks;
    offset_.assign(sizes_.num_experts, 0);
    total_.assign(sizes_.num_experts, 0);
    first_.assign(num_ranks * sizes_.num_experts, 0);
    first_slot_.assign(num_ranks * num_ranks, 0);
    num_recv_.assign(num_ranks, 0);
    std::vector<int64_t> kept(num_ranks * num_ranks, 0);  // [src][d]
    for (int64_t expert = 0; expert < sizes_.num_experts; ++expert) {
      const int64_t dst_rank = expert / num_local;
      if (expert % num_local != 0) {
        offset_[expert] = offset_[expert - 1] + sizes_.room.occupied_rows(total_[expert - 1]);
      }
      const int64_t most = sizes_.room.most_rows(offset_[expert]);
      for (int64_t src = 0; src < num_ranks; ++src) {
        const int64_t first = total_[expert];
        at(first_, src, expert) = first;
        total_[expert] += at(count_, src, expert);
        kept[src * num_ranks + dst_rank] += rows_below(first, at(count_, src, expert), most);
      }
    }
    for (int64_t dst = 0; dst < num_ranks; ++dst) {
      for (int64_t src = 0; src < num_ranks; ++src) {
        first_slot_[src * num_ranks + dst] = num_recv_[dst];
        num_recv_[dst] += kept[src * num_ranks + dst];
      }
    }
  }

  void ClearTables(int64_t rank) const {
    if (!is_local(rank)) return;
    static_assert(kNoSource == -1);  // all bits set
    std::memset(out(rank, kLayoutRecvSrc), 0xff, sizes_.room.capacity * sizeof(int32_t));
    std::memset(out(rank, kLayoutRecvOrder), 0xff, sizes_.room.capacity * sizeof(int32_t));
  }

  // Walks the ids of one source in (token, k) order. Sources write disjoint rows and slots.
  void PlaceRows(int64_t src) const {
    const int64_t num_local = num_local_experts();
    const auto expert_begin = src * sizes_.num_experts;
    std::vector<int64_t> next(first_.begin() + expert_begin,
                              first_.begin() + expert_begin + sizes_.num_experts);
    std::vector<int64_t> next_slot(first_slot_.begin() + src * sizes_.num_ranks,
                                   first_slot_.begin() + (src + 1) * sizes_.num_ranks);
    int32_t* send_row = is_local(src) ? out(src, kLayoutSendRow) : nullptr;
    for (int64_t i = 0; i < sizes_.num_tokens * sizes_.top_k; ++i) {
      if (i % sizes_.top_k == 0) {
        const int64_t flat_token = src * sizes_.num_tokens + i / sizes_.top_k;
        for (int64_t dst = 0; dst < sizes_.num_ranks; ++dst) {
          if (!is_local(dst)) continue;
          out(dst, kLayoutRecvOffsets)[flat_token] = static_cast<int32_t>(next_slot[dst]);
        }
      }
      const int32_t expert = ids_[src][i];
      int64_t row = kNoRow;
      if (is_routed(expert, sizes_.num_experts)) {
        const int64_t row_in_expert = next[expert]++;
        if (row_in_expert < sizes_.room.most_rows(offset_[expert])) {
          row = offset_[expert] + row_in_expert;
        }
      }
      if (send_row != nullptr) send_row[i] = static_cast<int32_t>(row);
      if (row == kNoRow) continue;
      const int64_t dst = expert / num_local;
      const int64_t slot = next_slot[dst]++;
      if (!is_local(dst)) continue;
      out(dst, kLayoutRecvSrc)[row] = static_cast<int32_t>(
          flat_source(src, i / sizes_.top_k, i % sizes_.top_k, sizes_.num_tokens, sizes_.top_k));
      out(dst, kLayoutRecvOrder)[slot] = static_cast<int32_t>(row);
    }
  }

  void WriteSummary(int64_t rank) const {
    if (!is_local(rank)) return;
    const int64_t num_local = num_local_experts();
    int64_t num_routed = 0;
    for (int64_t e = 0; e < num_local; ++e) {
      const int64_t expert = rank * num_local + e;
      num_routed += total_[expert];
      out(rank, kLayoutExpertCounts)[e] = static_cast<int32_t>(total_[expert]);
      out(rank, kLayoutGroupSizes)[e] =
          static_cast<int32_t>(sizes_.room.group_size(offset_[expert], total_[expert]));
    }
    for (int64_t expert = 0; expert < sizes_.num_experts; ++expert) {
      out(rank, kLayoutExpertLoad)[expert] = static_cast<int32_t>(total_[expert]);
    }
    out(rank, kLayoutRecvOffsets)[sizes_.num_ranks * sizes_.num_tokens] =
        static_cast<int32_t>(num_recv_[rank]);
    int32_t* counters = out(rank, kLayoutCounters);
    counters[0] = static_cast<int32_t>(num_recv_[rank]);
    counters[1] = static_cast<int32_t>(num_routed - num_recv_[rank]);
    counters[2] = static_cast<int32_t>(num_invalid_[rank]);
  }

  const LayoutSizes sizes_;
  std::vector<const int32_t*> ids_;      // by rank
  std::vector<std::vector<void*>> out_;  // by rank; empty in another process
  std::vector<int64_t> count_, num_invalid_, offset_, total_, first_, first_slot_, num_recv_;
};

}  // namespace

std::unique_ptr<CollectiveOp> MakeLayoutOp(const LayoutSizes& sizes, const Members& members) {
  return std::make_unique<LayoutOp>(sizes, members);
}

}  // namespace jax_ep::cpu
