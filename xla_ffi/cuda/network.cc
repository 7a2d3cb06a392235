#include "xla_ffi/cuda/network.h"

#include <algorithm>
#include <set>
#include <utility>

#include "cuda/network/rail/combine.h"
#include "xla_ffi/groups.h"
#include "xla_ffi/memory/driver.h"
#include "xla_ffi/memory/symmetric_memory.h"

namespace jax_ep {
namespace {

std::string AtMost(const std::string& what, int64_t most, int64_t got) {
  return "over the network " + what + " must be at most " + std::to_string(most) + "; got " +
         std::to_string(got);
}

constexpr char kLargerHeap[] =
    ". Pass a larger jax_ep.initialize(heap_bytes=...) in every process, after jax_ep.finalize()";

std::string TooLongRows(const std::string& name, const gpu::RailMemory& at,
                        const gpu::ChunkFormat& format) {
  return AtMost("the bytes of a row of " + name,
                at.slot_bytes - format.num_bytes(1) + format.row_bytes, format.row_bytes) +
         kLargerHeap;
}

}  // namespace

Network& Network::Get() {
  static Network* const network = new Network;
  return *network;
}

void Network::Join(const gpu::NetworkPart& part, const std::vector<std::string>& hosts,
                   int64_t ranks_per_node, bool has_slots) {
  if (part.control_bytes != sizeof(gpu::ControlBlock) ||
      part.view_bytes != sizeof(gpu::GroupView)) {
    Throw("jax_ep._nvshmem and jax_ep._cuda are of different builds");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  part_ = part;
  node_of_process_.clear();
  for (const std::string& host : hosts) {
    node_of_process_.push_back(std::find(hosts.begin(), hosts.end(), host) - hosts.begin());
  }
  ranks_per_node_ = ranks_per_node;
  has_slots_ = has_slots;
  members_.clear();
  found_.reset();
  has_refused_group_ = false;
}

void Network::Leave() {
  std::lock_guard<std::mutex> lock(mutex_);
  part_.reset();
  found_.reset();
}

int Network::RanksPerNode(const int64_t* members, int num_ranks) const {
  if (ranks_per_node_ != 0) {
    if (ranks_per_node_ >= num_ranks) return num_ranks;
    return num_ranks % ranks_per_node_ == 0 ? static_cast<int>(ranks_per_node_) : 0;
  }
  const auto node_of = [&](int r) { return node_of_process_[process_of(members[r])]; };
  int size = 1;
  while (size < num_ranks && node_of(size) == node_of(0)) ++size;
  std::set<int64_t> nodes;
  for (int r = 0; r < num_ranks; ++r) {
    if (node_of(r) != node_of(r / size * size)) return 0;
    if (r % size == 0 && !nodes.insert(node_of(r)).second) return 0;
  }
  return num_ranks % size == 0 ? size : 0;
}

std::optional<std::string> Network::Find(const int64_t* members, int num_ranks, int rank,
                                         std::optional<NetworkCall>* call) {
  call->reset();
  std::lock_guard<std::mutex> lock(mutex_);
  if (!part_) return std::nullopt;
  if (found_ && found_->nodes.rank == rank &&
      std::equal(members, members + num_ranks, members_.begin(), members_.end())) {
    *call = found_;
    return std::nullopt;
  }
  for (int r = 0; r < num_ranks; ++r) {
    const int64_t process = process_of(members[r]);
    if (process < 0 || process >= static_cast<int64_t>(node_of_process_.size())) {
      return "rank " + std::to_string(r) + " is of process " + std::to_string(process) +
             ", which is not in this job";
    }
  }
  const int on_node = RanksPerNode(members, num_ranks);
  if (on_node == num_ranks) return std::nullopt;
  for (int r = 0; r < num_ranks; ++r) {
    if (process_of(members[r]) < gpu::kMaxProcesses) continue;
    return AtMost("the number of a process", gpu::kMaxProcesses - 1, process_of(members[r]));
  }
  if (on_node == 0) {
    return "the group must have as many ranks, one after the other, on each of its nodes";
  }
  if (num_ranks > gpu::kMaxNetworkRanks) {
    return AtMost("the group's ranks", gpu::kMaxNetworkRanks, num_ranks);
  }
  std::set<int64_t> processes;
  for (int r = 0; r < num_ranks; ++r) processes.insert(process_of(members[r]));
  if (static_cast<int>(processes.size()) != num_ranks) {
    return "over the network each rank must be a process of its own";
  }
  const std::vector<int64_t> group(members, members + num_ranks);
  // Once there has been another, not even the first: ranks that are in the other alone do not refuse
  // it, and what they send may lie in the region.
  has_refused_group_ |= !members_.empty() && members_ != group;
  if (has_refused_group_) {
    found_.reset();
    return "another group of ranks, or the same in another order, has gone over the network since "
           "jax_ep.initialize(), whose memory is for one. Give all meshes the same groups across "
           "nodes, or call jax_ep.finalize() and jax_ep.initialize() in every process between";
  }
  bool is_enough = false;
  gpu::NetworkRegion region =
      gpu::MakeNetworkRegion(part_->region_bytes, num_ranks, on_node, has_slots_, &is_enough);
  if (!is_enough) {  // with slots
    region = gpu::MakeNetworkRegion(part_->region_bytes, num_ranks, on_node, false, &is_enough);
  }
  if (!is_enough) {
    return "the group needs " + std::to_string(gpu::least_region_bytes(num_ranks, on_node)) +
           " bytes of NVSHMEM's heap, but it has " + std::to_string(part_->region_bytes) +
           " for that, three quarters of all" + kLargerHeap;
  }
  if (members_.empty()) SymmetricMemory::Get().SetGroupAcrossNodes(group);
  members_ = group;
  char* const at = part_->region;
  NetworkCall& made = found_.emplace();
  made.part = *part_;
  made.region = region;
  made.has_slots = has_slots_;
  made.node = rank / on_node;
  made.nodes = {region.given_up(at), region.has_told(at), rank, num_ranks};
  made.group.layout = {region.layout_memory(at), region.layout, region.epoch(at)};
  made.group.dispatch = {region.rail, region.dispatch_memory(at), region.dispatch_chunks_of(at),
                         made.node, on_node};
  made.group.combine = {region.rail, region.combine_memory(at), region.combine_chunks_of(at),
                        made.node, on_node};
  made.group.slots = {region.slots, region.slots_memory(at), region.slots_epoch(at)};
  std::fill(std::begin(made.group.pe), std::end(made.group.pe), uint16_t{0});
  for (int r = 0; r < num_ranks; ++r) {
    made.group.pe[r] = static_cast<uint16_t>(process_of(members[r]));
  }
  *call = made;
  return std::nullopt;
}

std::optional<std::string> NetworkProblem(const NetworkCall& network, const LayoutCall& call) {
  const TableSizes& sizes = call.sizes;
  const gpu::NetworkLayoutMemory& at = network.region.layout;
  if (sizes.num_experts % 2 != 0) {  // rows of counts are multiples of 8 bytes
    return "over the network num_experts must be even; got " + std::to_string(sizes.num_experts);
  }
  const int64_t num_ids = sizes.num_tokens * sizes.top_k;
  if (num_ids > at.max_ids) return AtMost("T * K", at.max_ids, num_ids) + kLargerHeap;
  if (call.room.capacity > at.max_capacity) {
    return AtMost("the capacity", at.max_capacity, call.room.capacity) + kLargerHeap;
  }
  return std::nullopt;
}

std::optional<std::string> NetworkProblem(const NetworkCall& network, const DispatchCall& call) {
  if (call.quantization != QuantizationKind::kNone &&
      call.quantization != QuantizationKind::kGivenScales) {
    return "the program quantises rows for a group on one node: compile it where it runs";
  }
  const gpu::RailMemory& at = network.region.rail;
  const gpu::ChunkFormat format = gpu::dispatch_chunks(
      call.sizes.top_k,
      gpu::WireRowBytes(call.x.row_bytes(), call.x.num_channels, call.num_scales));
  gpu::rail::Plan plan;
  if (!gpu::rail::MakePlan(at, format, call.x.row_bytes(), gpu::rail::kMaxPairs, &plan)) {
    return TooLongRows("x", at, format);
  }
  return std::nullopt;
}

std::optional<std::string> NetworkProblem(const NetworkCall& network, const CombineCall& call) {
  const gpu::RailMemory& at = network.region.rail;
  if (at.num_nodes > gpu::rail::kMaxCombineNodes) {
    return AtMost("the nodes of combine", gpu::rail::kMaxCombineNodes, at.num_nodes);
  }
  const int32_t on_node = network.region.ranks_per_node;
  if (on_node > gpu::rail::kMaxRanksOfNode) {
    return AtMost("the ranks of a node in combine", gpu::rail::kMaxRanksOfNode, on_node);
  }
  const int64_t most_tokens =
      gpu::kMaxUnitsPerBlock / network.region.num_ranks - gpu::rail::kTokensAtOnce;
  if (call.sizes.num_tokens > most_tokens) {
    return AtMost("T of combine", most_tokens, call.sizes.num_tokens);
  }
  const gpu::ChunkFormat format =
      gpu::combine_chunks(call.sizes.top_k, call.y.row_bytes(), call.values.data != nullptr);
  if (format.num_rows(at.slot_bytes) < 1) return TooLongRows("y", at, format);
  return std::nullopt;
}

}  // namespace jax_ep
