"""The rounding of combine: rows of one token whose result shows each rule of the contract.

`ROUNDINGS` are on one node, `NODE_ROUNDINGS` on several.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32

F32_MAX = float(np.finfo(np.float32).max)
BF16_MAX = 2.0**128 - 2.0**120

# What one token's rows are, as (expert rank, value) in k order; the weights; what comes out.
ROUNDINGS: dict[str, tuple[DTypeLike, list[tuple[int, float]], list[float] | None, float]] = {
    # bf16 has 8 significant bits: beside 1 the spacing is 2**-7, and 1 + 2**-8 is a tie, to even.
    # Exact is 1 + 2**-7, which bf16 has; rank 0 rounds to 1, then 1 + 2**-8 rounds to 1 again.
    "bf16 rounds once per rank and once at the end": (
        BF16,
        [(0, 1.0), (0, 2.0**-8), (1, 2.0**-8)],
        None,
        1.0,
    ),
    "bf16 does not round between the rows of a rank": (
        BF16,
        [(0, 1.0), (0, 2.0**-8), (0, 2.0**-8)],
        None,
        1.0 + 2.0**-7,
    ),
    "bf16 does not round the products": (
        BF16,  # 3 * (1 + 2**-7) = 3 + 3 * 2**-7 is no bf16 (spacing 2**-6), but minus 3 it is
        [(0, 1.0 + 2.0**-7), (0, -3.0)],
        [3.0, 1.0],
        3 * 2.0**-7,
    ),
    "bf16 does not round between the ranks": (
        BF16,
        [(0, 1.0), (1, 2.0**-8), (2, 2.0**-8)],
        None,
        1.0 + 2.0**-7,
    ),
    # 2**24 + 1 is a tie, to even, so each 1 that comes after 2**24 is lost.
    "float32 adds in k order": (F32, [(0, 2.0**24), (0, 1.0), (0, 1.0)], None, 2.0**24),
    "float32 adds in k order, ones first": (
        F32,
        [(0, 1.0), (0, 1.0), (0, 2.0**24)],
        None,
        2.0**24 + 2,
    ),
    "float32 adds ranks in ascending order": (
        F32,
        [(1, 1.0), (2, 1.0), (0, 2.0**24)],
        None,
        2.0**24,
    ),
    "float32 adds ranks in ascending order, ones first": (
        F32,
        [(2, 2.0**24), (0, 1.0), (1, 1.0)],
        None,
        2.0**24 + 2,
    ),
    "float32 adds a rank's rows before it adds ranks": (
        F32,
        [(0, 2.0**24), (1, 1.0), (1, 1.0)],
        None,
        2.0**24 + 2,
    ),
    # (1 + 2**-12)**2 = 1 + 2**-11 + 2**-24 rounds to 1 + 2**-11 (a tie, to even). A fused
    # multiply-add would leave 2**-24.
    "no fused multiply-add": (
        F32,
        [(0, -(1.0 + 2.0**-11)), (0, 1.0 + 2.0**-12)],
        [1.0, 1.0 + 2.0**-12],
        0.0,
    ),
    "weights are not rounded to y's dtype": (BF16, [(0, 256.0)], [1.0 + 2.0**-8], 256.0),
    "weights are not rounded to y's dtype, two rows": (
        BF16,
        [(0, 256.0), (0, -256.0)],
        [1.0 + 2.0**-8, 1.0],
        1.0,
    ),
    # Zeros: the accumulators start at +0.0, and +0.0 + -0.0 = +0.0.
    "bf16 -0 becomes +0": (BF16, [(0, -0.0)], None, 0.0),
    "float16 -0 becomes +0": (F16, [(0, -0.0)], None, 0.0),
    "float32 -0 becomes +0": (F32, [(1, -0.0)], None, 0.0),
    "-0 from every rank becomes +0": (F32, [(0, -0.0), (1, -0.0), (2, -0.0)], None, 0.0),
    "-0 from a product becomes +0": (F32, [(0, 0.0)], [-1.0], 0.0),
    "a negative rank sum that underflows becomes +0": (F16, [(0, -(2.0**-24))], [0.5], 0.0),
    "opposite rows cancel to +0": (F32, [(0, -1.0), (0, 1.0)], None, 0.0),
    # Subnormals are kept, as inputs, products, sums and results.
    "bf16 subnormal": (BF16, [(0, 2.0**-133)], None, 2.0**-133),
    "float16 subnormal": (F16, [(0, -(2.0**-24))], None, -(2.0**-24)),
    "float32 subnormal": (F32, [(0, 2.0**-149)], None, 2.0**-149),
    "float32 subnormals add up to a normal": (
        F32,
        [(0, 2.0**-127), (0, 2.0**-127)],
        None,
        2.0**-126,
    ),
    "float32 subnormals of two ranks": (F32, [(0, 2.0**-149), (1, 2.0**-149)], None, 2.0**-148),
    "float32 product underflows to a tie": (F32, [(0, 2.0**-149)], [0.5], 0.0),
    "float32 product rounds up to a subnormal": (F32, [(0, 2.0**-149)], [0.75], 2.0**-149),
    "float32 product of normals is subnormal": (F32, [(0, 2.0**-100)], [2.0**-40], 2.0**-140),
    "bf16 product rounds up to a subnormal": (BF16, [(0, 2.0**-133)], [0.75], 2.0**-133),
    "bf16 product is a tie to zero": (BF16, [(0, 2.0**-133)], [0.5], 0.0),
    "float16 halves add up on a rank": (
        F16,
        [(0, 2.0**-24), (0, 2.0**-24)],
        [0.5, 0.5],
        2.0**-24,
    ),
    "float16 halves are lost on two ranks": (
        F16,
        [(0, 2.0**-24), (1, 2.0**-24)],
        [0.5, 0.5],
        0.0,
    ),
    # Overflow. The largest float16 is 65504; from 65520 on a number rounds to infinity.
    "float16 rounds down to the largest": (F16, [(0, 65504.0), (0, 15.0)], None, 65504.0),
    "float16 overflows at the tie": (F16, [(0, 65504.0), (0, 16.0)], None, np.inf),
    "float16 rank sum overflows for good": (
        F16,
        [(0, 65504.0), (0, 32.0), (1, -100.0)],
        None,
        np.inf,
    ),
    "float16 does not overflow within a rank": (
        F16,
        [(0, 65504.0), (0, 65504.0), (0, -65504.0)],
        None,
        65504.0,
    ),
    "float16 does not overflow between ranks": (
        F16,
        [(0, 65504.0), (1, 65504.0), (2, -65504.0)],
        None,
        65504.0,
    ),
    "float16 product does not overflow": (F16, [(0, 65504.0), (0, -65504.0)], [4.0, 3.0], 65504.0),
    "bf16 overflows at the tie": (BF16, [(0, BF16_MAX), (0, 2.0**119)], None, np.inf),
    "float32 overflows within a rank": (
        F32,
        [(0, F32_MAX), (0, F32_MAX), (0, -F32_MAX)],
        None,
        np.inf,
    ),
    "infinities of two ranks cancel to NaN": (F32, [(0, np.inf), (1, -np.inf)], None, np.nan),
    "NaN stays NaN": (BF16, [(0, 1.0), (1, np.nan)], None, np.nan),
}

# Six ranks: what one token's rows are, as (expert rank, value) with at most one on a rank, and what
# comes out with two ranks on each of three nodes, and with one node or six.
NODE_ROUNDINGS: dict[str, tuple[DTypeLike, list[tuple[int, float]], float, float]] = {
    # The spacing beside 1 is 2**-7; each 2**-8 that is added to a rounded 1 is a tie, to even.
    "bf16 rounds what a node's ranks add up to": (
        BF16,
        [(0, 1.0), (1, 2.0**-8), (2, 2.0**-8)],
        1.0,
        1.0 + 2.0**-7,
    ),
    "bf16 does not round between the nodes, nor add their ranks one by one": (
        BF16,
        [(0, 1.0), (2, 2.0**-8), (3, 2.0**-8)],
        1.0 + 2.0**-7,
        1.0 + 2.0**-7,
    ),
    "float32 adds a node's ranks before it adds nodes": (
        F32,
        [(0, 2.0**24), (2, 1.0), (3, 1.0)],
        2.0**24 + 2,
        2.0**24,
    ),
    "float32 adds nodes in ascending order": (
        F32,
        [(4, 1.0), (2, 1.0), (0, 2.0**24)],
        2.0**24,
        2.0**24,
    ),
    "float32 adds nodes in ascending order, ones first": (
        F32,
        [(5, 2.0**24), (1, 1.0), (3, 1.0)],
        2.0**24 + 2,
        2.0**24 + 2,
    ),
    "float16 overflows on a node for good": (
        F16,
        [(0, 65504.0), (1, 65504.0), (2, -65504.0)],
        np.inf,
        65504.0,
    ),
    "float16 does not overflow where ranks of a node cancel": (
        F16,
        [(0, 65504.0), (2, 65504.0), (3, -65504.0)],
        65504.0,
        65504.0,
    ),
    "infinities of two nodes cancel to NaN": (
        F16,
        [(0, 65504.0), (1, 65504.0), (2, -65504.0), (3, -65504.0)],
        np.nan,
        0.0,
    ),
    "-0 from every rank becomes +0": (
        F16,
        [(0, -0.0), (1, -0.0), (2, -0.0), (3, -0.0)],
        0.0,
        0.0,
    ),
    "nodes cancel to +0": (BF16, [(1, -1.0), (2, 1.0)], 0.0, 0.0),
    "float32 subnormals of two ranks and two nodes": (
        F32,
        [(0, 2.0**-149), (2, 2.0**-149), (3, 2.0**-149)],
        3 * 2.0**-149,
        3 * 2.0**-149,
    ),
    "bf16 subnormals": (BF16, [(1, -(2.0**-133)), (3, 3 * 2.0**-133)], 2.0**-132, 2.0**-132),
    "NaN on one node": (BF16, [(0, 1.0), (3, np.nan)], np.nan, np.nan),
}


def one_token_on_six_ranks(
    dtype: DTypeLike, choices: list[tuple[int, float]]
) -> tuple[NDArray[np.int32], NDArray[Any]]:
    """An entry of NODE_ROUNDINGS as ids [6, 1, K] and experts' rows [6, 6, 8].

    Six experts, one on each rank; rank 0 has the token, the others route nothing. Its row is the
    first of an expert, the others are NaN.
    """
    ids = np.full((6, 1, 4), -1, np.int32)
    ids[0, 0, : len(choices)] = [rank for rank, _ in choices]
    y = np.full((6, 6, 8), np.nan, dtype)
    for rank, value in choices:
        y[rank, 0] = value
    return ids, y
