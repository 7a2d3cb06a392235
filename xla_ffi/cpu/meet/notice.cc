#include "xla_ffi/cpu/meet/notice.h"

#include <chrono>
#include <cstdio>
#include <mutex>
#include <optional>

#include "xla_ffi/cpu/meet/clock.h"

namespace jax_ep::cpu {

void Notice(const std::string& line) {
  static std::mutex mutex;
  static std::optional<Clock::time_point> last;
  std::lock_guard<std::mutex> lock(mutex);
  const Clock::time_point now = Clock::now();
  if (last && now - *last < std::chrono::seconds(30)) return;
  last = now;
  std::fprintf(stderr, "jax_ep: %s\n", line.c_str());
}

}  // namespace jax_ep::cpu
