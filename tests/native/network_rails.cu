// network_rails: dispatch and combine over rails and the simulated network, ranks as streams of one
// process on one GPU: random cases, call after call in the same memory, with late ranks; ranks that do
// not come; hops that are wrong, which have to be caught.
//   network_rails [--small] [--dispatch | --combine]
#include <algorithm>
#include <cstring>

#include "tests/native/network_rails.h"

namespace jax_ep::gpu::test {
namespace {

__global__ void SpinFor(uint64_t ns) {
  const uint64_t start = globaltimer_ns();
  while (globaltimer_ns() - start < ns) {
  }
}

}  // namespace

void RunCalls(Job& job, int num_calls, std::mt19937_64& rng, const LaunchCall& launch) {
  const auto start = Clock::now();
  const int num_ranks = job.shape().num_ranks;
  std::vector<int> num_launched(static_cast<size_t>(num_ranks), 0);
  for (int num_left = num_calls * num_ranks; num_left > 0;) {
    for (int r = 0; r < num_ranks; ++r) {
      int& call = num_launched[r];
      if (call == num_calls || !job.IsIdle(r, start)) continue;
      if (rng() % static_cast<uint64_t>(num_ranks) == 0) {  // late
        SpinFor<<<1, 1, 0, job.stream(r)>>>(rng() % 4 * 1000 * 1000);
      }
      launch(r, call++);
      --num_left;
    }
  }
  job.Synchronize();
}

void ReportCalls(Job& job, const NetworkModel& model, const char* what, Fault fault, int num_calls,
                 int num_wrong, double seconds) {
  const int num_errors = job.NumErrors();
  const bool is_control = fault != Fault::kNone, is_right = num_wrong + num_errors == 0;
  const bool is_failure = is_right == is_control;
  g_num_failed += is_failure;
  std::printf(
      "%s: %s, seed %llu, %s%s, %s, %d calls: %d rows wrong, %d errors, %llu chunks, %llu out of "
      "order, %.2f s%s\n",
      is_failure ? "FAILED" : "ok", model.name, static_cast<unsigned long long>(model.seed), what,
      kFaultNames[static_cast<int>(fault)], job.shape().name().c_str(), num_calls, num_wrong,
      num_errors, static_cast<unsigned long long>(job.num_chunks()),
      static_cast<unsigned long long>(job.num_out_of_order()), seconds,
      is_control ? " (wrong on purpose)" : "");
  if (is_failure && !is_control) job.Print();
  std::fflush(stdout);
}

void ReportWithoutOne(Job& job, const NetworkModel& model, const char* what, Fault fault,
                      int num_wrong, double seconds) {
  const bool is_control = fault != Fault::kNone;
  const bool is_right = num_wrong == 0 && seconds <= kMostSeconds;
  const bool is_failure = is_right == is_control;
  g_num_failed += is_failure;
  std::printf("%s: %s, %s, a rank that does not come%s, %s: %d ranks not as expected, %.2f s%s\n",
              is_failure ? "FAILED" : "ok", model.name, what, kFaultNames[static_cast<int>(fault)],
              job.shape().name().c_str(), num_wrong, seconds,
              is_control ? " (wrong on purpose)" : "");
  if (is_failure && !is_control) job.Print();
  std::fflush(stdout);
}

}  // namespace jax_ep::gpu::test

int main(int argc, char** argv) {
  using namespace jax_ep::gpu::test;
  // Before CUDA starts: a queue of its own for each stream, or copies wait behind kernels that wait
  // for them; and all kernels at once.
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  const auto has = [&](const char* option) {
    return std::any_of(argv + 1, argv + argc,
                       [&](const char* a) { return !std::strcmp(a, option); });
  };
  Group group;
  if (!has("--combine")) TestRailDispatch(group, has("--small"));
  if (!has("--dispatch")) TestRailCombine(group, has("--small"));
  if (g_num_failed > 0) std::printf("%d FAILED\n", g_num_failed);
  if (g_num_failed == 0) std::printf("OK: all as expected\n");
  return g_num_failed > 0 ? 1 : 0;
}
