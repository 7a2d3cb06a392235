// The end of a process that has started NVSHMEM several times, whose handlers are of no use twice.
//   exit_guard_test STARTS (open | ended) (guarded | not)      exits with 7
#include "xla_ffi/network/exit_guard.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

bool g_is_open = true;
int g_num_ends = 0;

// As NVSHMEM's.
void EndBootstrap() {
  if (!g_is_open) return;
  if (++g_num_ends > 1) std::abort();
  std::printf("ended\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 1;
  const bool is_guarded = std::strcmp(argv[3], "guarded") == 0;
  for (int i = 0; i < std::atoi(argv[1]); ++i) {
    if (is_guarded) jax_ep::GuardExit([] { return g_is_open; });
    std::atexit(EndBootstrap);
  }
  g_is_open = std::strcmp(argv[2], "open") == 0;
  std::printf("begun\n");  // still in its buffer
  std::exit(7);
}
