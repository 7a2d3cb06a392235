// What the handlers do before they touch a device: which device is which rank, what makes two calls
// the same, and what the kernels demand. Needs XLA's FFI headers, no CUDA and no GPU.
//
// Groups come on standard input, a line each (test_calls.py): num_ranks, then four lists, each
// after its length: bases, sizes, strides, and all the members that these stand for.
#include "xla_ffi/calls.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/core/limits.h"
#include "tests/native/check.h"
#include "xla_ffi/attributes.h"
#include "xla_ffi/cuda/checks.h"
#include "xla_ffi/groups.h"

namespace {

namespace ffi = xla::ffi;
using jax_ep::Checks;
using jax_ep::Groups;

std::vector<int64_t> ReadList(std::istream& in) {
  size_t size = 0;
  CHECK(in >> size);
  std::vector<int64_t> list(size);
  for (int64_t& value : list) CHECK(in >> value);
  return list;
}

// ---- groups ------------------------------------------------------------------------------------

void CheckGroups(std::istream& in) {
  int64_t num_ranks = 0;
  CHECK(in >> num_ranks);
  const std::vector<int64_t> bases = ReadList(in), sizes = ReadList(in), strides = ReadList(in);
  const std::vector<int64_t> members = ReadList(in);
  CHECK(!Groups::Problem(bases, sizes, strides, num_ranks));
  const Groups groups(bases, sizes, strides, num_ranks);
  const std::set<int64_t> distinct(members.begin(), members.end());
  CHECK(groups.num_ranks() == num_ranks);
  CHECK(groups.num_groups() * num_ranks == static_cast<int64_t>(members.size()));
  for (size_t i = 0; i < members.size(); ++i) {
    const int64_t group = static_cast<int64_t>(i) / num_ranks;
    const int64_t rank = static_cast<int64_t>(i) % num_ranks;
    CHECK(groups.MemberAt(group, rank) == members[i]);
    const auto place = groups.Find(members[i]);
    CHECK(place && place->group == group && place->rank == rank);
    for (int64_t other : {members[i] - 1, members[i] + 1, members[i] + (int64_t{1} << 32)}) {
      CHECK(groups.Find(other).has_value() == (distinct.count(other) != 0));
    }
  }
}

void Problems() {
  CHECK(!Groups::Problem({5}, {}, {}, 1));
  CHECK(!Groups::Problem({0, 9}, {3, 2}, {-1, 4}, 4));
  CHECK(Groups::Problem({}, {}, {}, 1));         // no members
  CHECK(Groups::Problem({0, 1, 2}, {}, {}, 2));  // not a multiple
  CHECK(Groups::Problem({0}, {4}, {}, 2));       // a stride is missing
  CHECK(Groups::Problem({0}, {1}, {1}, 1));      // no digit
  CHECK(Groups::Problem({0}, {4}, {0}, 2));      // all the same
  CHECK(Groups::Problem({0}, {-4}, {1}, 2));
  CHECK(Groups::Problem({0}, {4}, {1}, 0));
  CHECK(Groups::Problem({0}, {1 << 20, 1 << 20}, {1, 1 << 20}, 2));  // too many to count
}

// ---- hashes ------------------------------------------------------------------------------------

// A call with any attribute changed has another hash, whatever the attribute.
template <typename Attributes>
void HashTellsApart(std::set<uint64_t>* seen) {
  const int64_t one[] = {1}, two[] = {2, 3};
  const auto list = [](const auto& values) {
    return ffi::Span<const int64_t>(values, std::size(values));
  };
  Attributes attributes{};
  attributes.member_bases = attributes.member_sizes = attributes.member_strides = list(one);
  const auto is_new = [&](const Attributes& changed) {
    return seen->insert(jax_ep::HashOf(changed)).second;
  };
  CHECK(is_new(attributes));
  CHECK(!is_new(attributes));
  for (auto member :
       {&Attributes::member_bases, &Attributes::member_sizes, &Attributes::member_strides}) {
    Attributes changed = attributes;
    changed.*member = list(two);
    CHECK(is_new(changed));
  }
  // The numbers lie one after the other behind the lists.
  size_t num_numbers = 0;
  attributes.ForEachNumber([&](int64_t) { ++num_numbers; });
  CHECK(num_numbers >= 7);
  CHECK(sizeof(Attributes) == 3 * sizeof(ffi::Span<const int64_t>) + num_numbers * sizeof(int64_t));
  for (size_t i = 0; i < num_numbers; ++i) {
    Attributes changed = attributes;
    (&changed.num_ranks)[i] = 1;
    CHECK(is_new(changed));
  }
}

// ---- what kernels demand -----------------------------------------------------------------------

char* const kAligned = reinterpret_cast<char*>(uintptr_t{1} << 20);

jax_ep::Rows RowsAt(char* data, int64_t num_channels, ffi::DataType type = ffi::F32) {
  jax_ep::Rows rows;
  rows.data = data;
  rows.type = type;
  rows.num_channels = num_channels;
  return rows;
}

template <typename Call>
std::string Complaint(const Call& call) {
  Checks checks("op");
  CheckForKernel(call, &checks);
  return checks.ok() ? "" : checks.error().message();
}

// Each of these rows of the call at an odd address, or of an odd length, is named.
template <typename Call>
void RowsAreChecked(const Call& good,
                    std::initializer_list<std::pair<const char*, jax_ep::Rows Call::*>> rows) {
  CHECK(Complaint(good).empty());
  for (const auto& [name, member] : rows) {
    for (int offset : {1, 2, 4, 8, 15}) {
      Call call = good;
      (call.*member).data = kAligned + offset;
      CHECK(Complaint(call) == "op: " + std::string(name) + " must lie at a multiple of 16 bytes");
    }
    Call call = good;
    (call.*member).num_channels += 1;
    CHECK(Complaint(call) ==
          "op: a row of " + std::string(name) + " must be a multiple of 16 bytes");
  }
  Call call = good;
  call.sizes.top_k = jax_ep::gpu::kMaxTopK + 1;
  CHECK(Complaint(call) == "op: k must be at most 32");
}

void Demands() {
  const jax_ep::TableSizes sizes{2, 4, 2, 6, 8};
  jax_ep::LayoutCall layout{};
  layout.sizes = sizes;
  CHECK(Complaint(layout).empty());
  layout.sizes.num_experts = jax_ep::gpu::kMaxExperts + 2;
  CHECK(Complaint(layout) == "op: num_experts must be at most 1024");

  jax_ep::DispatchCall dispatch{};
  dispatch.sizes = sizes;
  dispatch.x = dispatch.tokens = RowsAt(kAligned, 256);
  using Dispatch = jax_ep::DispatchCall;
  RowsAreChecked(dispatch, {{"x", &Dispatch::x}, {"tokens", &Dispatch::tokens}});
  dispatch.x = dispatch.tokens = RowsAt(kAligned, jax_ep::gpu::kMaxFp8Channels + 128);
  CHECK(Complaint(dispatch).empty());
  dispatch.quantization = jax_ep::QuantizationKind::kFloat32Scales;
  CHECK(Complaint(dispatch) == "op: x must have at most 32768 channels to be quantised");
  dispatch.x = dispatch.tokens = RowsAt(kAligned, 1 << 15, ffi::F8E4M3FN);
  dispatch.quantization = jax_ep::QuantizationKind::kGivenScales;
  dispatch.num_scales = 1 << 12;
  CHECK(Complaint(dispatch).empty());
  dispatch.num_scales = (1 << 12) + 1;
  CHECK(Complaint(dispatch) == "op: a row of x with its scales must be at most 49152 bytes");
  dispatch.num_scales = 1;
  dispatch.x_scales.data = RowsAt(kAligned + 4, 8).data;
  CHECK(Complaint(dispatch) == "op: x_scales must lie at a multiple of 16 bytes");

  jax_ep::CombineCall combine{};
  combine.sizes = sizes;
  combine.ranks_per_node = sizes.num_ranks;
  combine.y = combine.out = combine.partial = RowsAt(kAligned, 8, ffi::BF16);
  using Combine = jax_ep::CombineCall;
  RowsAreChecked(combine,
                 {{"y", &Combine::y}, {"out", &Combine::out}, {"partial", &Combine::partial}});

  jax_ep::CombineGradientCall gradient{};
  gradient.sizes = sizes;
  gradient.g = gradient.y = gradient.d_y = RowsAt(kAligned, jax_ep::gpu::kMaxWeightedRowBytes / 4);
  using Gradient = jax_ep::CombineGradientCall;
  RowsAreChecked(gradient, {{"g", &Gradient::g}, {"y", &Gradient::y}, {"d_y", &Gradient::d_y}});
  gradient.g.num_channels += 4;
  CHECK(Complaint(gradient) == "op: a row of g must be at most 40960 bytes");
}

}  // namespace

int main() {
  int num_groups = 0;
  for (std::string line; std::getline(std::cin, line); ++num_groups) {
    std::istringstream in(line);
    CheckGroups(in);
  }
  CHECK(num_groups > 0);
  Problems();
  std::set<uint64_t> seen;
  HashTellsApart<jax_ep::LayoutAttributes>(&seen);
  HashTellsApart<jax_ep::DispatchAttributes>(&seen);
  HashTellsApart<jax_ep::CombineAttributes>(&seen);
  HashTellsApart<jax_ep::CombineGradientAttributes>(&seen);
  HashTellsApart<jax_ep::LayoutAndDispatchAttributes>(&seen);
  Demands();
  std::printf("%d groupings: right\n", num_groups);
  return 0;
}
