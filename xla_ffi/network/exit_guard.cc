#include "xla_ffi/network/exit_guard.h"

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

namespace jax_ep {
namespace {

std::atomic<int> g_num_starts{0};
std::atomic<bool (*)()> g_has_open_end{nullptr};

void EndHere(int status, void*) {
  if (g_num_starts < 2 || !g_has_open_end.load()()) return;
  std::fflush(nullptr);
  _exit(status);
}

}  // namespace

void GuardExit(bool (*has_open_end)()) {
  g_has_open_end = has_open_end;
  ++g_num_starts;
  on_exit(EndHere, nullptr);  // which are called from the last one registered to the first
}

}  // namespace jax_ep
