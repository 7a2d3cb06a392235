// Receivers pull: each row of the output is copied once, from where its token lives. A token of
// another process crosses once per destination rank, however many of its experts live there.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "cuda/core/placement.h"
#include "xla_ffi/cpu/meet/worker_pool.h"
#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep::cpu {
namespace {

constexpr int64_t kRowsPerItem = 128;  // rows of one destination, one unit of parallel work
constexpr int64_t kRemoteTokensPerRead = 256;

class DispatchOp final : public CollectiveOp {
 public:
  DispatchOp(const DispatchSizes& sizes, const Members& members) : sizes_(sizes) {
    for (const Member& member : members) {
      in_.push_back(member.in);
      out_.push_back(member.out);
    }
    wire_.resize(sizes.num_ranks);
  }

  // With scales, what travels is the wire row (cuda/core/wire_row.h), made once per token.
  void Prepare(const PeerMemory&) override {
    if (!has_wire_rows()) return;
    for (int64_t r = 0; r < sizes_.num_ranks; ++r) {
      if (is_local(r)) wire_[r].resize(sizes_.num_tokens * wire_bytes());
    }
    const int64_t items = (sizes_.num_tokens + kRowsPerItem - 1) / kRowsPerItem;
    WorkerPool::Get().ParallelFor(sizes_.num_ranks * items, [&](int64_t item) {
      const int64_t rank = item / items;
      if (!is_local(rank)) return;
      const ExactFloatScope exact;
      const int64_t begin = item % items * kRowsPerItem;
      const int64_t end = std::min(begin + kRowsPerItem, sizes_.num_tokens);
      for (int64_t t = begin; t < end; ++t) {
        MakeWireRow(rank, t, wire_[rank].data() + t * wire_bytes());
      }
    });
  }

  std::vector<uint64_t> Published(int64_t rank) const override {
    return {reinterpret_cast<uint64_t>(wire_rows(rank)),
            reinterpret_cast<uint64_t>(in_[rank][kDispatchTopkWeights])};
  }

  MaybeFailure Finish(const PeerMemory& peers) override {
    const int64_t most = std::max(sizes_.num_rows, sizes_.capacity);
    const int64_t items = (most + kRowsPerItem - 1) / kRowsPerItem;
    WorkerPool::Get().ParallelFor(sizes_.num_ranks * items, [&](int64_t item) {
      const int64_t dst = item / items;
      if (!is_local(dst)) return;
      const int64_t begin = item % items * kRowsPerItem, end = begin + kRowsPerItem;
      FillRows(dst, begin, std::min(end, sizes_.num_rows));
      if (weights_out(dst) != nullptr) FillWeights(dst, begin, std::min(end, sizes_.capacity));
    });
    for (int64_t dst = 0; dst < sizes_.num_ranks; ++dst) {
      if (!is_local(dst)) continue;
      for (int64_t src = 0; src < sizes_.num_ranks; ++src) {
        if (peers.is_local(src)) continue;
        MaybeFailure failure = PullRows(dst, src, peers);
        if (failure) return failure;
      }
    }
    return std::nullopt;
  }

 private:
  bool is_local(int64_t rank) const { return !out_[rank].empty(); }
  const int32_t* table(int64_t rank, DispatchIn which) const {
    return static_cast<const int32_t*>(in_[rank][which]);
  }
  bool has_wire_rows() const { return sizes_.num_scales > 0; }
  int64_t wire_bytes() const {
    return has_wire_rows() ? wire_row_bytes(sizes_.num_channels, sizes_.num_scales)
                           : sizes_.row_bytes;
  }
  int64_t num_group_tokens() const { return sizes_.num_ranks * sizes_.num_tokens; }
  int64_t scale_bytes() const { return sizes_.num_scales * static_cast<int64_t>(sizeof(float)); }
  bool keeps_scales() const { return has_wire_rows() && !sizes_.dequantize; }
  int64_t token_bytes() const { return keeps_scales() ? sizes_.num_channels : sizes_.row_bytes; }
  const char* wire_rows(int64_t rank) const {
    return has_wire_rows() ? wire_[rank].data() : static_cast<const char*>(in_[rank][kDispatchX]);
  }

  void MakeWireRow(int64_t rank, int64_t token, char* wire) const {
    const auto* x = static_cast<const char*>(in_[rank][kDispatchX]) + token * sizes_.row_bytes;
    char* scales = wire + sizes_.num_channels;
    if (sizes_.quantization == QuantizationKind::kGivenScales) {
      std::memcpy(wire, x, sizes_.num_channels);
      std::memcpy(scales,
                  static_cast<const char*>(in_[rank][kDispatchXScales]) + token * scale_bytes(),
                  scale_bytes());
    } else {
      quantize_row(sizes_.type, sizes_.quantization, x, reinterpret_cast<uint8_t*>(wire),
                   reinterpret_cast<float*>(scales), sizes_.num_channels);
    }
  }

  // The token, of all of the group, that a row of a destination holds; kNoSource if none.
  int64_t TokenOf(int64_t dst, int64_t row) const {
    if (sizes_.expand) {
      const int64_t flat = table(dst, kDispatchRecvSrc)[row];
      return flat == kNoSource ? kNoSource : flat / sizes_.top_k;
    }
    if (row == num_group_tokens()) return kNoSource;
    const int32_t* offsets = table(dst, kDispatchRecvOffsets);
    return offsets[row] == offsets[row + 1] ? kNoSource : row;
  }

  // Up to where expert rows are padding if they hold nothing; behind it is the tail.
  int64_t EndOfGroups(int64_t dst) const {
    const int32_t* group_sizes = table(dst, kDispatchGroupSizes);
    return std::accumulate(group_sizes, group_sizes + sizes_.num_local_experts, int64_t{0});
  }

  // The rows [begin, end) of a destination: local sources copied, those that hold nothing zeroed.
  void FillRows(int64_t dst, int64_t begin, int64_t end) const {
    const ExactFloatScope exact;
    const int64_t end_of_groups = EndOfGroups(dst);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = TokenOf(dst, row);
      if (token == kNoSource) {
        const bool is_used = sizes_.expand ? row < end_of_groups : row == num_group_tokens();
        if (is_used || sizes_.zero_tail) ZeroRow(dst, row);
        continue;
      }
      const int64_t src = token / sizes_.num_tokens;
      if (!is_local(src)) continue;  // PullRows
      PutRow(dst, row, wire_rows(src) + token % sizes_.num_tokens * wire_bytes());
    }
  }

  // Likewise of the weights, which are by expert row.
  void FillWeights(int64_t dst, int64_t begin, int64_t end) const {
    const int32_t* recv_src = table(dst, kDispatchRecvSrc);
    const int64_t ids_per_rank = sizes_.num_tokens * sizes_.top_k;
    const int64_t end_of_groups = EndOfGroups(dst);
    for (int64_t row = begin; row < end; ++row) {
      if (recv_src[row] == kNoSource) {
        if (row < end_of_groups || sizes_.zero_tail) weights_out(dst)[row] = 0.0f;
        continue;
      }
      const int64_t src = recv_src[row] / ids_per_rank;
      if (!is_local(src)) continue;  // PullRows
      weights_out(dst)[row] =
          static_cast<const float*>(in_[src][kDispatchTopkWeights])[recv_src[row] % ids_per_rank];
    }
  }

  char* scales_out(int64_t rank) const { return static_cast<char*>(out_[rank][kDispatchScales]); }
  float* weights_out(int64_t rank) const {
    return static_cast<float*>(out_[rank][kDispatchWeights]);
  }

  void ZeroRow(int64_t dst, int64_t row) const {
    std::memset(static_cast<char*>(out_[dst][kDispatchTokens]) + row * token_bytes(), 0,
                token_bytes());
    if (keeps_scales()) std::memset(scales_out(dst) + row * scale_bytes(), 0, scale_bytes());
  }

  void PutRow(int64_t dst, int64_t row, const char* wire) const {
    char* token = static_cast<char*>(out_[dst][kDispatchTokens]) + row * token_bytes();
    const char* scales = wire + sizes_.num_channels;
    if (has_wire_rows() && sizes_.dequantize) {
      dequantize_row(sizes_.type, reinterpret_cast<const uint8_t*>(wire),
                     reinterpret_cast<const float*>(scales), token, sizes_.num_channels);
      return;
    }
    std::memcpy(token, wire, token_bytes());
    if (keeps_scales()) {
      std::memcpy(scales_out(dst) + row * scale_bytes(), scales, scale_bytes());
    }
  }

  // All rows that rank `src` of another process sends to `dst`: each token read once, put into its
  // row or, expanded, into each of its rows.
  MaybeFailure PullRows(int64_t dst, int64_t src, const PeerMemory& peers) const {
    const ExactFloatScope exact;
    const int32_t* recv_src = table(dst, kDispatchRecvSrc);
    const int32_t* order = table(dst, kDispatchRecvOrder);
    const int64_t ids_per_rank = sizes_.num_tokens * sizes_.top_k;
    const uint64_t rows_at = peers.published(src).at(0);
    const uint64_t weights_at = peers.published(src).at(1);
    std::vector<float> weights(weights_out(dst) == nullptr ? 0 : ids_per_rank);
    if (MaybeFailure failure =
            peers.Read(src, weights_at, weights.data(), weights.size() * sizeof(float))) {
      return failure;
    }
    const int32_t* offsets = table(dst, kDispatchRecvOffsets);
    const int32_t* begin = order + offsets[src * sizes_.num_tokens];
    const int32_t* end = order + offsets[(src + 1) * sizes_.num_tokens];

    std::vector<uint64_t> addresses;
    std::vector<char> buffer(kRemoteTokensPerRead * wire_bytes());
    while (begin != end) {
      addresses.clear();
      int64_t last_token = -1;
      const int32_t* batch_end = begin;
      for (; batch_end != end; ++batch_end) {
        const int64_t token = recv_src[*batch_end] / sizes_.top_k;
        if (token != last_token) {
          if (addresses.size() == kRemoteTokensPerRead) break;
          addresses.push_back(rows_at + (token % sizes_.num_tokens) * wire_bytes());
          last_token = token;
        }
      }
      MaybeFailure failure = peers.ReadRows(src, addresses, wire_bytes(), buffer.data());
      if (failure) return failure;
      int64_t index = -1;
      last_token = -1;
      for (; begin != batch_end; ++begin) {
        const int64_t flat = recv_src[*begin], token = flat / sizes_.top_k;
        const bool is_first = token != last_token;
        if (is_first) ++index;
        last_token = token;
        if (sizes_.expand || is_first) {
          PutRow(dst, sizes_.expand ? *begin : token, buffer.data() + index * wire_bytes());
        }
        if (!weights.empty()) weights_out(dst)[*begin] = weights[flat - src * ids_per_rank];
      }
    }
    return std::nullopt;
  }

  const DispatchSizes sizes_;
  std::vector<std::vector<const void*>> in_;  // by rank; empty in another process
  std::vector<std::vector<void*>> out_;
  std::vector<std::vector<char>> wire_;
};

}  // namespace

std::unique_ptr<CollectiveOp> MakeDispatchOp(const DispatchSizes& sizes, const Members& members) {
  return std::make_unique<DispatchOp>(sizes, members);
}

}  // namespace jax_ep::cpu
