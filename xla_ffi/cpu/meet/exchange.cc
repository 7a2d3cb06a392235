#include "xla_ffi/cpu/meet/exchange.h"

#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "xla_ffi/cpu/meet/process_io.h"

namespace jax_ep::cpu {
namespace {

constexpr size_t kMaxIov = 512;  // rows per system call, below IOV_MAX

}  // namespace

std::string Exchange::Publish(const Likeness& likeness, const CollectiveOp& op,
                              const std::vector<int64_t>& ranks) {
  std::string payload(reinterpret_cast<const char*>(&likeness), sizeof likeness);
  const auto append = [&payload](uint64_t word) {
    payload.append(reinterpret_cast<const char*>(&word), sizeof word);
  };
  for (int64_t rank : ranks) {
    const std::vector<uint64_t> words = op.Published(rank);
    append(static_cast<uint64_t>(rank));
    append(words.size());
    for (uint64_t word : words) append(word);
  }
  return payload;
}

Likeness Exchange::TakePublished(int64_t process, std::string_view payload) {
  Likeness theirs;
  std::memcpy(&theirs, payload.data(), sizeof theirs);
  payload.remove_prefix(sizeof theirs);
  auto& ranks = arrived[process];
  std::vector<uint64_t> words(payload.size() / sizeof(uint64_t));
  std::memcpy(words.data(), payload.data(), words.size() * sizeof(uint64_t));
  for (size_t i = 0; i + 1 < words.size();) {
    const auto rank = static_cast<int64_t>(words[i]);
    const size_t count = words[i + 1];
    ranks[rank].assign(words.begin() + i + 2, words.begin() + i + 2 + count);
    i += 2 + count;
  }
  return theirs;
}

std::string Exchange::ranks_of(int64_t process) const {
  std::string ranks;
  for (size_t r = 0; r < rank_process.size(); ++r) {
    if (rank_process[r] == process) ranks += (ranks.empty() ? "" : ", ") + std::to_string(r);
  }
  return ranks;
}

std::string Exchange::missing() const {
  std::string missing;
  for (size_t r = 0; r < rank_process.size(); ++r) {
    const int64_t p = rank_process[r];
    const bool came = started ? done.count(p) > 0 : arrived.count(p) > 0;
    if (came || others.count(p) == 0) continue;
    missing += (missing.empty() ? "" : ", ") + std::to_string(r) + " (process " +
               std::to_string(p) + ", device " + std::to_string(rank_device[r]) + ")";
  }
  return missing;
}

bool PeerView::is_local(int64_t rank) const {
  return exchange_.others.count(exchange_.rank_process[rank]) == 0;
}

const std::vector<uint64_t>& PeerView::published(int64_t rank) const {
  return exchange_.arrived.at(exchange_.rank_process[rank]).at(rank);
}

MaybeFailure PeerView::Read(int64_t rank, uint64_t address, void* dst, size_t bytes) const {
  if (bytes == 0 || ReadProcess(pid(rank), address, dst, bytes)) return std::nullopt;
  return ReadFailed(rank);
}

MaybeFailure PeerView::ReadRows(int64_t rank, const std::vector<uint64_t>& addresses,
                                size_t row_bytes, void* dst) const {
  std::vector<iovec> remote;
  for (size_t first = 0; first < addresses.size(); first += kMaxIov) {
    const size_t count = std::min(kMaxIov, addresses.size() - first);
    remote.clear();
    for (size_t i = 0; i < count; ++i) {
      remote.push_back({reinterpret_cast<void*>(addresses[first + i]), row_bytes});
    }
    iovec local{static_cast<char*>(dst) + first * row_bytes, count * row_bytes};
    if (!ReadProcess(pid(rank), &local, 1, remote.data(), count, count * row_bytes)) {
      return ReadFailed(rank);
    }
  }
  return std::nullopt;
}

MaybeFailure PeerView::ReadFailed(int64_t rank) const {
  return Failure{FailureCode::kUnavailable, exchange_.op_name + ": reading the rows of rank " +
                                                std::to_string(rank) + " in process " +
                                                std::to_string(exchange_.rank_process[rank]) +
                                                " failed: " + strerror(errno)};
}

}  // namespace jax_ep::cpu
