// Which device is which rank of which expert-parallel group.
#ifndef JAX_EP_XLA_FFI_GROUPS_H_
#define JAX_EP_XLA_FFI_GROUPS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace jax_ep {

// A device is one number, its member number: process << 32 | JAX's id of it.
constexpr int64_t process_of(int64_t member) { return member >> 32; }
constexpr int64_t device_id_of(int64_t member) { return member & 0xffffffff; }

// The members of all groups of a mesh, group by group, ranks ascending, as a program carries them:
// as a number of mixed radix, so that its size follows the mesh's shape and not the number of its
// devices. The i-th member, i = (.. (b * sizes[0] + d[0]) * sizes[1] + ..) + d[last], is
// bases[b] + d[0] * strides[0] + d[1] * strides[1] + .. . Devices in no order at all have a base
// each and no sizes. jax_ep/group.py makes it.
class Groups {
 public:
  struct Place {
    int64_t group, rank;
  };

  Groups() = default;
  // The numbers must have no Problem.
  Groups(std::vector<int64_t> bases, std::vector<int64_t> sizes, std::vector<int64_t> strides,
         int64_t num_ranks);

  // What is wrong with such numbers, if anything.
  static std::optional<std::string> Problem(const std::vector<int64_t>& bases,
                                            const std::vector<int64_t>& sizes,
                                            const std::vector<int64_t>& strides, int64_t num_ranks);

  int64_t num_ranks() const { return num_ranks_; }
  int64_t num_groups() const { return num_members_ / num_ranks_; }

  int64_t MemberAt(int64_t group, int64_t rank) const;

  // All of them, group by group.
  std::vector<int64_t> Members() const;

  // Nothing if it is in no group. Takes no time that grows with the number of devices, if they have
  // an order.
  std::optional<Place> Find(int64_t member) const;

 private:
  struct Digit {
    int64_t size, stride;
    int64_t weight;     // of the digit in the number
    int64_t low, high;  // of what the digits of smaller strides can add
  };
  // The number of `rest` in the digits from the d-th of by_stride_ on; -1 if it has none.
  int64_t Index(int64_t rest, size_t d) const;

  std::vector<int64_t> bases_;
  std::vector<Digit> digits_;     // the last one counts singly
  std::vector<Digit> by_stride_;  // the same, large strides first
  int64_t num_ranks_ = 1, num_members_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_GROUPS_H_
