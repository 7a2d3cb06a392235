// slots across nodes: how calls in slots (cuda/slots) reach ranks of other nodes, far ranks: in one hop,
// like those of this node, but by the network. A rank puts what is for a far rank straight to where
// that one reads it, nobody forwards it.
// After:    as cuda/slots/layout_and_dispatch.cuh and combine.cuh say, whatever ranks lie on which
//           node.
// Roles:    those of the calls. The first of the blocks that send tells the far ranks of the call, by
//           its warps; a team that sends a unit packs it, and its warps put it.
// Buffers:  name    | lives on       | written by                 | read by
//           staging | hop's bytes    | own blocks that send       | the network
//           landing | hop's bytes    | the network                | own blocks that receive
//           told    | hop's signals, one a far rank, and parity: epochs
//           arrived | hop's signals, one a unit of a far rank, and parity: epochs
//           epoch   | own, calls in slots that the group has finished
//           A unit is at the same place in staging and in landing. layout_and_dispatch sends a unit to
//           all ranks from one place, combine, whose units differ, from one of the far rank.
// Protocol: e = epoch of the call, of the whole group; all of it is there twice, by the parity of e.
//           [T1] put_signal of the call's operation, and of what it sends everybody (the tokens' ids and
//                weights), to each far rank: told = e
//           [T2] a rank waits for that of each far rank, before it uses what came with it, and before
//                it ends
//           [U1] a team packs a unit into staging, meets, and puts it: put_signal, arrived = e, to each
//                far rank that is to have it. Nothing else is sent with it, and no unit is cut; one
//                without vectors is not sent.
//           [U2] who receives waits for the signal of each unit that was sent to this rank, also of one
//                that it has no room for, and reads landing
// Proof:    tests/native/far_slots_model.cc tries it in every order, of two ranks.
//           A unit is whole: [U2] sees e in its word, which is set with the unit's bytes, so by [D] of
//           hop.cuh they are there. Which units come both sides know alike: of layout_and_dispatch
//           those of a token with an id of the rank's experts, from the ids, which came with [T1]; of
//           combine those of a token with a kept row there, from the layout.
//           A word is set by one warp of one rank, to epochs of one parity. Of two values the second
//           is set in call e + 2, so after this rank has had [T2] of e + 1 from the far rank, whose
//           call e had ended then, and with it all waits for what came in e. So there is an answer
//           between two values, as hop.cuh wants of a signal.
// Reuse:    likewise: in call e + 2 this rank has ended e + 1, so has [T2] of it, which the far rank
//           put when its call e had ended: it has seen the signal of each put of e, so the network has
//           read staging of e ([C]), and it reads landing of e no more. A rank without tokens for
//           another tells it of the call all the same, for that. Other calls of the group that come
//           between change nothing, for the same calls in slots follow one another on all ranks.
// Progress: as cuda/sync/slots.cuh: who sends waits for nobody, but for room in a queue of the network,
//           which that makes by itself; blocks that wait come after those that send.
// Failure:  waits end as give_up.cuh says: as for a peer that has not come until it has told of the call,
//           then as for one that does not go on. What breaks is the node's group, and other nodes are
//           told (tell.cuh). A call that is refused sends nothing else. Staging and landing belong to
//           no call, so nobody has to be seen out; but signals and epochs no longer agree: the group
//           is set up anew with all of them zero before it is used again.
// Limits:   fits_slots and fits_far_slots; at most kMaxNetworkRanks ranks.
#ifndef JAX_EP_CUDA_NETWORK_SLOTS_CUH_
#define JAX_EP_CUDA_NETWORK_SLOTS_CUH_

#include "cuda/launch.h"
#include "cuda/network/hop.cuh"
#include "cuda/network/hop_wait.cuh"
#include "cuda/network/layout.h"
#include "cuda/network/slots.h"
#include "cuda/network/tell.cuh"
#include "cuda/slots/combine.cuh"
#include "cuda/slots/layout_and_dispatch.cuh"
#include "cuda/slots/teams.cuh"
#include "cuda/sync/give_up.cuh"

namespace jax_ep::gpu {
namespace slots {

// In place of OneNode, which says what the first functions of each are.
template <typename Hop>
struct AcrossNodes {
  class Far {
   public:
    static constexpr bool kExists = true;
    __device__ Far(const GroupView& g, const AcrossNodes& reach, OpKind kind)
        : g_(g),
          reach_(reach),
          kind_(kind),
          first_(first_rank_of_node(g)),
          epoch_(ld_relaxed_gpu_u64(reach.view.epoch) + 1) {}

    __device__ static int rank(const GroupView& g) { return g.nodes.rank; }
    __device__ static int num_ranks(const GroupView& g) { return g.nodes.num_ranks; }
    __device__ int index(int rank) const { return rank - first_; }

    __device__ bool is_far(int rank) const {
      return static_cast<uint32_t>(rank - first_) >= static_cast<uint32_t>(g_.num_ranks);
    }

    // What is told, to be filled before.
    __device__ FarEntry* told_entries() const {
      return reinterpret_cast<FarEntry*>(at().staging(memory(), epoch_, 0) + sizeof(FarHead));
    }
    // [T1], by all threads of one block. False if the group is broken; not the same on all warps.
    __device__ bool tell(int32_t num_entries) const {
      char* const staged = at().staging(memory(), epoch_, 0);
      if (threadIdx.x == 0) *reinterpret_cast<FarHead*>(staged) = {g_.operation};
      __syncthreads();
      const size_t num_bytes = sizeof(FarHead) + num_entries * sizeof(FarEntry);
      bool ok = true;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) / 32; i < at().num_far; i += kNumWarps) {
        const int r = at().far_rank(rank(g_), (i + rank(g_)) % at().num_far);
        const int here = index_at(r);
        ok &= put(0, r, at().landing(memory(), epoch_, here), staged, num_bytes,
                  at().told(memory(), epoch_, here));
      }
      return ok;
    }
    // [T2], by a warp: of the first-th far rank, and then of each step-th. False if the group is
    // broken.
    __device__ bool await_told(int first, int step) const {
#pragma unroll 1
      for (int i = first; i < at().num_far; i += step) {
        const int slot = slot_of_rank(g_, reach_.hop, at().far_rank(rank(g_), i));
        HopWait wait(g_, kind_, slot);
        if (!reach_.hop.wait_signal(at().told(memory(), epoch_, i), epoch_,
                                    wait.until(kStart, epoch_))) {
          return false;
        }
        if (!is_in_call(i, slot)) return false;
      }
      return true;
    }
    // After that.
    __device__ FarEntry entry(int rank, int32_t i) const {
      const char* told = landing_of(rank) + sizeof(FarHead);
      const uint2 entry = __ldcg(reinterpret_cast<const uint2*>(told) + i);
      return {static_cast<int32_t>(entry.x), __uint_as_float(entry.y)};
    }

    // Where a unit is packed that goes to all ranks, or to one; its values come first.
    __device__ char* staged_unit(int32_t unit) const {
      return at().staging(memory(), epoch_, 0) + reach_.units.at(unit);
    }
    __device__ char* staged_unit(int rank, int32_t unit) const {
      const int far = at().far_index(this->rank(g_), rank);
      return at().staging(memory(), epoch_, far) + reach_.units.at(unit);
    }
    __device__ int32_t values_bytes() const { return reach_.units.values_bytes; }
    // [U1], by a warp, after a barrier of those who have packed it: its bytes from `begin` on.
    __device__ bool put_unit(int rank, int32_t unit, const char* staged, int32_t begin,
                             int32_t num_bytes) const {
      const int here = index_at(rank);
      char* const landing = at().landing(memory(), epoch_, here) + reach_.units.at(unit);
      return put(unit, rank, landing + begin, staged + begin, num_bytes,
                 at().arrived(memory(), epoch_, here, unit));
    }
    // [U2], by a warp. False if the group is broken.
    __device__ bool await_unit(int rank, int32_t unit) const {
      const int far = at().far_index(this->rank(g_), rank);
      UnitWait wait(*this, far, slot_of_rank(g_, reach_.hop, rank));
      return reach_.hop.wait_signal(at().arrived(memory(), epoch_, far, unit), epoch_, wait);
    }
    __device__ const char* landed_unit(int rank, int32_t unit) const {
      return landing_of(rank) + reach_.units.at(unit);
    }

    // By all threads of the last block of a call that has failed.
    __device__ void tell_of_failure() const { tell_other_nodes(g_, reach_.hop); }
    // By all threads of the last block of one that went well.
    __device__ void end() const {
      if (threadIdx.x == 0) *reach_.view.epoch = epoch_;
    }

   private:
    // What a wait for a unit asks: it is for a rank that has not come, until that has told of the call.
    class UnitWait {
     public:
      __device__ UnitWait(const Far& far, int index, int slot)
          : far_(far), wait_(far.g_, far.kind_), index_(index), slot_(slot) {}
      __device__ bool operator()(uint64_t seen) {
        if (phase_ == kStart && far_.has_told(index_)) {
          if (!far_.is_in_call(index_, slot_)) return false;
          wait_.restart();
          phase_ = kEnd;
        }
        return wait_.may_go_on(slot_, phase_, far_.epoch_, seen);
      }

     private:
      const Far& far_;
      Wait wait_;
      const int index_, slot_;
      uint32_t phase_ = kStart;
    };
    __device__ bool has_told(int far) const {
      return ld_acquire_sys(at().told(memory(), epoch_, far)) >= epoch_;
    }
    // Of a far rank that has told, whether of this call. Breaks the group if of another one.
    __device__ bool is_in_call(int far, int slot) const {
      const auto* head = reinterpret_cast<const FarHead*>(at().landing(memory(), epoch_, far));
      const uint64_t operation = __ldcg(reinterpret_cast<const unsigned long long*>(head));
      if (operation == g_.operation) return true;
      break_group(g_, kind_, slot, kOtherCall, g_.operation, operation);
      return false;
    }

    __device__ const FarSlots& at() const { return reach_.view.at; }
    __device__ const HopMemory& memory() const { return reach_.view.memory; }
    // This rank's number among those that are far from that one.
    __device__ int index_at(int rank) const { return at().far_index(rank, this->rank(g_)); }
    __device__ const char* landing_of(int rank) const {
      return at().landing(memory(), epoch_, at().far_index(this->rank(g_), rank));
    }
    __device__ bool put(int queue, int rank, char* dst, const char* src, size_t num_bytes,
                        uint64_t* signal) const {
      HopWait wait(g_, kind_, slot_of_rank(g_, reach_.hop, rank));
      return reach_.hop.put_signal(queue, rank, dst, src, num_bytes, signal, epoch_,
                                   wait.until(kProgress, epoch_));
    }

    const GroupView& g_;
    const AcrossNodes& reach_;
    const OpKind kind_;
    const int first_;  // rank of this node
    const uint64_t epoch_;
  };

  FarView view;
  FarUnits units;
  Hop hop;
};

}  // namespace slots

// As LaunchLayoutAndDispatchInSlots and LaunchCombineInSlots, of the whole group.
template <typename Hop>
cudaError_t LaunchNetworkLayoutAndDispatchInSlots(const GroupView& group, const FarView& view,
                                                  const Hop& hop,
                                                  const LayoutAndDispatchArguments& a, int num_sms,
                                                  cudaStream_t stream) {
  const SlotRow row = slot_row(a.mode, a.type, a.row_bytes, a.num_scales);
  const SlotSizes sizes{group.nodes.num_ranks, a.num_tokens, a.top_k, a.num_experts, row};
  if (group.nodes.num_ranks > kMaxNetworkRanks || !fits_far_slots(view.at, sizes)) {
    return cudaErrorInvalidValue;
  }
  return slots::LaunchDispatch(
      group, a, group.nodes.num_ranks, num_sms, stream, [&](const slots::Units& units) {
        return slots::AcrossNodes<Hop>{view, FarUnitsOf(a.num_tokens * a.top_k, 0, units), hop};
      });
}

template <typename Hop>
cudaError_t LaunchNetworkCombineInSlots(const GroupView& group, const FarView& view, const Hop& hop,
                                        const CombineArguments& a, int num_sms,
                                        cudaStream_t stream) {
  const int64_t row_bytes = a.num_channels * (a.type == FloatType::kF32 ? 4 : 2);
  const SlotSizes sizes{group.nodes.num_ranks,
                        a.num_tokens,
                        a.top_k,
                        a.num_local_experts * group.nodes.num_ranks,
                        {row_bytes}};
  if (group.nodes.num_ranks > kMaxNetworkRanks || !fits_far_slots(view.at, sizes)) {
    return cudaErrorInvalidValue;
  }
  const int64_t num_values = a.values != nullptr ? a.top_k : 0;
  return slots::LaunchCombine(
      group, a, group.nodes.num_ranks, num_sms, stream, [&](const slots::Units& units) {
        return slots::AcrossNodes<Hop>{view, FarUnitsOf(0, num_values, units), hop};
      });
}

template <typename Hop>
cudaError_t PrepareNetworkSlots() {
  if (cudaError_t e = slots::PrepareDispatch<slots::AcrossNodes<Hop>>(); e != cudaSuccess) return e;
  return slots::PrepareCombine<slots::AcrossNodes<Hop>>();
}

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_NETWORK_SLOTS_CUH_
