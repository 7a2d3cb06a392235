// The codecs of dispatch: what a row becomes on its way. Here is what the plan of a call has to know
// of one, in plain C++; the codecs themselves are copy_rows.cuh, quantized_rows.cuh,
// dequantized_rows.cuh, scaled_rows.cuh and weighted_rows.cuh.
//
// A row has two forms: as it crosses a link, in which it fills stages and landing areas, and as
// `tokens` hold it. A codec is a class with
//   kFormat                            its RowFormat
//   Extra                              what a lane keeps of its row of tokens, beside its address
//   tokens_row_bytes(a)                of a row of tokens
//   num_scales(a)                      of a row of tokens
//   extra_of(scales, row)              of that row of tokens; a rank's scales begin at that address
//   fill_stage(token, at, bytes, stage, full)
//                                      brings so much of a token's row of x, from byte `at` on, into
//                                      a stage, in the form in which it crosses, and completes the
//                                      phase of the barrier `full`
//   fetch_stage(crossed, ..)           likewise a row that has crossed
//   store(stage, bytes, to, verbatim, extra)
//                                      stores a stage's row where the lane wants it (0: nowhere), as
//                                      tokens are, or, if verbatim, as it has crossed; as bulk
//                                      stores of at least one group
// and, if its rings have helpers,
//   fetch_ahead(extra, bytes)          begins to bring what they will read into the L2 cache
//   help(stage, beside, to, extra, part)
//                                      a helper's part of storing a row as tokens are
//   finish(beside, to, extra)          what remains when all parts are done
// Whole warps call them. `a` are the call's DispatchArguments; `beside` is what a stage holds behind
// the row.
#ifndef JAX_EP_CUDA_ROWS_ROW_FORMAT_H_
#define JAX_EP_CUDA_ROWS_ROW_FORMAT_H_

#include <cstdint>

namespace jax_ep::gpu {

struct RowFormat {
  int32_t max_rings;             // of a block: each is run by a warp
  int32_t few_rings;             // likewise where a block has few units
  int32_t num_helpers;           // further warps of each ring, which compute
  int32_t beside_row_bytes;      // of a stage, behind the row
  int32_t ring_bytes;            // of a ring, behind its stages
  bool is_cut;                   // into pieces, if it is long
  bool is_computed;              // when it fills a stage, not copied
  bool is_stored_as_it_crosses;  // tokens hold rows in the form in which they cross
};

inline constexpr int32_t kNumProductBuffers = 2;  // of a ring that dequantises
inline constexpr int32_t kProductBufferBytes = 4096;
inline constexpr int32_t kNumWeightedHelpers = 7;

inline constexpr RowFormat kCopyFormat{4, 2, 0, 0, 0, true, false, true};
// To quantise takes more warps.
inline constexpr RowFormat kQuantizedFormat{10, 10, 0, 0, 0, false, true, true};
inline constexpr RowFormat kDequantizedFormat{
    10, 10, 0, 0, kNumProductBuffers * kProductBufferBytes, false, true, false};
// Their scales may need the warp's own loads, for which it waits.
inline constexpr RowFormat kScaledFormat{6, 6, 0, 0, 0, false, false, true};
// Behind a row: dot products by helper and lane.
inline constexpr RowFormat kWeightedFormat{
    2,     2,    kNumWeightedHelpers, kNumWeightedHelpers * 32 * int32_t{sizeof(float)}, 0, false,
    false, false};

}  // namespace jax_ep::gpu

#endif  // JAX_EP_CUDA_ROWS_ROW_FORMAT_H_
