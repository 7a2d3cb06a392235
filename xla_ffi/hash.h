// A 64-bit hash of small numbers, the same in every process.
#ifndef JAX_EP_XLA_FFI_HASH_H_
#define JAX_EP_XLA_FFI_HASH_H_

#include <cstdint>
#include <string_view>

namespace jax_ep {

inline uint64_t Mix(uint64_t hash, uint64_t word) {  // the finaliser of splitmix64 on a running sum
  hash += 0x9e3779b97f4a7c15 + word;
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
  return hash ^ (hash >> 31);
}

inline uint64_t HashText(uint64_t hash, std::string_view text) {
  for (char c : text) hash = Mix(hash, static_cast<unsigned char>(c));
  return hash;
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_HASH_H_
