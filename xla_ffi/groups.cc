#include "xla_ffi/groups.h"

#include <algorithm>
#include <cstdlib>
#include <limits>

namespace jax_ep {
namespace {

int64_t DivideDown(int64_t a, int64_t b) {  // b > 0
  return a / b - (a % b < 0 ? 1 : 0);
}

}  // namespace

std::optional<std::string> Groups::Problem(const std::vector<int64_t>& bases,
                                           const std::vector<int64_t>& sizes,
                                           const std::vector<int64_t>& strides, int64_t num_ranks) {
  if (sizes.size() != strides.size()) {
    return "member_sizes has " + std::to_string(sizes.size()) +
           " entries, but member_strides has " + std::to_string(strides.size());
  }
  auto num_members = static_cast<int64_t>(bases.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] < 2 || strides[i] == 0 ||
        num_members > std::numeric_limits<int32_t>::max() / sizes[i]) {
      return "member_sizes and member_strides must be at least 2 and not 0, and all sizes below "
             "2^31";
    }
    num_members *= sizes[i];
  }
  if (num_ranks < 1 || num_members < 1 || num_members % num_ranks != 0) {
    return "the attributes tell of " + std::to_string(num_members) +
           " members, expected a positive multiple of num_ranks = " + std::to_string(num_ranks);
  }
  return std::nullopt;
}

Groups::Groups(std::vector<int64_t> bases, std::vector<int64_t> sizes, std::vector<int64_t> strides,
               int64_t num_ranks)
    : bases_(std::move(bases)), digits_(sizes.size()), num_ranks_(num_ranks) {
  num_members_ = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    digits_[i] = {sizes[i], strides[i], num_members_, 0, 0};
    num_members_ *= sizes[i];
  }
  num_members_ *= static_cast<int64_t>(bases_.size());
  by_stride_ = digits_;
  std::sort(by_stride_.begin(), by_stride_.end(),
            [](const Digit& a, const Digit& b) { return std::abs(a.stride) > std::abs(b.stride); });
  int64_t low = 0, high = 0;
  for (size_t i = by_stride_.size(); i-- > 0;) {
    Digit& digit = by_stride_[i];
    digit.low = low;
    digit.high = high;
    (digit.stride < 0 ? low : high) += (digit.size - 1) * digit.stride;
  }
}

int64_t Groups::MemberAt(int64_t group, int64_t rank) const {
  int64_t index = group * num_ranks_ + rank;
  int64_t member = 0;
  for (size_t i = digits_.size(); i-- > 0;) {
    member += index % digits_[i].size * digits_[i].stride;
    index /= digits_[i].size;
  }
  return member + bases_[index];
}

std::vector<int64_t> Groups::Members() const {
  std::vector<int64_t> members;
  for (int64_t i = 0; i < num_members_; ++i) {
    members.push_back(MemberAt(i / num_ranks_, i % num_ranks_));
  }
  return members;
}

std::optional<Groups::Place> Groups::Find(int64_t member) const {
  const auto members_a_base = num_members_ / static_cast<int64_t>(bases_.size());
  for (size_t b = 0; b < bases_.size(); ++b) {
    const int64_t index = Index(member - bases_[b], 0);
    if (index < 0) continue;
    const int64_t i = static_cast<int64_t>(b) * members_a_base + index;
    return Place{i / num_ranks_, i % num_ranks_};
  }
  return std::nullopt;
}

int64_t Groups::Index(int64_t rest, size_t d) const {
  if (d == by_stride_.size()) return rest == 0 ? 0 : -1;
  const Digit& digit = by_stride_[d];
  // The values v of the digit for which the others could add rest - v * stride.
  int64_t step = digit.stride, least = rest - digit.high, most = rest - digit.low;
  if (step < 0) {
    step = -step;
    std::swap(least, most);
    least = -least;
    most = -most;
  }
  const int64_t last = std::min(DivideDown(most, step), digit.size - 1);
  for (int64_t v = std::max<int64_t>(-DivideDown(-least, step), 0); v <= last; ++v) {
    const int64_t index = Index(rest - v * digit.stride, d + 1);
    if (index >= 0) return v * digit.weight + index;
  }
  return -1;
}

}  // namespace jax_ep
