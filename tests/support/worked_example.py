"""The worked example: a small routing drawn by hand, and all numbers that must come out of it."""

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from jax_ep import reference

# R = 2 ranks, E = 4 experts, T = 3 tokens per rank, K = 2, A = 2. So L = 2: rank 0 has the experts
# e0 and e1, rank 1 has e2 and e3. The tokens are a0 a1 a2 on rank 0 and b0 b1 b2 on rank 1.
#
#   routed          k = 0      k = 1     flat source ids
#   a0              e0         e2          0    1
#   a1              e1         e0          2    3
#   a2              e2         -           4    5
#   b0              e0         e2          6    7
#   b1              e7 (no)    e2          8    9
#   b2              -          -          10   11
#
# e0 has 3 rows, padded to 4. e1 has 1, padded to 2. e2 has 4, no padding. e3 has none. Within an
# expert the rows are in the order of the flat source ids; o = padding, - = tail:
#
#   C = 6           rank 0                              rank 1
#   row             0    1    2    3    4    5          0    1    2    3    4    5
#                 [ e0 . . . . . . . ][ e1 . . ]      [ e2 . . . . . . . ]  tail
#   source          0    3    6    o    2    o          1    4    7    9    -    -
#   token           a0   a1   b0        a1              a0   a2   b0   b1
#   by source id:   rows 0, 4, 1, 2                     rows 0, 1, 2, 3
#
# C = 4 is one alignment unit under: rank 0 loses e1, that is source 2 (a1's k = 0); rank 1 fits.
# C = 2 cuts e0 and e2 after two rows: lost are 6 and 2 on rank 0, and 7 and 9 on rank 1.

EXAMPLE_IDS = np.array([[[0, 2], [1, 0], [2, -1]], [[0, 2], [7, 2], [-1, -1]]], np.int32)

EXAMPLE_LAYOUTS: dict[int, dict[str, Any]] = {
    6: {
        "send_row": [[[0, 0], [4, 1], [1, -1]], [[2, 2], [-1, 3], [-1, -1]]],
        "recv_src": [[0, 3, 6, -1, 2, -1], [1, 4, 7, 9, -1, -1]],
        "recv_order": [[0, 4, 1, 2, -1, -1], [0, 1, 2, 3, -1, -1]],
        "recv_offsets": [[0, 1, 3, 3, 4, 4, 4], [0, 1, 1, 2, 3, 4, 4]],
        "group_sizes": [[4, 2], [4, 0]],
        "num_recv": [4, 4],
        "num_dropped": [0, 0],
        "kept": [[[1, 1], [1, 1], [1, 0]], [[1, 1], [0, 1], [0, 0]]],
        "row_valid": [[1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 0]],
    },
    4: {
        "send_row": [[[0, 0], [-1, 1], [1, -1]], [[2, 2], [-1, 3], [-1, -1]]],
        "recv_src": [[0, 3, 6, -1], [1, 4, 7, 9]],
        "recv_order": [[0, 1, 2, -1], [0, 1, 2, 3]],
        "recv_offsets": [[0, 1, 2, 2, 3, 3, 3], [0, 1, 1, 2, 3, 4, 4]],
        "group_sizes": [[4, 0], [4, 0]],
        "num_recv": [3, 4],
        "num_dropped": [1, 0],
        "kept": [[[1, 1], [0, 1], [1, 0]], [[1, 1], [0, 1], [0, 0]]],
        "row_valid": [[1, 1, 1, 0], [1, 1, 1, 1]],
    },
    2: {
        "send_row": [[[0, 0], [-1, 1], [1, -1]], [[-1, -1], [-1, -1], [-1, -1]]],
        "recv_src": [[0, 3], [1, 4]],
        "recv_order": [[0, 1], [0, 1]],
        "recv_offsets": [[0, 1, 2, 2, 2, 2, 2], [0, 1, 1, 2, 2, 2, 2]],
        "group_sizes": [[2, 0], [2, 0]],
        "num_recv": [2, 2],
        "num_dropped": [2, 2],
        "kept": [[[1, 1], [0, 1], [1, 0]], [[0, 0], [0, 0], [0, 0]]],
        "row_valid": [[1, 1], [1, 1]],
    },
}

# The data: H = 2, the second channel is the first one's negative. Expert e multiplies by e + 1.
#   a0 a1 a2 = 1 2 3 and b0 b1 b2 = 11 12 13; choice k of a token has weight
#   a: 1/2 1/4, 1 2, 4 8    b: 16 32, 64 128, 256 512
# With C = 6:
#   a0: 1/2 * (1 * 1) + 1/4 * (1 * 3) = 1.25        b0: 16 * (11 * 1) + 32 * (11 * 3) = 1232
#   a1: 1 * (2 * 2) + 2 * (2 * 1) = 8               b1: 128 * (12 * 3) = 4608
#   a2: 4 * (3 * 3) = 36                            b2: 0


def both_channels(values: Any, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """[..., 2] with the given first channel, and its negative as the second."""
    first = np.array(values, dtype)
    return np.stack([first, -first], axis=-1)


EXAMPLE_X = both_channels([[1, 2, 3], [11, 12, 13]])
EXAMPLE_WEIGHTS = np.array(
    [[[0.5, 0.25], [1, 2], [4, 8]], [[16, 32], [64, 128], [256, 512]]], np.float32
)

# The cotangents: g = 1 2 3 for a0 a1 a2 and 4 5 6 for b0 b1 b2 (again with its negative as the
# second channel, so that <y, g> is twice the product of the first channels). d_tokens counts the
# rows: 1 2 3 ... on rank 0 and 10 20 30 ... on rank 1; padding and tail get a number as well, which
# must not reach anything. With C = 6:
#   dx: a0 = 1 + 10, a1 = 5 + 2, a2 = 20, b0 = 3 + 30, b1 = 40, b2 = 0

EXAMPLE_DATA: dict[int, dict[str, Any]] = {
    6: {
        "tokens": [[1, 2, 11, 0, 2, 0], [1, 3, 11, 12, 0, 0]],
        "weights": [[0.5, 2, 16, 0, 1, 0], [0.25, 4, 32, 128, 0, 0]],
        "y": [[1, 2, 11, np.nan, 4, np.nan], [3, 9, 33, 36, np.nan, np.nan]],
        "out": [[1.25, 8, 36], [1232, 4608, 0]],
        "out_without_weights": [[4, 6, 9], [44, 36, 0]],
        "d_y": [[0.5, 4, 64, 0, 2, 0], [0.25, 12, 128, 640, 0, 0]],
        "d_weights": [[2, 8, 88, 0, 16, 0], [6, 54, 264, 360, 0, 0]],
        "d_y_without_weights": [[1, 2, 4, 0, 2, 0], [1, 3, 4, 5, 0, 0]],
        "d_x": [[11, 7, 20], [33, 40, 0]],
        "d_topk_weights": [[[1, 10], [5, 2], [20, 0]], [[3, 30], [0, 40], [0, 0]]],
    },
    4: {
        "tokens": [[1, 2, 11, 0], [1, 3, 11, 12]],
        "weights": [[0.5, 2, 16, 0], [0.25, 4, 32, 128]],
        "y": [[1, 2, 11, np.nan], [3, 9, 33, 36]],
        "out": [[1.25, 4, 36], [1232, 4608, 0]],
        "out_without_weights": [[4, 2, 9], [44, 36, 0]],
        "d_y": [[0.5, 4, 64, 0], [0.25, 12, 128, 640]],
        "d_weights": [[2, 8, 88, 0], [6, 54, 264, 360]],
        "d_y_without_weights": [[1, 2, 4, 0], [1, 3, 4, 5]],
        "d_x": [[11, 2, 20], [33, 40, 0]],
        "d_topk_weights": [[[1, 10], [0, 2], [20, 0]], [[3, 30], [0, 40], [0, 0]]],
    },
    2: {
        "tokens": [[1, 2], [1, 3]],
        "weights": [[0.5, 2], [0.25, 4]],
        "y": [[1, 2], [3, 9]],
        "out": [[1.25, 4, 36], [0, 0, 0]],
        "out_without_weights": [[4, 2, 9], [0, 0, 0]],
        "d_y": [[0.5, 4], [0.25, 12]],
        "d_weights": [[2, 8], [6, 54]],
        "d_y_without_weights": [[1, 2], [1, 3]],
        "d_x": [[11, 2, 20], [0, 0, 0]],
        "d_topk_weights": [[[1, 10], [0, 2], [20, 0]], [[0, 0], [0, 0], [0, 0]]],
    },
}


def example_layout(capacity: int, **options: Any) -> reference.ReferenceLayout:
    return reference.make_layout(
        EXAMPLE_IDS, num_experts=4, capacity=capacity, expert_alignment=2, **options
    )
