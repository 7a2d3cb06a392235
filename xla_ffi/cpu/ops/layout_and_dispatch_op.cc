// The layout's step and then dispatch's, which reads the tables that the layout has just written:
// one meeting for both.
#include <utility>
#include <vector>

#include "xla_ffi/cpu/ops/ops.h"

namespace jax_ep::cpu {
namespace {

// Of what a rank has published, the words from `begin` on: those of one of the two.
class PublishedFrom final : public PeerMemory {
 public:
  PublishedFrom(const PeerMemory& peers, size_t begin, int64_t num_ranks) : peers_(peers) {
    for (int64_t r = 0; r < num_ranks; ++r) {
      published_.emplace_back();
      if (peers.is_local(r)) continue;
      const std::vector<uint64_t>& words = peers.published(r);
      published_[r].assign(words.begin() + begin, words.end());
    }
  }

  bool is_local(int64_t rank) const override { return peers_.is_local(rank); }
  const std::vector<uint64_t>& published(int64_t rank) const override { return published_[rank]; }
  MaybeFailure Read(int64_t rank, uint64_t address, void* dst, size_t bytes) const override {
    return peers_.Read(rank, address, dst, bytes);
  }
  MaybeFailure ReadRows(int64_t rank, const std::vector<uint64_t>& addresses, size_t row_bytes,
                        void* dst) const override {
    return peers_.ReadRows(rank, addresses, row_bytes, dst);
  }

 private:
  const PeerMemory& peers_;
  std::vector<std::vector<uint64_t>> published_;  // by rank
};

class LayoutAndDispatchOp final : public CollectiveOp {
 public:
  LayoutAndDispatchOp(const LayoutSizes& layout, const DispatchSizes& dispatch,
                      const Members& members)
      : num_ranks_(layout.num_ranks) {
    Members of_layout(members.size()), of_dispatch(members.size());
    for (size_t r = 0; r < members.size(); ++r) {
      if (members[r].in.empty()) continue;  // a rank of another process
      const std::vector<const void*>& in = members[r].in;
      const std::vector<void*>& out = members[r].out;
      of_layout[r].in = {in[kLayoutAndDispatchTopkIdx]};
      of_layout[r].out.assign(out.begin(), out.begin() + kNumLayoutOut);
      of_dispatch[r].in = {
          in[kLayoutAndDispatchX],          out[kLayoutRecvSrc],    out[kLayoutRecvOrder],
          out[kLayoutRecvOffsets],          out[kLayoutGroupSizes], in[kLayoutAndDispatchXScales],
          in[kLayoutAndDispatchTopkWeights]};
      of_dispatch[r].out.assign(out.begin() + kNumLayoutOut, out.end());
    }
    layout_ = MakeLayoutOp(layout, of_layout);
    dispatch_ = MakeDispatchOp(dispatch, of_dispatch);
  }

  void Prepare(const PeerMemory& peers) override {
    layout_->Prepare(peers);
    dispatch_->Prepare(peers);
  }

  // The layout's words, then dispatch's.
  std::vector<uint64_t> Published(int64_t rank) const override {
    std::vector<uint64_t> words = layout_->Published(rank);
    for (uint64_t word : dispatch_->Published(rank)) words.push_back(word);
    return words;
  }

  MaybeFailure Finish(const PeerMemory& peers) override {
    if (MaybeFailure failure = layout_->Finish(peers)) return failure;
    return dispatch_->Finish(PublishedFrom(peers, kNumLayoutPublished, num_ranks_));
  }

 private:
  const int64_t num_ranks_;
  std::unique_ptr<CollectiveOp> layout_, dispatch_;
};

}  // namespace

std::unique_ptr<CollectiveOp> MakeLayoutAndDispatchOp(const LayoutSizes& layout,
                                                      const DispatchSizes& dispatch,
                                                      const Members& members) {
  return std::make_unique<LayoutAndDispatchOp>(layout, dispatch, members);
}

}  // namespace jax_ep::cpu
