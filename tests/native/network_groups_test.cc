// Groups across nodes on the host: which ones they are, what their kernels get of the region and of this
// node, and what is said of those that cannot be.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/network/region.h"
#include "tests/native/symmetric_memory_support.h"
#include "xla_ffi/cuda/call_site.h"
#include "xla_ffi/cuda/network.h"

namespace jax_ep::test {
namespace {

constexpr int64_t kRegionBytes = int64_t{64} << 20;
char* const kRegion = reinterpret_cast<char*>(uintptr_t{1} << 40);  // nobody looks at it

gpu::NetworkPart Part(int num_processes, int64_t region_bytes = kRegionBytes) {
  gpu::NetworkPart part{};
  part.control_bytes = sizeof(gpu::ControlBlock);
  part.view_bytes = sizeof(gpu::GroupView);
  part.region = kRegion;
  part.region_bytes = region_bytes;
  part.num_processes = num_processes;
  return part;
}

// The first device of each process.
std::vector<int64_t> MembersOf(std::vector<int64_t> processes) {
  for (int64_t& process : processes) process <<= 32;
  return processes;
}

struct Found {
  std::string problem;
  std::optional<NetworkCall> call;
};
Found Find(const std::vector<int64_t>& processes, int rank) {
  Found found;
  const std::vector<int64_t> members = MembersOf(processes);
  found.problem = Network::Get()
                      .Find(members.data(), static_cast<int>(members.size()), rank, &found.call)
                      .value_or("");
  return found;
}

std::vector<std::string> Hosts(const std::vector<int>& numbers) {
  std::vector<std::string> hosts;
  for (int number : numbers) hosts.push_back("host" + std::to_string(number));
  return hosts;
}
// Of each process its host; or how many ranks are a node.
void JoinAgain(const std::vector<int>& hosts, int64_t ranks_per_node = 0, bool has_slots = false) {
  Network::Get().Leave();
  Network::Get().Join(Part(static_cast<int>(hosts.size())), Hosts(hosts), ranks_per_node,
                      has_slots);
}
int RanksOfNode(const std::vector<int64_t>& processes) {
  const Found found = Find(processes, 0);
  CHECK(found.problem.empty());
  return found.call ? found.call->region.ranks_per_node : static_cast<int>(processes.size());
}
bool IsUneven(const std::vector<int64_t>& processes) {
  return Contains(Find(processes, 0).problem, "as many ranks, one after the other, on each of its");
}

void WhichSpanNodes() {
  CHECK(!Find({0, 1}, 0).call && Find({0, 1}, 0).problem.empty());  // without a network
  const std::vector<int> two_hosts{0, 0, 0, 0, 1, 1, 1, 1};
  JoinAgain(two_hosts);
  CHECK(RanksOfNode({0, 1, 2, 3, 4, 5, 6, 7}) == 4);
  // One region, one group: another is refused, also in another order; those on a node are not.
  CHECK(RanksOfNode({0, 1, 2, 3}) == 4 && RanksOfNode({6, 5}) == 2 && RanksOfNode({3}) == 1);
  CHECK(Contains(Find({0, 4}, 0).problem, "another group of ranks, or the same in another order"));
  CHECK(Contains(Find({4, 5, 6, 7, 0, 1, 2, 3}, 0).problem, "another group of ranks"));
  // Ranks that are in one of them alone have not refused it, and may have written to the region.
  CHECK(Contains(Find({0, 1, 2, 3, 4, 5, 6, 7}, 0).problem, "another group of ranks"));
  CHECK(RanksOfNode({0, 1, 2, 3}) == 4);
  JoinAgain(two_hosts);
  CHECK(RanksOfNode({0, 4}) == 1);  // of dp within a node, ep across
  JoinAgain(two_hosts);
  CHECK(RanksOfNode({1, 3, 7, 5}) == 2);
  CHECK(IsUneven({0, 4, 1, 5}) && IsUneven({0, 1, 4}) && IsUneven({0, 1, 4, 5, 2, 3}));
  CHECK(Contains(Find({0, 8}, 0).problem, "rank 1 is of process 8, which is not in this job"));

  const std::vector<int> one_host(8, 0);
  JoinAgain(one_host);
  CHECK(RanksOfNode({0, 1, 2, 3, 4, 5, 6, 7}) == 8);
  JoinAgain(one_host, 2);
  CHECK(RanksOfNode({0, 1}) == 2 && RanksOfNode({7, 0, 3, 1}) == 2 && IsUneven({0, 1, 2}));
  JoinAgain(two_hosts, 8);
  CHECK(RanksOfNode({0, 1, 2, 3, 4, 5, 6, 7}) == 8);
  Network::Get().Leave();
  CHECK(!Find({0, 4}, 0).call);
}

void WhatIsRefused() {
  JoinAgain({0, 1});
  Found found;
  const int64_t of_one_process[] = {0, 1};                                        // two devices
  CHECK(!Network::Get().Find(of_one_process, 2, 0, &found.call) && !found.call);  // of one node
  JoinAgain({0, 1}, 1);
  CHECK(Contains(Network::Get().Find(of_one_process, 2, 0, &found.call).value_or(""),
                 "each rank must be a process of its own"));
  std::vector<int> hosts(60);
  std::vector<int64_t> all(60);
  for (int i = 0; i < 60; ++i) all[i] = hosts[i] = i;
  Network::Get().Leave();
  Network::Get().Join(Part(60, int64_t{1} << 30), Hosts(hosts), 0, false);
  CHECK(Contains(Find(all, 0).problem, "the group's ranks must be at most 56; got 60"));
  Network::Get().Leave();
  // A region that is too small is one for jobs whose groups do not span nodes.
  const int64_t least = gpu::least_region_bytes(8, 4);
  for (const int64_t region_bytes : {least, least / 2}) {
    Network::Get().Join(Part(8, region_bytes), Hosts({0, 0, 0, 0, 1, 1, 1, 1}), 0, true);
    CHECK(RanksOfNode({0, 1, 2, 3}) == 4);
    const std::string problem = Find({0, 1, 2, 3, 4, 5, 6, 7}, 0).problem;
    const std::string needs = "the group needs " + std::to_string(least) +
                              " bytes of NVSHMEM's heap, but it has " + std::to_string(least / 2);
    CHECK(region_bytes == least ? problem.empty() : Contains(problem, needs));
    Network::Get().Leave();
  }
  for (size_t gpu::NetworkPart::* bytes :
       {&gpu::NetworkPart::control_bytes, &gpu::NetworkPart::view_bytes}) {
    gpu::NetworkPart other = Part(2);
    ++(other.*bytes);
    CHECK(Contains(Thrown([&] { Network::Get().Join(other, Hosts({0, 1}), 0, false); }),
                   "different builds"));
  }
}

// Where everything lies: the same for all ranks, inside the region, apart, and as kernels want it.
void Region() {
  for (const auto& [num_ranks, on_node] : {std::pair{2, 1}, {8, 1}, {8, 2}, {16, 8}, {56, 1}}) {
    for (const int64_t num_bytes : {gpu::least_region_bytes(num_ranks, on_node),
                                    gpu::least_region_bytes(num_ranks, on_node) + 12345,
                                    int64_t{768} << 20, int64_t{8} << 30}) {
      bool is_enough = false, is_enough_with_slots = false;
      gpu::NetworkRegion region =
          gpu::MakeNetworkRegion(num_bytes, num_ranks, on_node, false, &is_enough);
      CHECK(is_enough && region.num_nodes() == num_ranks / on_node);
      CHECK(region.slots.num_bytes() == 0 && region.slots.num_signals() == 0);
      const gpu::NetworkRegion with_slots =
          gpu::MakeNetworkRegion(num_bytes, num_ranks, on_node, true, &is_enough_with_slots);
      CHECK(is_enough_with_slots == (num_bytes >= int64_t{768} << 20));
      if (is_enough_with_slots) {
        const int64_t unused = num_bytes / 6 - with_slots.slots.num_bytes();
        CHECK(unused >= 0 && unused < 4 * 128 * num_ranks);
        region = with_slots;
      }
      const gpu::RailMemory& rail = region.rail;
      CHECK(rail.slot_bytes >= gpu::kLeastSlotBytes && rail.slot_bytes <= gpu::kMostSlotBytes);
      CHECK(rail.slot_bytes % 16 == 0 && rail.num_nodes == region.num_nodes());
      CHECK(region.layout.fits(gpu::kLeastIds, gpu::kMaxExperts, gpu::kLeastIds * num_ranks));
      struct Interval {
        int64_t begin, bytes;
      };
      const auto at = [](const void* p) { return static_cast<const char*>(p) - kRegion; };
      const int64_t num_chunks = int64_t{rail.num_nodes} * rail.num_channels;
      const int64_t chunks_bytes = num_chunks * int64_t{sizeof(gpu::RailChunks)};
      std::vector<Interval> intervals{
          {at(region.epoch(kRegion)), 8},
          {at(region.has_told(kRegion)), 8},
          {at(region.slots_epoch(kRegion)), 8},
          {at(region.dispatch_chunks_of(kRegion)), chunks_bytes},
          {at(region.combine_chunks_of(kRegion)), chunks_bytes},
          {at(region.layout_memory(kRegion).signals), region.layout.num_signals() * 8},
          {at(region.dispatch_memory(kRegion).signals), rail.num_signals() * 8},
          {at(region.combine_memory(kRegion).signals), rail.num_signals() * 8},
          {at(region.given_up(kRegion)), num_ranks * 8},
          {at(region.slots_memory(kRegion).signals), region.slots.num_signals() * 8},
          {at(region.dispatch_memory(kRegion).bytes), rail.num_bytes()},
          {at(region.combine_memory(kRegion).bytes), rail.num_bytes()},
          {at(region.layout_memory(kRegion).bytes), region.layout.num_bytes()}};
      if (is_enough_with_slots) {
        intervals.push_back({at(region.slots_memory(kRegion).bytes), region.slots.num_bytes()});
      }
      int64_t end = 0;
      for (const Interval& interval : intervals) {  // which are in order
        CHECK(interval.begin >= end && interval.begin % 8 == 0);
        end = interval.begin + interval.bytes;
      }
      CHECK(end <= num_bytes);
      for (size_t i = 10; i < intervals.size(); ++i) CHECK(intervals[i].begin % 128 == 0);
    }
  }
  // That of a heap of NVSHMEM's own size, for the largest group, takes rows of 14336 bytes by twos.
  bool is_enough = false;
  const gpu::NetworkRegion region =
      gpu::MakeNetworkRegion(int64_t{768} << 20, 56, 1, false, &is_enough);
  CHECK(is_enough && region.rail.slot_bytes / 14416 == 2 && region.layout.max_ids > 300000);
  // Slots of that take as many tokens as those of a node do, also with a rank a node.
  for (const int num_ranks : {2, 8, 16, 32, 56}) {
    const gpu::FarSlots slots =
        gpu::MakeNetworkRegion(int64_t{768} << 20, num_ranks, 1, true, &is_enough).slots;
    const int64_t num_tokens = std::min<int64_t>(512, gpu::kMaxSlotGroupIds / (8 * num_ranks));
    CHECK(is_enough && slots.num_signals() * 8 < 1 << 18);
    CHECK(gpu::fits_far_slots(slots, {num_ranks, num_tokens, 8, 8 * num_ranks, {14336}}));
  }
}

// What of each pair's slots is where: apart, and the same place seen from both of its ranks.
void FarRanks() {
  for (const auto& [num_ranks, on_node] : {std::pair{2, 1}, {4, 2}, {6, 3}, {8, 1}, {16, 8}}) {
    const gpu::FarSlots at = gpu::MakeFarSlots(1 << 20, num_ranks, on_node);
    CHECK(at.num_far == num_ranks - on_node);
    for (int r = 0; r < num_ranks; ++r) {
      int next = 0;
      for (int q = 0; q < num_ranks; ++q) {
        if (q / on_node == r / on_node) continue;
        CHECK(at.far_index(r, q) == next && at.far_rank(r, next) == q);
        ++next;
      }
      CHECK(next == at.num_far);
    }
    const gpu::HopMemory memory{kRegion, reinterpret_cast<uint64_t*>(kRegion)};
    for (int far = 0; far < at.num_far; ++far) {
      for (const uint64_t epoch : {4, 5}) {
        const bool is_odd = epoch % 2 == 1;
        CHECK(at.staging(memory, epoch, far) ==
              kRegion + (2 * is_odd * at.num_far + far) * at.slot_bytes);
        CHECK(at.landing(memory, epoch, far) ==
              at.staging(memory, epoch, far) + at.num_far * at.slot_bytes);
        CHECK(at.arrived(memory, epoch, far, at.max_units - 1) + 1 ==
              memory.signals + (is_odd * at.num_far + far + 1) * (1 + at.max_units));
      }
    }
    CHECK(at.landing(memory, 1, at.num_far - 1) + at.slot_bytes == kRegion + at.num_bytes());
    CHECK(at.arrived(memory, 1, at.num_far - 1, at.max_units - 1) + 1 ==
          memory.signals + at.num_signals());
  }
}

// This node's part by symmetric memory, the rest by the region. Process 1 is this one once more.
void Views() {
  constexpr size_t kStagingBytes = 4096, kSlotBytes = 1 << 20;
  Memory().Setup(0, 4, {0}, {0}, kStagingBytes, /*staged_only=*/true, kSlotBytes);
  const std::string own = Memory().Export({});
  std::string other = own;
  char bus_id[32];
  CHECK(cudaDeviceGetPCIBusId(bus_id, sizeof bus_id, 0) == cudaSuccess);
  const std::string member = " 0 ";
  const size_t place = other.find(member + bus_id);
  CHECK(place != std::string::npos);
  other.replace(place, member.size(), " " + std::to_string(int64_t{1} << 32) + " ");
  Memory().Import({own, other, "", ""});
  JoinAgain({0, 0, 1, 1});

  std::vector<char> tokens(256), ids(64), partial(64);
  const auto enter = [&](const CudaSiteState& site, GroupCall* call) {
    const xla::ffi::Error error =
        EnterGroup(site, 0, nullptr,
                   {{"ids", ids.data(), ids.size()},
                    {"tokens", tokens.data(), tokens.size(), Use::kLanding, /*landing_bytes=*/8192},
                    {"partial", partial.data(), partial.size(), Use::kScratch}},
                   call, gpu::SlotSizes{4, 1, 1, 4, {16}});
    return error.message();
  };
  GroupCall call;
  CHECK(enter(Site(MembersOf({2, 3, 0, 1}), 4), &call).empty());
  CHECK(call.num_ranks == 2 && call.rank == 0 && !call.in_slots() && call.network() != nullptr);
  CHECK(call.peer[0].control == Memory().Control(0) && call.peer[1].slot_here == 1);
  CHECK(call.peer[1].control != call.peer[0].control);  // mapped once more
  // Nobody reads the ids, rows come to where they are copied from.
  CHECK(call.At(ids.data()) == ids.data() && call.LandingOf(tokens.data()) == nullptr);
  CHECK(Address(call.At(tokens.data())) == call.staging);
  CHECK(Address(call.At(partial.data())) == call.staging + 256);
  const NetworkCall& network = *call.network();
  CHECK(network.node == 1 && network.first_rank() == 2 && network.part.region == kRegion);
  const gpu::NetworkRegion& region = network.region;
  CHECK(region.num_ranks == 4 && region.ranks_per_node == 2);
  const gpu::NetworkView& layout = network.group.layout;
  CHECK(layout.epoch == region.epoch(kRegion));
  CHECK(call.nodes.rank == 2 && call.nodes.num_ranks == 4);
  CHECK(call.nodes.given_up == region.given_up(kRegion));
  CHECK(call.nodes.has_told == region.has_told(kRegion));
  CHECK(layout.memory.bytes == region.layout_memory(kRegion).bytes);
  CHECK(layout.layout.max_ids == region.layout.max_ids);
  const gpu::RailView& rail = network.group.dispatch;
  CHECK(rail.node == 1 && rail.ranks_per_node == 2 && rail.at.num_nodes == 2);
  CHECK(rail.memory.bytes == region.dispatch_memory(kRegion).bytes);
  CHECK(rail.chunks == region.dispatch_chunks_of(kRegion));
  CHECK(rail.rank_of(0, call.rank) == 0 && rail.rank_of(1, call.rank) == 2);
  const gpu::RailView& back = network.group.combine;
  CHECK(back.node == 1 && back.ranks_per_node == 2 && back.at.num_nodes == 2);
  CHECK(back.memory.bytes == region.combine_memory(kRegion).bytes);
  CHECK(back.chunks == region.combine_chunks_of(kRegion));
  const std::vector<int> pes(network.group.pe, network.group.pe + 4);
  CHECK(pes == std::vector<int>({2, 3, 0, 1}));

  // With slots between nodes such a call goes through them.
  JoinAgain({0, 0, 1, 1}, 0, true);
  GroupCall small;
  CHECK(enter(Site(MembersOf({2, 3, 0, 1}), 4), &small).empty() && small.in_slots());
  CHECK(small.num_ranks == 2 && small.operation != call.operation);
  const gpu::FarView& far = small.network()->group.slots;
  CHECK(far.at.ranks_per_node == 2 && far.at.num_far == 2);
  CHECK(far.memory.bytes == small.network()->region.slots_memory(kRegion).bytes);
  CHECK(far.epoch == small.network()->region.slots_epoch(kRegion));
  JoinAgain({0, 0, 1, 1});

  // The same ranks on one node are in another call, with all that it has there.
  const uint64_t across = call.operation;
  GroupCall here;
  CHECK(enter(Site(MembersOf({0, 1}), 2), &here).empty() && here.in_slots());
  CHECK(here.num_ranks == 2 && here.network() == nullptr && here.operation != across);
  CHECK(here.nodes.given_up == nullptr && here.nodes.num_ranks == 0);
  // Devices of other nodes are named by their processes, and where those are.
  Memory().SetHosts(Hosts({0, 0, 1, 1}));
  const auto error = [&](uint32_t phase, int peer, uint64_t seen) {
    here.error->kind = static_cast<uint32_t>(OpKind::kDispatch);
    here.error->phase = phase;
    here.error->peer_slot = gpu::slot_of_process(peer);
    here.error->expected_epoch = 7;
    here.error->seen_epoch = seen;
    here.error->valid = 1;
    const std::string text = Memory().RecordedError().value_or("");
    here.error->valid = 0;
    return text;
  };
  CHECK(Contains(error(gpu::kProgress, 3, 5),
                 "device 0 (process 0) waited for rank 1 of the group across nodes (process 3 on "
                 "host1) to finish until the timeout (expected 7 in its signal, seen 5)"));
  CHECK(Contains(error(gpu::kToldByPeer, 2, gpu::slot_of_process(3)),
                 "was told by rank 0 of the group across nodes (process 2 on host1), which has "
                 "given up on rank 1 of the group across nodes (process 3 on host1) and says why"));
  CHECK(Contains(error(gpu::kPeerDied, 4, 0), "the process of the device of process 4 has died"));
  // Of those on other hosts somebody else knows that they have left.
  CHECK(Memory().AwaitedElsewhere().empty());
  for (const int slot : {1, gpu::slot_of_process(3)}) {
    here.error->waiting.peer_slot = slot;
    here.error->waiting.since = 1;
    const std::vector<int64_t> expected(slot == 1 ? 0 : 1, 3);
    CHECK(Memory().AwaitedElsewhere() == expected);
    here.error->waiting.since = 0;
  }
  const auto is_gone = [&](int slot) {
    return (here.error->gone[gpu::word_of(slot)] & gpu::bit_of(slot)) != 0;
  };
  CHECK(!is_gone(gpu::slot_of_process(3)));
  Memory().TellLeft(3);
  CHECK(is_gone(gpu::slot_of_process(3)) && !is_gone(gpu::slot_of_process(2)));
  CHECK(Contains(error(gpu::kPeerDied, 3, 0),
                 "the process of rank 1 of the group across nodes (process 3 on host1) has left"));
  Network::Get().Leave();
  GroupCall alone;
  CHECK(Contains(enter(Site(MembersOf({2, 3, 0, 1}), 4), &alone),
                 "rank 0 lives on device 0 of process 2, which this process is not connected to"));
  Memory().Release(true);
}

}  // namespace

void RunTestsOfNetworkGroups() {
  Run("which groups span nodes", WhichSpanNodes);
  Run("groups across nodes that are refused", WhatIsRefused);
  Run("the region", Region);
  Run("slots of ranks of other nodes", FarRanks);
  Run("views across nodes", Views);
}

}  // namespace jax_ep::test
