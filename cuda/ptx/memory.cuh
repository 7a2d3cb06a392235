// Loads and stores with a stated order and scope: one instruction a function, op_order_scope.
#ifndef JAX_EP_CUDA_PTX_MEMORY_CUH_
#define JAX_EP_CUDA_PTX_MEMORY_CUH_

#include <cstdint>

namespace jax_ep::gpu {

__device__ inline void st_release_sys(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ inline void st_relaxed_sys(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
// Sixteen bytes as one access.
__device__ inline void st_release_sys_b128(void* address, uint64_t low, uint64_t high) {
  asm volatile(
      "{\n.reg .b128 both;\n"
      "mov.b128 both, {%1, %2};\n"
      "st.release.sys.global.b128 [%0], both;\n}" ::"l"(address),
      "l"(low), "l"(high)
      : "memory");
}
__device__ inline void st_relaxed_sys_b128(void* address, uint64_t low, uint64_t high) {
  asm volatile(
      "{\n.reg .b128 both;\n"
      "mov.b128 both, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], both;\n}" ::"l"(address),
      "l"(low), "l"(high)
      : "memory");
}
__device__ inline void ld_relaxed_sys_b128(const void* address, uint64_t& low, uint64_t& high) {
  asm volatile(
      "{\n.reg .b128 both;\n"
      "ld.relaxed.sys.global.b128 both, [%2];\n"
      "mov.b128 {%0, %1}, both;\n}"
      : "=l"(low), "=l"(high)
      : "l"(address)
      : "memory");
}
__device__ inline void ld_acquire_sys_b128(const void* address, uint64_t& low, uint64_t& high) {
  asm volatile(
      "{\n.reg .b128 both;\n"
      "ld.acquire.sys.global.b128 both, [%2];\n"
      "mov.b128 {%0, %1}, both;\n}"
      : "=l"(low), "=l"(high)
      : "l"(address)
      : "memory");
}
__device__ inline uint64_t ld_acquire_sys(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline uint64_t ld_relaxed_sys(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline uint64_t ld_relaxed_gpu_u64(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline uint32_t ld_acquire_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline uint32_t ld_relaxed_gpu(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ inline uint32_t atom_add_acq_rel_gpu(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(address), "r"(value)
               : "memory");
  return old;
}
__device__ inline uint64_t atom_add_acq_rel_gpu(uint64_t* address, uint64_t value) {
  uint64_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(address), "l"(value)
               : "memory");
  return old;
}
__device__ inline uint64_t atom_add_relaxed_gpu(uint64_t* address, uint64_t value) {
  uint64_t old;
  asm volatile("atom.add.relaxed.gpu.global.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(address), "l"(value)
               : "memory");
  return old;
}
__device__ inline void red_add_relaxed_gpu(uint64_t* address, uint64_t value) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ inline uint64_t atom_cas_relaxed_gpu(uint64_t* address, uint64_t expected,
                                                uint64_t value) {
  uint64_t old;
  asm volatile("atom.cas.relaxed.gpu.global.b64 %0, [%1], %2, %3;"
               : "=l"(old)
               : "l"(address), "l"(expected), "l"(value)
               : "memory");
  return old;
}
// On a word that another device changes too.
__device__ inline uint64_t atom_max_relaxed_sys(uint64_t* address, uint64_t value) {
  uint64_t old;
  asm volatile("atom.max.relaxed.sys.global.u64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(address), "l"(value)
               : "memory");
  return old;
}
__device__ inline uint64_t atom_or_relaxed_sys(uint64_t* address, uint64_t value) {
  uint64_t old;
  asm volatile("atom.or.relaxed.sys.global.b64 %0, [%1], %2;"
               : "=l"(old)
               : "l"(address), "l"(value)
               : "memory");
  return old;
}
__device__ inline void st_release_cta_shared(int32_t* address, int32_t value) {
  asm volatile("st.release.cta.shared::cta.s32 [%0], %1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(address))),
               "r"(value)
               : "memory");
}
__device__ inline int32_t ld_acquire_cta_shared(const int32_t* address) {
  int32_t value;
  asm volatile("ld.acquire.cta.shared::cta.s32 %0, [%1];"
               : "=r"(value)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address)))
               : "memory");
  return value;
}
// Sixteen bytes into shared memory, past the first-level cache; for the thread itself.
__device__ inline void copy_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ inline void wait_copies_async() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ inline void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }
__device__ inline uint64_t globaltimer_ns() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
  return now;
}

// A peer's data that no cache of this device may hold from an earlier call.
__device__ inline int32_t ld_relaxed_sys_i32(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_PTX_MEMORY_CUH_
