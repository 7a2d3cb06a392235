// What a process says once of ids without an expert, on either platform: such ids are legal, and
// hardly what somebody meant.
#ifndef JAX_EP_XLA_FFI_INVALID_IDS_H_
#define JAX_EP_XLA_FFI_INVALID_IDS_H_

#include <cstdint>
#include <string>

namespace jax_ep {

inline std::string InvalidIdsText(int64_t rank, int64_t num_invalid, int64_t num_experts) {
  return "topk_idx of rank " + std::to_string(rank) + " has " + std::to_string(num_invalid) +
         " ids that are neither -1 nor in [0, num_experts = " + std::to_string(num_experts) +
         "): they are not routed. layout.num_invalid counts them, check_ids=True makes them an "
         "error. This is said once.";
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_INVALID_IDS_H_
