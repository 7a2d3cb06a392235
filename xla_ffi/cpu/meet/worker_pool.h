// Threads of our own for row copies and for telling callers that they are done.
//
// A completion may run the caller's continuation, and that may block until another rank's
// completion has run (XLA's own collectives do). A pool of fixed size can therefore deadlock, so
// this one starts a thread whenever no idle one is left, and lets threads go after a quiet while.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_WORKER_POOL_H_
#define JAX_EP_XLA_FFI_CPU_MEET_WORKER_POOL_H_

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

namespace jax_ep::cpu {

class WorkerPool {
 public:
  // The process's pool. Never destroyed: its threads may outlive main().
  static WorkerPool& Get();

  // Runs `task` on a thread of the pool, never on the calling one. Where the system gives no more
  // threads the task waits for one that exists; std::system_error if there is none at all.
  void Run(std::function<void()> task);

  // Calls fn(i) for i in [0, count) on this thread and up to `hardware threads - 1` others;
  // returns when all have returned, and throws what the first one threw. `fn` must not block.
  void ParallelFor(int64_t count, const std::function<void(int64_t)>& fn);

 private:
  void Loop();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  int64_t num_threads_ = 0;
  int64_t num_idle_ = 0;
};

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_WORKER_POOL_H_
