#include "xla_ffi/cpu/meet/worker_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

namespace jax_ep::cpu {
namespace {

constexpr std::chrono::seconds kIdleLifetime{10};

// One ParallelFor. Shared, because a helper may start after the caller has gone home.
struct SharedLoop {
  explicit SharedLoop(int64_t n) : count(n) {}
  const int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t num_done = 0;
  std::exception_ptr error;

  // Takes items until none is left. `fn` is only touched while items remain, so while the caller
  // still waits in ParallelFor.
  void Work(const std::function<void(int64_t)>* fn) {
    int64_t mine = 0;
    std::exception_ptr thrown;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) {
      try {
        (*fn)(i);
      } catch (...) {
        thrown = std::current_exception();
      }
    }
    if (mine == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    if (thrown && !error) error = thrown;
    num_done += mine;
    if (num_done == count) all_done.notify_all();
  }
};

}  // namespace

WorkerPool& WorkerPool::Get() {
  static WorkerPool* const pool = new WorkerPool;
  return *pool;
}

void WorkerPool::Run(std::function<void()> task) {
  std::unique_lock<std::mutex> lock(mutex_);
  queue_.push_back(std::move(task));
  if (static_cast<int64_t>(queue_.size()) <= num_idle_) {
    wake_.notify_one();
    return;
  }
  try {
    std::thread([this] { Loop(); }).detach();
    ++num_threads_;
  } catch (const std::system_error&) {
    if (num_threads_ > 0) return;
    queue_.pop_back();
    throw;
  }
}

void WorkerPool::Loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    while (!queue_.empty()) {
      std::function<void()> task = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      task();
      task = nullptr;  // what it holds is released outside the lock
      lock.lock();
    }
    ++num_idle_;
    const bool woken = wake_.wait_for(lock, kIdleLifetime, [this] { return !queue_.empty(); });
    --num_idle_;
    if (woken) continue;
    --num_threads_;
    return;
  }
}

void WorkerPool::ParallelFor(int64_t count, const std::function<void(int64_t)>& fn) {
  static const int64_t num_threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  if (count <= 0) return;
  auto loop = std::make_shared<SharedLoop>(count);
  const int64_t num_helpers = std::min(num_threads, count) - 1;
  for (int64_t h = 0; h < num_helpers; ++h) {
    try {
      Run([loop, fn = &fn] { loop->Work(fn); });
    } catch (const std::system_error&) {
      break;  // no more threads: this one does the work
    }
  }
  loop->Work(&fn);
  std::unique_lock<std::mutex> lock(loop->mutex);
  loop->all_done.wait(lock, [&] { return loop->num_done == count; });
  if (loop->error) std::rethrow_exception(loop->error);
}

}  // namespace jax_ep::cpu
