// The parts of kernels_test.
#ifndef JAX_EP_TESTS_NATIVE_KERNELS_TEST_H_
#define JAX_EP_TESTS_NATIVE_KERNELS_TEST_H_

#include <cstdint>
#include <vector>

#include "tests/native/kernels_oracle.h"
#include "tests/native/kernels_ranks.h"

namespace jax_ep::gpu::test {

// Cases of every kind; fewer and smaller ones for slow tools.
std::vector<Case> Cases(bool small);

// Layout, dispatch, combine and combine's gradient of one case, against the oracle.
void RunCase(const Group& group, const Data& d, int num_sms, uint64_t seed);

// What a rank's host was told of its ids since the last time.
void CompareNotice(const Group& group, const Data& d, int rank);

// What layout, dispatch and combine have left in one rank's buffers: all of it, and all but rows and
// weights of dispatch.
void CompareCase(const Data& d, int rank, const Buffers& b);
void CompareTablesAndSums(const Data& d, int rank, const Buffers& b);

// Layout and dispatch, and combine, in slots: random cases and groups, many calls in a row, with
// calls of the general kind between them. `num_sms` is of each rank, `max_ranks` of a group.
void TestSlots(int num_sequences, int max_ranks, int num_sms, uint64_t seed);
// In slots, in every form: a rank that never comes, one that stops on the way, one that is in another
// call, and calls after that.
void TestSlotFailures();
// For this, kernels of different streams have to run together.
void TestSlotReuse();

// Dispatch of one case in every form that it can have, expanded or with a row for each (token, rank); on a
// layout, and in slots with it.
void RunForms(const Group& group, const Data& d, int num_sms, uint64_t seed);
// Combine of rows for each (token, rank), on the general way and in slots.
void RunSumsNotExpanded(const Group& group, const Data& d, int num_sms, uint64_t seed);

// Ends the program if one of a group's ranks has recorded an error: what follows means nothing then.
void RequireNoError(const Group& group, int num_ranks);
// Prints the case that something was wrong in.
void PrintCase(const Data& d, const char* what, int num_sms);

// A rank that never comes, and one that comes and then does nothing more.
void TestStall(int num_sms);
void TestBreakOnTheWay(int num_tokens, uint64_t num_units);
// A rank that comes when its peer has left a call that has failed.
void TestShutDoor();
// For these, kernels of different streams have to run together.
void TestBreakBeforeTheEnd();
void TestDeath();
void TestOtherGroup();
void TestMemoryAfterTheEnd();
// A rank that is in its peer's memory when that one's call fails.
void TestWaitForWhoIsInside();
// Two calls at once on rank 0 of two: both fail, before the second has told anybody anything, and
// so does rank 1's. Afterwards the group is broken.
void TestTwoAtOnce(const Group& group);

}  // namespace jax_ep::gpu::test

#endif  // JAX_EP_TESTS_NATIVE_KERNELS_TEST_H_
