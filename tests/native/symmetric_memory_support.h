// What the tests of the CUDA backend's host side share.
#ifndef JAX_EP_TESTS_NATIVE_SYMMETRIC_MEMORY_SUPPORT_H_
#define JAX_EP_TESTS_NATIVE_SYMMETRIC_MEMORY_SUPPORT_H_

#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/native/check.h"
#include "tests/native/fake_cuda.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep::test {

inline constexpr size_t kPoolBytes = fake_cuda::kGranularity;

inline SymmetricMemory& Memory() { return SymmetricMemory::Get(); }

// Maps new VMM memory that device 0 may use.
inline void MapNew(CUdeviceptr at) {
  CUmemGenericAllocationHandle handle;
  CUmemAccessDesc own{};
  CHECK(fake_cuda::MemCreate(&handle, kPoolBytes, nullptr, 0) == CUDA_SUCCESS);
  CHECK(fake_cuda::MemMap(at, kPoolBytes, 0, handle, 0) == CUDA_SUCCESS);
  CHECK(fake_cuda::MemSetAccess(at, kPoolBytes, &own, 1) == CUDA_SUCCESS);
  fake_cuda::MemRelease(handle);
}

// XLA's memory pool on device 0: a reservation of addresses, made of several mappings.
inline char* MakePool(int num_mappings = 1) {
  CUdeviceptr at;
  CHECK(fake_cuda::MemAddressReserve(&at, kPoolBytes * num_mappings, 0, 0, 0) == CUDA_SUCCESS);
  for (int i = 0; i < num_mappings; ++i) MapNew(at + kPoolBytes * i);
  return reinterpret_cast<char*>(at);
}

inline uint64_t Address(const void* p) { return reinterpret_cast<uint64_t>(p); }

inline CudaSiteState Site(std::vector<int64_t> members, int num_ranks) {
  CudaSiteState site;
  site.op = "jax_ep_test";
  site.groups = Groups(std::move(members), {}, {}, num_ranks);
  site.operation = 7;
  return site;
}

struct View : gpu::GroupView {
  View(const std::vector<int64_t>& members, int ordinal) : gpu::GroupView{} {
    const auto error = Memory().FillGroup(members.data(), static_cast<int>(members.size()), ordinal,
                                          this, &region);
    if (error) std::fprintf(stderr, "%s\n", error->c_str());
    CHECK(!error);
  }
  StagingRegion region;
};

inline std::string Thrown(const std::function<void()>& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

inline bool Contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "'%s' is not in '%s'\n", part.c_str(), text.c_str());
  return false;
}

inline int NumDescriptors() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

// symmetric_processes_test.cc
void RunTestsOfTwoProcesses();
// network_groups_test.cc
void RunTestsOfNetworkGroups();

// Runs a test in a process of its own; ends this one if it fails.
inline void Run(const char* name, const std::function<void()>& test) {
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) {
    alarm(120);
    test();
    std::_Exit(0);
  }
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    std::fprintf(stderr, "%s failed\n", name);
    std::_Exit(1);
  }
  std::printf("%s: right\n", name);
  std::fflush(stdout);
}

}  // namespace jax_ep::test

#endif  // JAX_EP_TESTS_NATIVE_SYMMETRIC_MEMORY_SUPPORT_H_
