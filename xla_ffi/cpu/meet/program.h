// Which calls of different processes are one call.
//
// Inside a process a call site is an object of the compiled program, and XLA numbers the launches.
// Neither has a name that another process knows: addresses, XLA's numbers (a hash of the program's
// text, which holds the lines of code it was traced from) and how many programs were compiled or
// loaded before may all differ where the processes run the same program. So a call is known by
//   program   the list of its call sites' signatures (operation, attributes, devices), in the order
//             in which XLA instantiates them. That is the order of its thunks, which XLA's compiler
//             makes alike in every process, and a cache or a serialised program keeps.
//   launch    how many launches on the same devices came before in this process, of programs with
//             calls that span processes. All processes launch the programs that they share in the
//             same order, as JAX asks for, and XLA runs a process's launches one after the other.
//   place     of the call site in the list. It tells calls with equal attributes apart, whose order
//             differs from device to device.
//   group     in the mesh. Within all this, calls pair in order: devices pass a call site once per
//             iteration of the loop around it.
//
// XLA does not say where a program ends. Its sites are instantiated one after the other on one
// thread: the one that compiles or loads it, or one of XLA's (jaxlib 0.10). So a list ends when its
// thread begins to lower or has compiled a program (Program::End, from Python), or when one of its
// sites runs. Programs that are loaded one after the other, with neither in between, share a list;
// where that differs between processes, or XLA compiled differently, the lists differ, and the
// calls fail with an error that says so (ProcessGroup::Conflict): no rows are exchanged.
#ifndef JAX_EP_XLA_FFI_CPU_MEET_PROGRAM_H_
#define JAX_EP_XLA_FFI_CPU_MEET_PROGRAM_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace jax_ep::cpu {

class Program {
 public:
  explicit Program(uint64_t id) : id_(id) {}

  struct Place {
    std::shared_ptr<Program> program;
    int64_t index;
  };
  // Appends a call site to the program that this thread builds.
  static Place Append(uint64_t signature);

  // What this thread instantiates from now on belongs to another program. So does what XLA's own
  // threads instantiate: those that have never called this.
  static void End();

  struct Name {
    uint64_t hash;  // of the list
    int64_t num_sites;
  };
  // Ends the list.
  Name Close();

  uint64_t id() const { return id_; }  // unique in this process, never reused

 private:
  const uint64_t id_;
  std::mutex mutex_;
  bool closed_ = false;
  std::vector<uint64_t> signatures_;
};

// A call of a compiled program. Two calls that share every attribute are two call sites.
struct CallSite {
  std::string op;        // the target's name, for messages
  uint64_t id = 0;       // unique in this process, never reused
  Program::Place place;  // what other processes know it by
  int64_t num_ranks = 0;
  std::vector<int64_t> rank_process;  // process of each rank, [num_groups * R], group by group
  std::vector<int64_t> rank_device;   // JAX's id of each rank's device, likewise
  uint64_t devices_hash = 0;          // of all devices, in any order

  const int64_t* group_processes(int64_t group) const {
    return rank_process.data() + group * num_ranks;
  }
  const int64_t* group_devices(int64_t group) const {
    return rank_device.data() + group * num_ranks;
  }
};

// A new site at the next place of the program that this thread builds. `members` are the devices of
// all groups, group by group: the process in the upper 32 bits, the device's id in the lower ones.
std::shared_ptr<const CallSite> MakeCallSite(std::string op, uint64_t signature, int64_t num_ranks,
                                             const std::vector<int64_t>& members);

}  // namespace jax_ep::cpu

#endif  // JAX_EP_XLA_FFI_CPU_MEET_PROGRAM_H_
