// out[t] = round(sum over nodes n of round(sum over ranks r of n of round(sum over the rows of t on r
// of weight * y))), all sums in f32 from +0, nodes and ranks ascending, rows in k order. Ranks
// ranks_per_node * n and so on are node n. The innermost sum is the expert's rank's: within a
// process it is formed where it is used, for a token of another process it is formed beforehand,
// so that one row per (token, rank) crosses.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cuda/core/placement.h"
#include "xla_ffi/cpu/meet/worker_pool.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep::cpu {
namespace {

constexpr int64_t kTokensPerItem = 64;  // one unit of parallel work
constexpr int64_t kBlock = 512;         // channels summed at a time, in the first-level cache

class CombineOp final : public CollectiveOp {
 public:
  CombineOp(const CombineSizes& sizes, const Members& members) : sizes_(sizes) {
    for (const Member& member : members) {
      in_.push_back(member.in);
      out_.push_back(member.out);
    }
  }

  // Partial sums for the tokens of other processes, [d][src], tokens ascending; and the values of
  // their rows, in (token, k) order.
  void Prepare(const PeerMemory& peers) override {
    partial_.resize(sizes_.num_ranks * sizes_.num_ranks);
    values_.resize(sizes_.num_ranks * sizes_.num_ranks);
    WorkerPool::Get().ParallelFor(sizes_.num_ranks * sizes_.num_ranks, [&](int64_t pair) {
      const int64_t dst = pair / sizes_.num_ranks, src = pair % sizes_.num_ranks;
      if (is_local(dst) && !peers.is_local(src)) SumForRemote(dst, src);
    });
  }

  std::vector<uint64_t> Published(int64_t rank) const override {
    std::vector<uint64_t> words;
    for (int64_t src = 0; src < sizes_.num_ranks; ++src) {
      words.push_back(reinterpret_cast<uint64_t>(partial_[rank * sizes_.num_ranks + src].data()));
      words.push_back(reinterpret_cast<uint64_t>(values_[rank * sizes_.num_ranks + src].data()));
    }
    return words;
  }

  MaybeFailure Finish(const PeerMemory& peers) override {
    std::vector<Pulled> pulled(sizes_.num_ranks * sizes_.num_ranks);  // [src][dst]
    for (int64_t src = 0; src < sizes_.num_ranks; ++src) {
      if (!is_local(src)) continue;
      for (int64_t dst = 0; dst < sizes_.num_ranks; ++dst) {
        if (peers.is_local(dst)) continue;
        Pulled& into = pulled[src * sizes_.num_ranks + dst];
        MaybeFailure failure = Pull(src, dst, peers, into);
        if (failure) return failure;
      }
    }
    const int64_t items = (sizes_.num_tokens + kTokensPerItem - 1) / kTokensPerItem;
    WorkerPool::Get().ParallelFor(sizes_.num_ranks * items, [&](int64_t item) {
      const int64_t src = item / items;
      if (!is_local(src)) return;
      const ExactFloatScope exact;
      const int64_t begin = item % items * kTokensPerItem;
      const int64_t end = std::min(begin + kTokensPerItem, sizes_.num_tokens);
      std::vector<Term> terms;
      for (int64_t t = begin; t < end; ++t) {
        ListTerms(src, t, terms);
        SumToken(src, t, terms, &pulled[src * sizes_.num_ranks]);
        if (has_values(src)) Collect(src, t, &pulled[src * sizes_.num_ranks]);
      }
    });
    return std::nullopt;
  }

 private:
  // A kept row of a token.
  struct Term {
    int64_t dst_rank;
    int64_t row;
  };
  // What one source got from one rank of another process.
  struct Pulled {
    std::vector<char> rows;
    std::vector<float> values;
    std::vector<int32_t> row_of_token;   // [T], -1 if none
    std::vector<int32_t> value_of_slot;  // [T * K], -1 if none
  };

  bool is_local(int64_t rank) const { return !out_[rank].empty(); }
  bool has_values(int64_t rank) const { return in_[rank][kCombineValues] != nullptr; }
  const int32_t* table(int64_t rank, CombineIn which) const {
    return static_cast<const int32_t*>(in_[rank][which]);
  }
  const float* floats(int64_t rank, CombineIn which) const {
    return static_cast<const float*>(in_[rank][which]);
  }
  int64_t row_bytes() const { return sizes_.num_channels * float_bytes(sizes_.type); }
  const char* y_row(int64_t rank, int64_t row, int64_t channel) const {
    return static_cast<const char*>(in_[rank][kCombineY]) + row * row_bytes() +
           channel * float_bytes(sizes_.type);
  }

  // acc[0 .. count) = sum over rows of weight * y, channels from `channel` on.
  void SumRows(int64_t rank, const Term* terms, int64_t num_terms, int64_t channel, int64_t count,
               float* acc) const {
    std::fill_n(acc, count, 0.0f);
    const float* weights = floats(rank, kCombineWeights);
    for (int64_t i = 0; i < num_terms; ++i) {
      const void* y = y_row(rank, terms[i].row, channel);
      if (weights != nullptr) {
        accumulate_row(sizes_.type, acc, y, weights[terms[i].row], count);
      } else {
        accumulate_row(sizes_.type, acc, y, count);
      }
    }
  }

  // The kept rows of a token, by rank, then k; of y that is not expanded, one for each rank.
  void ListTerms(int64_t src, int64_t token, std::vector<Term>& terms) const {
    terms.clear();
    for (int64_t i = token * sizes_.top_k; i < (token + 1) * sizes_.top_k; ++i) {
      const int64_t row = table(src, kCombineSendRow)[i];
      if (row == kNoRow) continue;
      terms.push_back({table(src, kCombineTopkIdx)[i] / sizes_.num_local_experts, row});
    }
    std::stable_sort(terms.begin(), terms.end(),
                     [](const Term& a, const Term& b) { return a.dst_rank < b.dst_rank; });
    if (sizes_.expand) return;
    const auto is_same_rank = [](const Term& a, const Term& b) { return a.dst_rank == b.dst_rank; };
    terms.erase(std::unique(terms.begin(), terms.end(), is_same_rank), terms.end());
    for (Term& term : terms) term.row = src * sizes_.num_tokens + token;
  }

  // acc[0 .. count) = sum over the ranks of terms[begin ..] before `end_rank`, channels from
  // `channel` on; returns where the terms of other ranks begin.
  size_t SumRanks(int64_t token, const std::vector<Term>& terms, size_t begin, int64_t end_rank,
                  const Pulled* pulled, int64_t channel, int64_t count, float* acc) const {
    std::fill_n(acc, count, 0.0f);
    while (begin < terms.size() && terms[begin].dst_rank < end_rank) {
      const int64_t rank = terms[begin].dst_rank;
      size_t end = begin;
      while (end < terms.size() && terms[end].dst_rank == rank) ++end;
      if (is_local(rank)) {
        float partial[kBlock];
        SumRows(rank, &terms[begin], static_cast<int64_t>(end - begin), channel, count, partial);
        accumulate_rounded(sizes_.type, acc, partial, count);
      } else {
        const Pulled& from = pulled[rank];
        accumulate_row(sizes_.type, acc,
                       from.rows.data() + from.row_of_token[token] * row_bytes() +
                           channel * float_bytes(sizes_.type),
                       count);
      }
      begin = end;
    }
    return begin;
  }

  void SumToken(int64_t src, int64_t token, const std::vector<Term>& terms,
                const Pulled* pulled) const {
    char* out = static_cast<char*>(out_[src][kCombineOut]) + token * row_bytes();
    for (int64_t channel = 0; channel < sizes_.num_channels; channel += kBlock) {
      const int64_t count = std::min(kBlock, sizes_.num_channels - channel);
      float total[kBlock];
      if (sizes_.ranks_per_node == sizes_.num_ranks) {  // rounded once more it would be the same
        SumRanks(token, terms, 0, sizes_.num_ranks, pulled, channel, count, total);
      } else {
        std::fill_n(total, count, 0.0f);
        for (size_t i = 0; i < terms.size();) {
          float on_node[kBlock];
          const int64_t node = terms[i].dst_rank / sizes_.ranks_per_node;
          i = SumRanks(token, terms, i, (node + 1) * sizes_.ranks_per_node, pulled, channel, count,
                       on_node);
          accumulate_rounded(sizes_.type, total, on_node, count);
        }
      }
      store_row(sizes_.type, out + channel * float_bytes(sizes_.type), total, count);
    }
  }

  void Collect(int64_t src, int64_t token, const Pulled* pulled) const {
    auto* collected = static_cast<float*>(out_[src][kCombineCollected]);
    for (int64_t i = token * sizes_.top_k; i < (token + 1) * sizes_.top_k; ++i) {
      const int64_t row = table(src, kCombineSendRow)[i];
      if (row == kNoRow) {
        collected[i] = 0.0f;
        continue;
      }
      const int64_t rank = table(src, kCombineTopkIdx)[i] / sizes_.num_local_experts;
      collected[i] = is_local(rank) ? floats(rank, kCombineValues)[row]
                                    : pulled[rank].values[pulled[rank].value_of_slot[i]];
    }
  }

  void SumForRemote(int64_t dst, int64_t src) {
    const ExactFloatScope exact;
    const int32_t* order = table(dst, kCombineRecvOrder);
    const int32_t* offsets = table(dst, kCombineRecvOffsets);
    std::vector<char>& rows = partial_[dst * sizes_.num_ranks + src];
    std::vector<float>& values = values_[dst * sizes_.num_ranks + src];
    std::vector<Term> terms;
    for (int64_t token = src * sizes_.num_tokens; token < (src + 1) * sizes_.num_tokens; ++token) {
      terms.clear();
      for (int32_t slot = offsets[token]; slot < offsets[token + 1]; ++slot) {
        if (sizes_.expand) {
          terms.push_back({dst, order[slot]});
        } else if (terms.empty()) {
          terms.push_back({dst, token});
        }
        if (has_values(dst)) values.push_back(floats(dst, kCombineValues)[order[slot]]);
      }
      if (terms.empty()) continue;
      rows.resize(rows.size() + row_bytes());
      char* out = rows.data() + rows.size() - row_bytes();
      for (int64_t channel = 0; channel < sizes_.num_channels; channel += kBlock) {
        const int64_t count = std::min(kBlock, sizes_.num_channels - channel);
        float partial[kBlock];
        SumRows(dst, terms.data(), static_cast<int64_t>(terms.size()), channel, count, partial);
        store_row(sizes_.type, out + channel * float_bytes(sizes_.type), partial, count);
      }
    }
  }

  // The source knows from its own tables which of its tokens have a row there, and in which order.
  MaybeFailure Pull(int64_t src, int64_t dst, const PeerMemory& peers, Pulled& into) const {
    int32_t num_rows = 0, num_values = 0;
    into.row_of_token.assign(sizes_.num_tokens, -1);
    into.value_of_slot.assign(sizes_.num_tokens * sizes_.top_k, -1);
    for (int64_t i = 0; i < sizes_.num_tokens * sizes_.top_k; ++i) {
      const bool here = table(src, kCombineSendRow)[i] != kNoRow &&
                        table(src, kCombineTopkIdx)[i] / sizes_.num_local_experts == dst;
      if (!here) continue;
      into.value_of_slot[i] = num_values++;
      int32_t& row = into.row_of_token[i / sizes_.top_k];
      if (row < 0) row = num_rows++;
    }
    into.rows.resize(num_rows * row_bytes());
    into.values.resize(has_values(src) ? num_values : 0);
    MaybeFailure failure =
        peers.Read(dst, peers.published(dst).at(2 * src), into.rows.data(), into.rows.size());
    if (failure) return failure;
    return peers.Read(dst, peers.published(dst).at(2 * src + 1), into.values.data(),
                      into.values.size() * sizeof(float));
  }

  const CombineSizes sizes_;
  std::vector<std::vector<const void*>> in_;  // by rank; empty in another process
  std::vector<std::vector<void*>> out_;
  std::vector<std::vector<char>> partial_;  // [dst][src]
  std::vector<std::vector<float>> values_;  // [dst][src]
};

}  // namespace

std::unique_ptr<CollectiveOp> MakeCombineOp(const CombineSizes& sizes, const Members& members) {
  return std::make_unique<CombineOp>(sizes, members);
}

}  // namespace jax_ep::cpu
