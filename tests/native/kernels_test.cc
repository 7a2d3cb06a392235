// The kernels through cuda/launch.h, without XLA or Python, against a plain oracle on the host.
//
//   kernels_test [--ranks=1,2,4,8] [--small] [--slots] [--control]
//
// The ranks of a group are streams of this process on one GPU. Each has its own control block and
// buffers; all lie in one address space, so PeerView.shift is 0. Kernels of different ranks wait
// for each other, so the grids of all ranks together must fit the GPU: each gets its share of the
// SMs, and a first test finds out whether kernels of different streams run together at all (under a
// tool that serialises them only one rank can be tested).
//
// --slots: of slots only what shows that their protocol is needed: for builds that lack some of it.
//
// Exit codes: 0 all right; 3 a result was wrong, as it must be with --control, which spoils one
// number of each result before it is compared; 1 anything else.
#include "tests/native/kernels_test.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "tests/native/check_cuda.h"
#include "tests/native/kernels_compare.h"
#include "tests/native/kernels_pairs.h"
#include "tests/native/kernels_waits.h"

namespace {

using namespace jax_ep::gpu::test;

}  // namespace

int main(int argc, char** argv) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // a queue for every stream
  std::vector<int> ranks = {1, 2, 3, 4, 8};
  bool small = false, slots_only = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--small") {
      small = true;
    } else if (argument == "--slots") {
      slots_only = true;
    } else if (argument == "--control") {
      g_tally.control = true;
    } else if (argument.rfind("--ranks=", 0) == 0) {
      ranks.clear();
      for (const char* at = argument.c_str() + 8; *at != '\0';) {
        char* end = nullptr;
        ranks.push_back(static_cast<int>(std::strtol(at, &end, 10)));
        if (end == at || ranks.back() < 1 || ranks.back() > kMaxRanks) {
          std::printf("ranks are 1 to %d, with commas\n", kMaxRanks);
          return 1;
        }
        at = *end == ',' ? end + 1 : end;
      }
    } else {
      std::printf("unknown argument %s\n", argv[i]);
      return 1;
    }
  }
  int num_sms = 0;
  CHECK_CUDA(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, 0));
  CHECK_CUDA(jax_ep::gpu::PrepareKernels());
  CHECK_CUDA(cudaDeviceSynchronize());
  const Group group;
  const bool run_together = KernelsRunTogether(group.stream(0), group.stream(1));
  if (!run_together) {
    std::printf("NOTE: kernels of different streams do not run together here: one rank only\n");
    ranks = {1};
  }
  uint64_t seed = 1;
  int num_runs = 0;
  const int slot_ranks = *std::max_element(ranks.begin(), ranks.end());
  if (slots_only) {
    if (run_together) TestSlotReuse();
    TestSlots(4, slot_ranks, num_sms / kMaxRanks - 1, seed);
    ranks.clear();
  }
  for (const int num_ranks : ranks) {
    for (const Case& c : Cases(small)) {
      const Data d = MakeData(c, num_ranks, seed);
      // All ranks' blocks fit, with SMs to spare; few, odd, and as many as there are.
      for (const int sms : {1, 5, num_sms / num_ranks - 1}) {
        if (small && sms != 5) continue;
        RunCase(group, d, sms, seed++);
        RunForms(group, d, sms, seed++);
        if (sms > 1) RunSumsNotExpanded(group, d, sms, seed++);
        ++num_runs;
      }
    }
  }
  if (!slots_only) {
    TestPairs();
    TestSlots(small ? 4 : 40, slot_ranks, num_sms / kMaxRanks - 1, seed);
    TestSlotFailures();
    TestStall(4);
    TestBreakOnTheWay(700, 0);
    TestBreakOnTheWay(700, 100);
    TestBreakOnTheWay(20000, 100);  // and a layout that reads ids again
    TestShutDoor();
    if (run_together) {
      TestSlotReuse();
      TestBreakBeforeTheEnd();
      TestDeath();
      TestOtherGroup();
      TestMemoryAfterTheEnd();
      TestWaitForWhoIsInside();
      Group again;
      TestTwoAtOnce(again);
      again.SetUpAgain();
      RunCase(again, MakeData(Cases(true)[2], 2, seed), 5, seed);
    }
  }
  if (g_tally.num_wrong > 0) {
    std::printf("%d wrong of %d comparisons\n", g_tally.num_wrong, g_tally.num_compared);
    return 3;
  }
  if (g_tally.control) {
    std::printf("nothing was seen to be wrong\n");
    return 1;
  }
  std::printf("OK: %d results of %d runs of the kernels, of up to %d ranks\n", g_tally.num_compared,
              num_runs, slot_ranks);
  return 0;
}
