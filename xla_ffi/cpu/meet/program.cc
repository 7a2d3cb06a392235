#include "xla_ffi/cpu/meet/program.h"

#include <atomic>
#include <map>
#include <thread>
#include <utility>

#include "xla_ffi/hash.h"

namespace jax_ep::cpu {
namespace {

struct Thread {
  std::shared_ptr<Program> builds;
  bool ends_programs = false;
};

std::mutex g_threads_mutex;  // taken before a program's
std::map<std::thread::id, Thread>& g_threads = *new std::map<std::thread::id, Thread>;
uint64_t g_next_program_id = 1;
std::atomic<uint64_t> g_next_site_id{1};

}  // namespace

Program::Place Program::Append(uint64_t signature) {
  std::lock_guard<std::mutex> threads_lock(g_threads_mutex);
  std::shared_ptr<Program>& program = g_threads[std::this_thread::get_id()].builds;
  if (program != nullptr) {
    std::lock_guard<std::mutex> lock(program->mutex_);
    if (!program->closed_) {
      program->signatures_.push_back(signature);
      return {program, static_cast<int64_t>(program->signatures_.size()) - 1};
    }
  }
  program = std::make_shared<Program>(g_next_program_id++);
  program->signatures_.push_back(signature);
  return {program, 0};
}

void Program::End() {
  std::lock_guard<std::mutex> lock(g_threads_mutex);
  g_threads[std::this_thread::get_id()].ends_programs = true;
  for (auto& [id, thread] : g_threads) {
    if (id == std::this_thread::get_id() || !thread.ends_programs) thread.builds = nullptr;
  }
}

Program::Name Program::Close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  uint64_t hash = 0;
  for (uint64_t signature : signatures_) hash = Mix(hash, signature);
  return {hash, static_cast<int64_t>(signatures_.size())};
}

std::shared_ptr<const CallSite> MakeCallSite(std::string op, uint64_t signature, int64_t num_ranks,
                                             const std::vector<int64_t>& members) {
  auto site = std::make_shared<CallSite>();
  site->op = std::move(op);
  site->id = g_next_site_id++;
  site->place = Program::Append(signature);
  site->num_ranks = num_ranks;
  for (int64_t member : members) {
    site->rank_process.push_back(member >> 32);
    site->rank_device.push_back(member & 0xffffffff);
    site->devices_hash += Mix(0, static_cast<uint64_t>(member));
  }
  return site;
}

}  // namespace jax_ep::cpu
