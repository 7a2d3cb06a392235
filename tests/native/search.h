// Every state that a model's steps lead to, each once.
#ifndef JAX_EP_TESTS_NATIVE_SEARCH_H_
#define JAX_EP_TESTS_NATIVE_SEARCH_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <unordered_set>

namespace jax_ep::test {

// State is plain bytes without padding.
template <typename State>
class Search {
 public:
  void Visit(const State& state) {
    uint64_t hash = 0xcbf29ce484222325u;  // a collision hides a state, once in 10^5 runs
    const auto* bytes = reinterpret_cast<const uint8_t*>(&state);
    for (size_t i = 0; i < sizeof state; ++i) {
      hash = (hash ^ bytes[i]) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 29;
    }
    if (seen_.insert(hash).second) left_.push_back(state);
  }
  // Calls expand(state), which visits what follows, until that returns a verdict other than 0.
  template <typename Expand>
  int Run(const Expand& expand) {
    int verdict = 0;
    while (!left_.empty() && verdict == 0) {
      const State state = left_.front();
      left_.pop_front();
      verdict = expand(state);
    }
    return verdict;
  }
  size_t num_states() const { return seen_.size(); }

 private:
  std::unordered_set<uint64_t> seen_;
  std::deque<State> left_;
};

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_NATIVE_SEARCH_H_
