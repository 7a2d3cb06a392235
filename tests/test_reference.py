"""Tests of the NumPy oracle itself: numbers written by hand, closed forms, and invariants."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import routings
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from routings import RoutedCase, assert_same_bits, routed_cases

from jax_ep import reference

BF16, F16, F32, F64 = ml_dtypes.bfloat16, np.float16, np.float32, np.float64
FP8 = ml_dtypes.float8_e4m3fn

few = settings(max_examples=60, deadline=None)


# The worked example -------------------------------------------------------------------------------
#
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


@pytest.mark.parametrize("capacity", EXAMPLE_LAYOUTS)
def test_example_layout(capacity: int) -> None:
    layout = example_layout(capacity)
    for name, expected in EXAMPLE_LAYOUTS[capacity].items():
        dtype = np.bool_ if name in ("kept", "row_valid") else np.int32
        assert_same_bits(getattr(layout, name), np.array(expected, dtype))
    # What does not depend on the capacity.
    assert_same_bits(layout.topk_idx, EXAMPLE_IDS)
    assert_same_bits(layout.expert_counts, np.array([[3, 1], [4, 0]], np.int32))
    assert_same_bits(layout.expert_load, np.array([[3, 1, 4, 0], [3, 1, 4, 0]], np.int32))
    assert_same_bits(layout.num_invalid, np.array([0, 1], np.int32))
    assert (layout.num_ranks, layout.num_tokens, layout.top_k) == (2, 3, 2)
    assert (layout.num_experts, layout.expert_alignment) == (4, 2)
    assert layout.capacity == capacity
    assert layout.zero_tail is True


def test_example_default_capacity() -> None:
    # (R * T * min(K, L) + L * (A - 1)) // A * A = (2 * 3 * 2 + 2 * 1) // 2 * 2
    assert reference.default_capacity(3, 2, 2, 4, 2) == 14
    layout = reference.make_layout(EXAMPLE_IDS, num_experts=4, expert_alignment=2)
    assert layout.capacity == 14
    tail = np.full((2, 8), -1, np.int32)
    expected = np.array(EXAMPLE_LAYOUTS[6]["recv_src"], np.int32)
    assert_same_bits(layout.recv_src, np.concatenate([expected, tail], axis=1))


def test_example_without_alignment() -> None:
    # A = 1: no padding, so e1 starts at row 3, and five rows hold everything.
    layout = reference.make_layout(EXAMPLE_IDS, num_experts=4, capacity=5)
    expected = np.array([[0, 3, 6, 2, -1], [1, 4, 7, 9, -1]], np.int32)
    assert_same_bits(layout.recv_src, expected)
    assert_same_bits(layout.group_sizes, np.array([[3, 1], [4, 0]], np.int32))


@pytest.mark.parametrize("capacity", EXAMPLE_DATA)
def test_example_dispatch(capacity: int) -> None:
    expected = EXAMPLE_DATA[capacity]
    tokens, weights = reference.dispatch(EXAMPLE_X, example_layout(capacity), EXAMPLE_WEIGHTS)
    np.testing.assert_array_equal(tokens, both_channels(expected["tokens"]))
    assert tokens.dtype == np.float32
    assert weights is not None
    assert_same_bits(weights, np.array(expected["weights"], np.float32))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("capacity", EXAMPLE_DATA)
def test_example_combine(capacity: int, dtype: DTypeLike) -> None:
    # All numbers of the example are exact in every dtype. Padding and tail of y are NaN.
    expected, layout = EXAMPLE_DATA[capacity], example_layout(capacity)
    y = both_channels(expected["y"], dtype)
    weights = np.array(expected["weights"], np.float32)
    weights[~layout.row_valid] = np.nan
    out = reference.combine(y, layout, weights)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, both_channels(expected["out"], dtype))
    out = reference.combine(y, layout)
    np.testing.assert_array_equal(out, both_channels(expected["out_without_weights"], dtype))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("capacity", EXAMPLE_DATA)
def test_example_gradients(capacity: int, dtype: DTypeLike) -> None:
    expected, layout = EXAMPLE_DATA[capacity], example_layout(capacity)
    y = both_channels(expected["y"], dtype)
    weights = np.array(expected["weights"], np.float32)
    g = both_channels([[1, 2, 3], [4, 5, 6]], dtype)

    d_y, d_weights = reference.combine_vjp(y, layout, weights, g)
    assert d_weights is not None
    assert d_y.dtype == dtype
    assert d_weights.dtype == (F64 if dtype == F64 else F32)
    np.testing.assert_array_equal(d_y, both_channels(expected["d_y"], dtype))
    np.testing.assert_array_equal(d_weights, expected["d_weights"])

    d_y, nothing = reference.combine_vjp(y, layout, None, g)
    assert nothing is None
    np.testing.assert_array_equal(d_y, both_channels(expected["d_y_without_weights"], dtype))

    row_numbers = np.outer([1, 10], np.arange(1, capacity + 1))
    d_x, d_topk_weights = reference.dispatch_vjp(
        layout, both_channels(row_numbers, dtype), row_numbers.astype(np.float32)
    )
    assert d_x.dtype == dtype
    np.testing.assert_array_equal(d_x, both_channels(expected["d_x"], dtype))
    assert d_topk_weights is not None
    assert_same_bits(d_topk_weights, np.array(expected["d_topk_weights"], np.float32))

    _, nothing = reference.dispatch_vjp(layout, both_channels(row_numbers, dtype))
    assert nothing is None


def test_example_specified_rows() -> None:
    assert reference.specified_rows(example_layout(6)).all()
    layout = example_layout(6, zero_tail=False)
    assert layout.zero_tail is False
    expected = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], np.bool_)
    assert_same_bits(reference.specified_rows(layout), expected)


def test_layout_keeps_its_own_ids() -> None:
    ids = EXAMPLE_IDS.copy()
    layout = reference.make_layout(ids, num_experts=4)
    ids[:] = -1
    assert_same_bits(layout.topk_idx, EXAMPLE_IDS)


def test_same_expert_twice_makes_two_rows() -> None:
    ids = np.array([[[1, 1, 0]], [[1, -1, 1]]], np.int32)
    layout = reference.make_layout(ids, num_experts=4, capacity=5)
    assert_same_bits(layout.send_row, np.array([[[1, 2, 0]], [[3, -1, 4]]], np.int32))
    x = np.array([[[3.0]], [[5.0]]], np.float32)
    tokens, _ = reference.dispatch(x, layout)
    assert tokens[0, :, 0].tolist() == [3, 3, 3, 5, 5]
    assert reference.combine(tokens, layout).tolist() == [[[9.0]], [[10.0]]]


# The generators of routings.py --------------------------------------------------------------------


@pytest.mark.parametrize("case", routings.STATIC_SIZES, ids=str)
@pytest.mark.parametrize("kind", routings.ROUTING_KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_routing_kinds_are_what_they_say(kind: str, case: routings.Case, seed: int) -> None:
    ids = routings.topk_ids(np.random.default_rng(seed), case, kind)
    assert ids.dtype == np.int32
    assert ids.shape == (case.num_ranks, case.num_tokens, case.top_k)
    ordered = np.sort(ids, axis=-1)
    has_repeat = (ordered[..., 1:] == ordered[..., :-1]).any(axis=-1)
    legal = (ids >= 0) & (ids < case.num_experts)
    if kind in ("uniform", "zipf", "one_expert", "repeated"):
        assert legal.all()
    if kind in ("uniform", "zipf"):
        assert not has_repeat.any()
    if kind == "one_expert":
        assert (ids == ids[0, 0, 0]).all()
    if kind == "empty_ranks":
        ranks = set((ids[legal] // case.num_local_experts).tolist())
        assert len(ranks) < case.num_ranks
        assert (len(ranks) > 0) == (case.num_ranks > 1)
    if kind == "nowhere":
        assert (ids == -1).all(axis=-1).any()
        assert (legal | (ids == -1)).all()
    if kind == "silent_ranks":
        silent = (ids == -1).all(axis=(1, 2))
        assert silent.any()
        assert silent.all() == (case.num_ranks == 1)
    if kind == "invalid":
        assert (~legal & (ids != -1)).any()
    if kind == "repeated" and case.top_k > 1:
        assert has_repeat.all()


def test_zipf_is_skewed() -> None:
    case = routings.STATIC_SIZES[-1]
    load = {
        kind: np.bincount(
            routings.topk_ids(np.random.default_rng(0), case, kind).reshape(-1),
            minlength=case.num_experts,
        )
        for kind in ("uniform", "zipf")
    }
    assert load["zipf"].max() > 2 * load["uniform"].max()


@few
@given(routed_cases())
def test_capacities_are_what_they_say(routed: RoutedCase) -> None:
    case, ids = routed.case, routed.topk_idx
    found = routings.capacities(ids, case)
    assert set(found) <= set(routings.CAPACITY_KINDS)
    assert all(capacity % case.expert_alignment == 0 < capacity for capacity in found.values())
    layouts = {
        name: case.with_capacity(capacity).reference_layout(ids) for name, capacity in found.items()
    }
    exact = layouts["exact"]
    assert exact.num_dropped.sum() == 0
    assert found["default"] == case.default_capacity
    assert found["minimum"] == case.expert_alignment <= found["far_under"] <= found["exact"]
    if found["exact"] > case.expert_alignment:
        assert exact.group_sizes.sum(axis=1).max() == found["exact"]
        assert layouts["one_unit_under"].num_dropped.sum() > 0
    else:
        assert "one_unit_under" not in found
    for name, partial in (("inside_group", True), ("between_groups", False)):
        if name in found:
            # The group at the cut: some of its rows kept, or none of them and all of those before.
            kept_rows = np.minimum(layouts[name].group_sizes, exact.expert_counts)
            cut = (kept_rows < exact.expert_counts) & (exact.expert_counts > 0)
            if partial:
                assert (cut & (kept_rows > 0)).any()
            else:
                at_start = np.cumsum(exact.group_sizes, axis=1) - exact.group_sizes == found[name]
                assert (cut & (kept_rows == 0) & at_start).any()


# Invariants of the layout -------------------------------------------------------------------------


@few
@given(routed_cases())
def test_layout_invariants(routed: RoutedCase) -> None:
    case, layout = routed.case, routed.reference_layout()
    num_tokens, top_k, alignment = case.num_tokens, case.top_k, case.expert_alignment
    assert layout.capacity == case.capacity
    ids = routed.topk_idx.reshape(-1).tolist()
    rows_of_rank: list[list[tuple[int, int]]] = [[] for _ in range(case.num_ranks)]
    for source, expert in enumerate(ids):
        if 0 <= expert < case.num_experts:
            rows_of_rank[expert // case.num_local_experts].append((expert, source))

    send_row = layout.send_row.reshape(-1)
    times_received = np.zeros(len(ids), np.int64)
    for rank, rows in enumerate(rows_of_rank):
        rows.sort()  # by expert, then by source rank, token and k
        start, expected_src = 0, [-1] * layout.capacity
        for local in range(case.num_local_experts):
            expert = rank * case.num_local_experts + local
            sources = [source for e, source in rows if e == expert]
            padded = -(-len(sources) // alignment) * alignment
            for row, source in enumerate(sources, start):
                assert send_row[source] == (row if row < layout.capacity else -1)
                if row < layout.capacity:
                    expected_src[row] = source
            inside = min(start + padded, layout.capacity) - min(start, layout.capacity)
            assert layout.group_sizes[rank, local] == inside
            assert layout.expert_counts[rank, local] == len(sources)
            assert (layout.expert_load[:, expert] == len(sources)).all()
            start += padded
        assert layout.recv_src[rank].tolist() == expected_src

        kept = [source for source in expected_src if source >= 0]
        times_received[kept] += 1
        # Drops fall last: what is kept is a prefix of the ordered rows.
        assert kept == [source for _, source in rows[: len(kept)]]
        assert layout.num_recv[rank] == len(kept)
        assert layout.num_dropped[rank] == len(rows) - len(kept)
        order = layout.recv_order[rank]
        assert layout.recv_src[rank, order[: len(kept)]].tolist() == sorted(kept)
        assert (order[len(kept) :] == -1).all()

        bad = [
            e for e in routed.topk_idx[rank].reshape(-1).tolist() if not -1 <= e < case.num_experts
        ]
        assert layout.num_invalid[rank] == len(bad)

    # Every kept choice has exactly one row, and no other choice has any.
    assert_same_bits(times_received.reshape(-1, num_tokens, top_k) == 1, layout.kept)
    assert times_received.max() <= 1
    assert (layout.group_sizes % alignment == 0).all()
    assert (layout.group_sizes.sum(axis=1) <= layout.capacity).all()
    assert_same_bits(layout.row_valid, layout.recv_src >= 0)


@few
@given(
    routed_cases(kinds=("uniform", "zipf", "empty_ranks", "nowhere"), capacity_kinds=("default",))
)
def test_default_capacity_holds_distinct_experts(routed: RoutedCase) -> None:
    ordered = np.sort(routed.topk_idx, axis=-1)
    repeats = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if not repeats.any():
        assert routed.reference_layout().num_dropped.sum() == 0


def test_default_capacity_is_attained() -> None:
    # Every token of both ranks takes both experts of rank 1: no row to spare.
    ids = np.tile(np.array([2, 3, 0], np.int32), (2, 4, 1))
    layout = reference.make_layout(ids, num_experts=4)
    assert layout.capacity == 2 * 4 * 2
    assert layout.num_recv.tolist() == [8, 16]


def test_no_routed_token() -> None:
    layout = reference.make_layout(np.full((2, 3, 2), -1, np.int32), num_experts=4, capacity=5)
    assert layout.num_recv.tolist() == layout.num_dropped.tolist() == [0, 0]
    tokens, _ = reference.dispatch(np.full((2, 3, 4), np.nan, np.float32), layout)
    assert_same_bits(tokens, np.zeros((2, 5, 4), np.float32))
    out = reference.combine(np.full((2, 5, 4), np.nan, np.float32), layout)
    assert_same_bits(out, np.zeros((2, 3, 4), np.float32))


# Dispatch and collect -----------------------------------------------------------------------------


@few
@given(routed_cases(), st.sampled_from([BF16, F16, F32, F64, np.int8, np.int32, np.int64, FP8]))
def test_dispatch_copies_bits(routed: RoutedCase, dtype: DTypeLike) -> None:
    case, layout, rng = routed.case, routed.reference_layout(), routed.rng
    shape = (case.num_ranks, case.num_tokens, case.hidden)
    itemsize = np.dtype(dtype).itemsize
    raw = routings.random_rows(rng, (*shape, itemsize), np.uint8)  # any bits: all NaN payloads too
    topk_weights = routings.random_weights(rng, case)
    tokens, weights = reference.dispatch(
        raw.view(dtype)[..., 0], layout, None if dtype == F64 else topk_weights
    )
    assert tokens.dtype == dtype
    expected = np.zeros((case.num_ranks, layout.capacity, case.hidden, itemsize), np.uint8)
    expected_weights = np.zeros((case.num_ranks, layout.capacity), np.float32)
    for (rank, token, k), row in np.ndenumerate(layout.send_row):
        if row >= 0:
            expert_rank = layout.topk_idx[rank, token, k] // case.num_local_experts
            expected[expert_rank, row] = raw[rank, token]
            expected_weights[expert_rank, row] = topk_weights[rank, token, k]
    assert_same_bits(tokens[..., None].view(np.uint8), expected)
    if weights is None:
        assert dtype == F64
    else:
        assert_same_bits(weights, expected_weights)
        # collect is the way back.
        assert_same_bits(
            reference.collect(weights, layout),
            np.where(layout.kept, topk_weights, np.float32(0)),
        )


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_dispatch_casts_weights(dtype: DTypeLike) -> None:
    topk_weights = EXAMPLE_WEIGHTS.astype(dtype)
    _, weights = reference.dispatch(EXAMPLE_X, example_layout(6), topk_weights)
    assert weights is not None
    assert_same_bits(weights, np.array(EXAMPLE_DATA[6]["weights"], np.float32))


def test_float64_weights_stay_float64() -> None:
    third = np.full(EXAMPLE_IDS.shape, 1 / 3)
    _, weights = reference.dispatch(EXAMPLE_X.astype(np.float64), example_layout(6), third)
    assert weights is not None
    assert weights.dtype == np.float64
    assert weights[0, 0] == 1 / 3
    assert reference.collect(weights, example_layout(6))[0, 0, 0] == 1 / 3


def test_collect_ignores_padding_and_tail() -> None:
    layout = example_layout(6)
    values = np.where(layout.row_valid, np.float32(1), np.float32(np.nan))
    assert_same_bits(reference.collect(values, layout), layout.kept.astype(np.float32))


# The rounding of combine --------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("source_rank", range(3))
def test_combine_rounding(name: str, source_rank: int) -> None:
    dtype, choices, weights, expected = ROUNDINGS[name]
    # Three ranks. Choice k goes to local expert K - 1 - k, so that on each rank the order of the
    # rows is the reverse of the order of k. All rows but the token's own, padding included, are
    # NaN; a rank without one adds nothing.
    top_k = len(choices)
    ids = np.full((3, 2, top_k), -1, np.int32)
    ids[source_rank, 1] = [rank * top_k + top_k - 1 - k for k, (rank, _) in enumerate(choices)]
    layout = reference.make_layout(ids, num_experts=3 * top_k, expert_alignment=4)
    y = np.full((3, layout.capacity, 1), np.nan, dtype)
    row_weights = np.full((3, layout.capacity), np.nan, np.float32)
    for k, (rank, value) in enumerate(choices):
        row = layout.send_row[source_rank, 1, k]
        y[rank, row] = value
        if np.isfinite(value):
            assert y[rank, row, 0] == value, "the test's value must be exact"
        if weights is not None:
            row_weights[rank, row] = weights[k]
    out = reference.combine(y, layout, None if weights is None else row_weights)
    expected_out = np.zeros((3, 2, 1), dtype)
    expected_out[source_rank, 1] = expected
    assert_same_bits(out, expected_out)


def combine_by_loops(
    y: NDArray[Any], layout: reference.ReferenceLayout, weights: NDArray[Any] | None
) -> NDArray[Any]:
    """The contract's sentence about combine, word by word."""
    num_local_experts = layout.num_experts // layout.num_ranks
    out = np.zeros((layout.num_ranks, layout.num_tokens, y.shape[-1]), y.dtype)
    for source_rank, token in np.ndindex(*out.shape[:2]):
        total = np.zeros(y.shape[-1], np.float32)
        for rank in range(layout.num_ranks):
            on_rank, any_row = np.zeros(y.shape[-1], np.float32), False
            for k in range(layout.top_k):
                expert = int(layout.topk_idx[source_rank, token, k])
                row = int(layout.send_row[source_rank, token, k])
                if row < 0 or expert // num_local_experts != rank:
                    continue
                any_row = True
                product = y[rank, row].astype(np.float32)
                if weights is not None:
                    product = weights[rank, row] * product
                on_rank = on_rank + product
            if any_row:
                total = total + on_rank.astype(y.dtype).astype(np.float32)
        out[source_rank, token] = total.astype(y.dtype)
    return out


@few
@given(routed_cases(), st.sampled_from([BF16, F16, F32]), st.booleans())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_combine_equals_loops(routed: RoutedCase, dtype: DTypeLike, weighted: bool) -> None:
    layout, rng = routed.reference_layout(), routed.rng
    shape = (layout.num_ranks, layout.capacity, 8)
    y = routings.random_rows(rng, shape, dtype, specials=True)
    y[~layout.row_valid] = np.nan
    weights = None
    if weighted:
        _, weights = reference.dispatch(
            np.zeros((layout.num_ranks, layout.num_tokens, 1), np.float32),
            layout,
            routings.random_weights(rng, routed.case),
        )
    assert_same_bits(reference.combine(y, layout, weights), combine_by_loops(y, layout, weights))


@few
@given(routed_cases(), st.sampled_from([BF16, F16, F32, F64]))
def test_combine_without_weights_is_combine_with_ones(routed: RoutedCase, dtype: DTypeLike) -> None:
    layout = routed.reference_layout()
    y = routings.random_rows(
        routed.rng, (layout.num_ranks, layout.capacity, 8), dtype, specials=True
    )
    ones = np.ones((layout.num_ranks, layout.capacity), np.float32)
    assert_same_bits(reference.combine(y, layout), reference.combine(y, layout, ones))


# Against the dense layer --------------------------------------------------------------------------


def expert_rows(
    layout: reference.ReferenceLayout,
    tokens: NDArray[Any],
    expert_fn: Callable[[int, NDArray[np.float64]], NDArray[Any]],
    num_outputs: int,
    dtype: DTypeLike,
) -> NDArray[Any]:
    """Applies the experts group by group, as a user would. Padding and tail become NaN."""
    y = np.full((*tokens.shape[:2], num_outputs), np.nan, dtype)
    num_local_experts = layout.num_experts // layout.num_ranks
    for rank in range(layout.num_ranks):
        start = 0
        for local, size in enumerate(layout.group_sizes[rank].tolist()):
            rows = tokens[rank, start : start + size].astype(np.float64)
            expert = rank * num_local_experts + local
            y[rank, start : start + size] = expert_fn(expert, rows).astype(dtype)
            start += size
    y[~layout.row_valid] = np.nan
    return y


def fits_capacity() -> st.SearchStrategy[RoutedCase]:
    return routed_cases(capacity_kinds=("exact",))


@few
@given(fits_capacity(), st.sampled_from([BF16, F16, F32, F64]))
def test_equals_dense_moe(routed: RoutedCase, dtype: DTypeLike) -> None:
    case, layout, rng = routed.case, routed.reference_layout(), routed.rng
    assert layout.num_dropped.sum() == 0
    x = routings.random_rows(rng, (case.num_ranks, case.num_tokens, case.hidden), dtype)
    topk_weights = routings.random_weights(rng, case)
    shift = rng.standard_normal((case.num_experts, case.hidden))

    def expert_fn(expert: int, rows: NDArray[np.float64]) -> NDArray[Any]:
        """An elementwise expert whose result is rounded to y's dtype, here and in the dense layer.

        Rounded to 20 bits first, so that a last-bit difference of tanh between batch shapes cannot
        become a difference in dtype.
        """
        result = np.round((np.tanh(rows) + shift[expert]) * 2.0**20) * 2.0**-20
        return np.asarray(result[:, : case.hidden // 2].astype(dtype).astype(np.float64))

    tokens, weights = reference.dispatch(x, layout, topk_weights)
    y = expert_rows(layout, tokens, expert_fn, case.hidden // 2, dtype)
    out = reference.combine(y, layout, weights).astype(np.float64)
    dense = reference.moe_dense(x, routed.topk_idx, topk_weights, expert_fn, case.num_experts)
    assert dense.shape == (case.num_ranks, case.num_tokens, case.hidden // 2)

    # With unit roundoffs u of y's dtype and v of the arithmetic, a row's term passes one product,
    # at most K sums on its rank, a rounding to u, at most R sums, and a rounding to u: its relative
    # error is below (1 + v)**(1 + K + R) * (1 + u)**2 - 1. A rounding that ends in a subnormal is
    # off by at most half of the smallest one, and there is one for each rank and one at the end.
    # The dense sum itself has K products and K sums in float64.
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    u = float(info.eps) / 2
    v = 2.0**-53 if dtype == F64 else 2.0**-24
    operations = 1 + case.top_k + case.num_ranks
    relative = (1 + v) ** operations * (1 + u) ** 2 - 1 + 2 * case.top_k * 2.0**-53
    absolute = (case.num_ranks + 1) * float(info.smallest_subnormal) / 2
    magnitude = reference.moe_dense(
        x,
        routed.topk_idx,
        topk_weights,
        lambda expert, rows: np.abs(expert_fn(expert, rows)),
        case.num_experts,
    )
    assert (np.abs(out - dense) <= relative * magnitude + absolute).all()


def test_moe_dense_by_hand() -> None:
    out = reference.moe_dense(
        EXAMPLE_X.astype(BF16),
        EXAMPLE_IDS,
        EXAMPLE_WEIGHTS,
        lambda expert, rows: rows[:, :1] * (expert + 1),
        num_experts=4,
    )
    assert_same_bits(out, np.array([[1.25, 8, 36], [1232, 4608, 0]], np.float64)[..., None])


def test_moe_dense_counts_a_repeated_expert_twice() -> None:
    ids = np.array([[[1, 1]]], np.int32)
    weights = np.array([[[1.0, 2.0]]], np.float32)
    out = reference.moe_dense(np.ones((1, 1, 1)), ids, weights, lambda e, rows: rows * 5, 2)
    assert_same_bits(out, np.array([[[15.0]]]))


# Gradients ----------------------------------------------------------------------------------------
# dispatch is linear, combine is linear in y and in weights. For a linear f the central difference
# f(a + d) - f(a - d) = 2 f(d) has no truncation error, whatever the step. What is left is float64
# rounding: fewer than 2**12 operations on terms whose magnitudes are summed in `scale`.

LINEAR_TOLERANCE = 2.0**12 * 2.0**-53


@few
@given(routed_cases())
def test_combine_vjp_is_the_derivative(routed: RoutedCase) -> None:
    layout, rng = routed.reference_layout(), routed.rng
    shape = (layout.num_ranks, layout.capacity, 8)
    y, y_step = rng.standard_normal(shape), rng.standard_normal(shape)
    weights, weights_step = rng.standard_normal(shape[:2]), rng.standard_normal(shape[:2])
    g = rng.standard_normal((layout.num_ranks, layout.num_tokens, 8))

    def loss(y: NDArray[Any], weights: NDArray[Any] | None) -> float:
        return float(np.sum(g * reference.combine(y, layout, weights)))

    def largest(y: NDArray[Any], weights: NDArray[Any]) -> float:
        return float(np.sum(np.abs(g) * reference.combine(np.abs(y), layout, np.abs(weights))))

    scale = largest(np.abs(y) + np.abs(y_step), np.abs(weights) + np.abs(weights_step))
    scale += largest(np.abs(y) + np.abs(y_step), np.ones_like(weights))
    d_y, d_weights = reference.combine_vjp(y, layout, weights, g)
    assert d_weights is not None
    assert d_y.dtype == d_weights.dtype == np.float64
    assert not d_y[~layout.row_valid].any()
    assert not d_weights[~layout.row_valid].any()

    along_y = (loss(y + y_step, weights) - loss(y - y_step, weights)) / 2
    assert abs(along_y - np.sum(d_y * y_step)) <= LINEAR_TOLERANCE * scale
    along_w = (loss(y, weights + weights_step) - loss(y, weights - weights_step)) / 2
    assert abs(along_w - np.sum(d_weights * weights_step)) <= LINEAR_TOLERANCE * scale

    d_y, _ = reference.combine_vjp(y, layout, None, g)
    assert not d_y[~layout.row_valid].any()
    along_y = (loss(y + y_step, None) - loss(y - y_step, None)) / 2
    assert abs(along_y - np.sum(d_y * y_step)) <= LINEAR_TOLERANCE * scale


@few
@given(routed_cases())
def test_dispatch_vjp_is_the_derivative(routed: RoutedCase) -> None:
    layout, rng = routed.reference_layout(), routed.rng
    x = rng.standard_normal((layout.num_ranks, layout.num_tokens, 8))
    topk_weights = rng.standard_normal(layout.topk_idx.shape)
    # Cotangents on padding and tail are NaN: they must not reach anything.
    d_tokens = rng.standard_normal((layout.num_ranks, layout.capacity, 8))
    d_weights = rng.standard_normal((layout.num_ranks, layout.capacity))
    valid = layout.row_valid
    d_tokens[~valid] = d_weights[~valid] = np.nan

    d_x, d_topk_weights = reference.dispatch_vjp(layout, d_tokens, d_weights)
    tokens, weights = reference.dispatch(x, layout, topk_weights)
    assert d_topk_weights is not None
    assert weights is not None
    along_x, along_w = np.sum(tokens[valid] * d_tokens[valid]), np.sum((weights * d_weights)[valid])
    scale = np.sum(np.abs(tokens[valid] * d_tokens[valid]))
    scale += np.sum(np.abs((weights * d_weights)[valid]))
    assert abs(along_x - np.sum(d_x * x)) <= LINEAR_TOLERANCE * scale
    assert abs(along_w - np.sum(d_topk_weights * topk_weights)) <= LINEAR_TOLERANCE * scale
    assert not d_topk_weights[~layout.kept].any()


def test_moe_gradient_numerically() -> None:
    """The chain of both closed forms against central differences of the dense layer.

    The step h = 1e-5 truncates at h**2 / 6 times a third derivative of about 10, and rounds at
    2**-53 / h times a loss of about 10: both near 1e-10. The tolerance is 1e-8.
    """
    rng = np.random.default_rng(0)
    hidden, num_outputs, step = 4, 3, 1e-5
    x = rng.standard_normal((2, 3, hidden))
    topk_weights = rng.standard_normal(EXAMPLE_IDS.shape)
    matrices = rng.standard_normal((4, hidden, num_outputs)) / 2
    g = rng.standard_normal((2, 3, num_outputs))

    def expert_fn(expert: int, rows: NDArray[np.float64]) -> NDArray[Any]:
        return np.asarray(np.tanh(rows @ matrices[expert]))

    def loss(x: NDArray[np.float64], topk_weights: NDArray[np.float64]) -> float:
        return float(np.sum(g * reference.moe_dense(x, EXAMPLE_IDS, topk_weights, expert_fn, 4)))

    def central_differences(
        f: Callable[[NDArray[np.float64]], float], at: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        slopes = np.zeros_like(at)
        for place in np.ndindex(*at.shape):
            probe = np.zeros_like(at)
            probe[place] = step
            slopes[place] = (f(at + probe) - f(at - probe)) / (2 * step)
        return slopes

    layout = example_layout(6)
    tokens, weights = reference.dispatch(x, layout, topk_weights)
    y = expert_rows(layout, tokens, expert_fn, num_outputs, np.float64)
    assert abs(np.sum(g * reference.combine(y, layout, weights)) - loss(x, topk_weights)) < 1e-12

    d_y, d_row_weights = reference.combine_vjp(y, layout, weights, g)
    d_tokens = np.zeros_like(tokens)
    for rank, row in np.argwhere(layout.row_valid):
        expert = EXAMPLE_IDS.reshape(-1)[layout.recv_src[rank, row]]
        d_tokens[rank, row] = matrices[expert] @ (d_y[rank, row] * (1 - y[rank, row] ** 2))
    d_x, d_topk_weights = reference.dispatch_vjp(layout, d_tokens, d_row_weights)

    expected_d_x = central_differences(lambda x: loss(x, topk_weights), x)
    expected_d_w = central_differences(lambda w: loss(x, w), topk_weights)
    assert np.abs(expected_d_x).max() > 0.1
    assert np.abs(expected_d_w).max() > 0.1
    assert d_topk_weights is not None
    assert np.abs(d_x - expected_d_x).max() < 1e-8
    assert np.abs(d_topk_weights - expected_d_w).max() < 1e-8


def test_combine_vjp_rounds_the_product_to_the_dtype_of_y() -> None:
    # bf16 has spacing 2**-7 beside 1 and 2**-6 beside 3. With g = 1, 1 + 2**-8 is a tie, to even,
    # and a little more rounds up. With g = 3, 3 + 3 * 2**-8 rounds up to 3 + 2**-6; a weight that
    # had been rounded to bf16 itself would be 1.
    layout = reference.make_layout(np.array([[[0, 1]]], np.int32), num_experts=2)
    y = np.zeros((1, 2, 2), BF16)
    weights = np.array([[1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-23]], np.float32)
    d_y, _ = reference.combine_vjp(y, layout, weights, np.array([[[1.0, 3.0]]], BF16))
    expected = [[[1.0, 3.0 + 2.0**-6], [1.0 + 2.0**-7, 3.0 + 2.0**-6]]]
    assert_same_bits(d_y, np.array(expected, BF16))


def test_combine_vjp_keeps_float32_weight_gradients() -> None:
    # The dot product 1 + 2**-8 is no bf16.
    layout = reference.make_layout(np.array([[[0]]], np.int32), num_experts=1)
    y = np.array([[[1.0, 2.0**-8, -0.0]]], BF16)
    g = np.array([[[1.0, 1.0, 3.0]]], BF16)
    _, d_weights = reference.combine_vjp(y, layout, np.zeros((1, 1), np.float32), g)
    assert d_weights is not None
    assert_same_bits(d_weights, np.array([[1 + 2.0**-8]], np.float32))


# fp8 ----------------------------------------------------------------------------------------------


def group(values: Sequence[float], dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """One group of 128 channels: the values, then zeros."""
    row = np.zeros(128, dtype)
    row[: len(values)] = values
    return row


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
def test_quantize_rounds_to_nearest_even(scale_format: Any) -> None:
    # With a 448 in each group both scale and inverse are exactly 1, and what remains is the
    # conversion. Codes 0..126 of e4m3fn are its non-negative finite numbers in ascending order.
    numbers = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    assert [numbers[0], numbers[1], numbers[126]] == [0, 2.0**-9, 448]
    assert (np.diff(numbers) > 0).all()
    values, codes = list(numbers), list(range(127))
    for code, (low, high) in enumerate(itertools.pairwise(numbers)):
        middle = (low + high) / 2  # exact
        values += [np.nextafter(middle, low), middle, np.nextafter(middle, high)]
        codes += [code, code + code % 2, code + 1]
    values += [-value for value in values]
    codes += [code + 128 for code in codes]
    for start in range(0, len(values), 127):
        part = values[start : start + 127]
        q, scales = reference.quantize(group([*part, 448.0]), scale_format=scale_format)
        assert_same_bits(scales, np.ones(1, np.float32))
        assert q.view(np.uint8)[: len(part)].tolist() == codes[start : start + 127]


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (np.nextafter(np.float32(448), np.float32(449)), 2.0),  # the quotient rounds to 1 + 2**-23
        (449.0, 2.0),
        (896.0, 2.0),
        (56.0, 2.0**-3),
        (1.0, 2.0**-8),  # 2**-9 = 1 / 512 < 1 / 448 <= 2**-8
        (2.0**-100, 2.0**-108),  # the floor: 2**-109 < 2**-100 / 448 <= 2**-108
        (0.0, 2.0**-108),
        (F32_MAX, 2.0**120),  # 2**119 < (2**128 - 2**104) / 448 <= 2**120
    ],
)
def test_quantize_power_of_two_scale(amax: float, scale: float) -> None:
    q, scales = reference.quantize(group([0.0, -amax]), scale_format="power_of_two")
    assert_same_bits(scales, np.array([scale], np.float32))
    # The division by a power of two is exact here, so only e4m3fn's own rounding remains.
    assert q[1] == np.float32(-amax / scale).astype(FP8)


@pytest.mark.parametrize("amax", [448.0, 1.0, 3.0, 2.0**-99, 1e30, F32_MAX])
def test_quantize_f32_scale(amax: float) -> None:
    q, scales = reference.quantize(group([amax, -amax, amax / 2]), scale_format="float32")
    assert_same_bits(scales, np.array([np.float32(amax) / np.float32(448)], np.float32))
    assert q[:3].astype(np.float32).tolist() == [448, -448, 224]


def test_quantize_multiplies_by_the_rounded_inverse() -> None:
    # 448 / 13 rounds up by 1.76e-6 in float32. 9.75 times that is 1.72e-5 above 336, more than half
    # the spacing 2**-15 = 3.05e-5 there, so it is no longer the tie between 320 and 352. (Division
    # by the scale would give 336, and 320.)
    q, _ = reference.quantize(group([13.0, 9.75]), scale_format="float32")
    assert q[:2].astype(np.float32).tolist() == [448, 352]
    # 448 / 31 rounds down by 4.3e-7; 23.25 times that is 1.0e-5 below 336, which rounds to 336: a
    # tie, to even.
    q, _ = reference.quantize(group([31.0, 23.25]), scale_format="float32")
    assert q[:2].astype(np.float32).tolist() == [448, 320]


def test_quantize_floors_the_largest_magnitude() -> None:
    # Below 2**-100 the scale is that of 2**-100, and a zero group stays zero with its signs.
    floor = np.float32(2.0**-100)
    for values, codes in (([0.0, -0.0], [0, 128]), ([2.0**-149, -(2.0**-149)], [0, 128])):
        q, scales = reference.quantize(group(values), scale_format="float32")
        assert_same_bits(scales, np.array([floor / np.float32(448)], np.float32))
        assert q.view(np.uint8)[:2].tolist() == codes
    # Half of the floor has half of the largest number.
    q, _ = reference.quantize(group([2.0**-101]), scale_format="float32")
    assert float(q[0]) == 224


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_quantize_groups_are_independent(scale_format: Any, dtype: DTypeLike) -> None:
    rng = np.random.default_rng(3)
    x = routings.random_rows(rng, (2, 3, 384), dtype)
    q, scales = reference.quantize(x, scale_format=scale_format)
    assert q.dtype == FP8
    assert q.shape == x.shape
    assert scales.dtype == np.float32
    assert scales.shape == (2, 3, 3)
    for place in np.ndindex(2, 3, 3):
        channels = slice(place[2] * 128, place[2] * 128 + 128)
        one = x[place[0], place[1], channels].astype(np.float32)
        q_one, scale_one = reference.quantize(one, scale_format=scale_format)
        assert_same_bits(q[place[0], place[1], channels].view(np.uint8), q_one.view(np.uint8))
        assert_same_bits(scales[place], scale_one[0])
        assert np.abs(one).max() > 0
        # The largest magnitude lands in the top binade, so no range is given away.
        assert np.abs(q_one.astype(np.float32)).max() >= 224


@few
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([BF16, F16, F32]),
    st.sampled_from(["float32", "power_of_two"]),
    st.integers(-6, 6),
)
def test_quantization_error_is_bounded(
    seed: int, dtype: DTypeLike, scale_format: Any, exponent: int
) -> None:
    # e4m3fn has 4 significant bits: a normal number is off by at most 2**-4 of itself, a subnormal
    # (spacing 2**-9) by at most 2**-10, in units of the scale. Scale, inverse and two products are
    # float32, each off by 2**-24: below 2**-21 together, also of the rounded value.
    x = (
        routings.random_rows(np.random.default_rng(seed), (4, 256), np.float32) * 2.0**exponent
    ).astype(dtype)
    q, scales = reference.quantize(x, scale_format=scale_format)
    back = reference.dequantize(q, scales, np.float32).astype(np.float64)
    exact = x.astype(np.float64)
    step = np.repeat(scales.astype(np.float64), 128, axis=-1)
    bound = np.maximum(2.0**-4 * np.abs(exact), 2.0**-10 * step) + 2.0**-20 * np.abs(exact)
    assert (np.abs(back - exact) <= bound).all()
    amax = np.abs(exact).reshape(4, 2, 128).max(axis=-1)
    if scale_format == "power_of_two":
        assert (np.frexp(scales)[0] == 0.5).all()
        quotient = (amax.astype(np.float32) / np.float32(448)).astype(np.float64)
        assert ((scales >= quotient) & (scales / 2 < quotient)).all()


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
def test_quantize_nan(scale_format: Any) -> None:
    # NaN does not count for the scale, wherever it stands, and stays NaN.
    for place in (0, 1, 127):
        x = group([3.0, -448.0, 5.0])
        x[place] = np.nan
        without = np.where(np.isnan(x), np.float32(0), x)
        q, scales = reference.quantize(x, scale_format=scale_format)
        q_without, scales_without = reference.quantize(without, scale_format=scale_format)
        assert_same_bits(scales, scales_without)
        others = np.arange(128) != place
        assert np.isnan(q[place])
        assert_same_bits(q.view(np.uint8)[others], q_without.view(np.uint8)[others])
        assert np.isnan(reference.dequantize(q, scales, BF16)[place])
    q, scales = reference.quantize(np.full(128, np.nan, np.float32), scale_format=scale_format)
    assert np.isnan(q).all()
    _, scales_of_zeros = reference.quantize(group([]), scale_format=scale_format)
    assert_same_bits(scales, scales_of_zeros)


@pytest.mark.parametrize("scale_format", ["float32", "power_of_two"])
@pytest.mark.parametrize("sign", [1, -1])
def test_quantize_infinity(scale_format: Any, sign: int) -> None:
    x = np.concatenate([group([1.0, sign * np.inf, -2.0, np.nan]), group([448.0])])
    q, scales = reference.quantize(x, scale_format=scale_format)
    assert_same_bits(scales, np.array([np.inf, 1.0], np.float32))
    codes = q.view(np.uint8)
    assert np.isnan(q[1])
    assert np.isnan(q[3])
    assert codes[[0, 2, 4]].tolist() == [0, 128, 0]
    back = reference.dequantize(q, scales)
    assert np.isnan(back[:128]).all()
    assert back[128] == 448


def test_dequantize_rounds_once() -> None:
    # bf16: 2 * (1 + 2**-8) is a tie beside 2, to even; 3 + 3 * 2**-8 rounds up to 3 + 2**-6, and
    # would be 3 if the scale were rounded to bf16 first.
    q = group([2.0, 1.0, 3.0, -0.0]).astype(FP8)
    scales = np.array([1 + 2.0**-8], np.float32)
    back = reference.dequantize(q, scales, BF16)
    assert_same_bits(back[:3], np.array([2.0, 1.0, 3.0 + 2.0**-6], BF16))
    scales = np.array([1 + 2.0**-23], np.float32)
    back = reference.dequantize(q, scales)
    assert back.dtype == np.float32
    # Exact is 3 + 3 * 2**-23 between 3 + 2**-22 and 3 + 2**-21; the even neighbour is the latter.
    assert back[2] == np.float32(3 + 2.0**-21)
    assert_same_bits(back[3:4], np.array([-0.0], np.float32))
    scales = np.array([2.0**15], np.float32)
    back = reference.dequantize(q, scales, F16)
    assert_same_bits(back[:2], np.array([np.inf, 2.0**15], F16))


def test_dequantize_applies_each_groups_scale() -> None:
    q = np.ones((2, 256), FP8)
    scales = np.array([[1, 2], [4, 8]], np.float32)
    back = reference.dequantize(q, scales)
    assert_same_bits(back, np.repeat(scales, 128, axis=-1))


def test_largest_numbers_dequantize_to_infinity() -> None:
    # The scale is 2**120, the quotient rounds up to 256, and 2**8 * 2**120 overflows.
    for dtype, largest in ((F32, F32_MAX), (BF16, BF16_MAX)):
        q, scales = reference.quantize(group([largest], dtype), scale_format="power_of_two")
        assert float(q[0]) == 256
        assert np.isposinf(reference.dequantize(q, scales, dtype)[0])


# What bad input gets ------------------------------------------------------------------------------


Failures = list[tuple[str, Callable[[], Any]]]

LAYOUT = example_layout(6)
Y, ROW_WEIGHTS = np.zeros((2, 6, 2), np.float32), np.zeros((2, 6), np.float32)
FP8_ROW, ONE_SCALE = np.zeros(128, FP8), np.ones(1, np.float32)


def make(topk_idx: NDArray[Any] = EXAMPLE_IDS, num_experts: int = 4, **options: Any) -> Any:
    return reference.make_layout(topk_idx, num_experts=num_experts, **options)


def dispatch(x: NDArray[Any] = EXAMPLE_X, topk_weights: Any = None) -> Any:
    return reference.dispatch(x, LAYOUT, topk_weights)


def combine(y: NDArray[Any] = Y, weights: Any = None) -> Any:
    return reference.combine(y, LAYOUT, weights)


def dispatch_vjp(d_tokens: NDArray[Any] = Y, d_weights: Any = None) -> Any:
    return reference.dispatch_vjp(LAYOUT, d_tokens, d_weights)


def combine_vjp(
    y: NDArray[Any] = Y, weights: Any = ROW_WEIGHTS, g: NDArray[Any] = EXAMPLE_X
) -> Any:
    return reference.combine_vjp(y, LAYOUT, weights, g)


def quantize(x: NDArray[Any], scale_format: Any = "float32") -> Any:
    return reference.quantize(x, scale_format=scale_format)


def dense(
    x: NDArray[Any] = EXAMPLE_X,
    topk_idx: NDArray[Any] = EXAMPLE_IDS,
    topk_weights: NDArray[Any] = EXAMPLE_WEIGHTS,
    num_experts: int = 4,
) -> Any:
    return reference.moe_dense(x, topk_idx, topk_weights, lambda _, rows: rows, num_experts)


FLOATS = "bfloat16, float16, float32 or float64"

TYPE_ERRORS: Failures = [
    ("topk_idx must be int32, got int64", lambda: make(EXAMPLE_IDS.astype(np.int64))),
    ("topk_idx must be int32, got float32", lambda: make(EXAMPLE_IDS.astype(np.float32))),
    (
        "topk_weights must be bfloat16, float16 or float32, got int32",
        lambda: dispatch(topk_weights=EXAMPLE_IDS),
    ),
    (
        "topk_weights must be bfloat16, float16 or float32, got float64",
        lambda: dispatch(topk_weights=EXAMPLE_WEIGHTS.astype(F64)),
    ),
    (f"y must be {FLOATS}, got int32", lambda: combine(Y.astype(np.int32))),
    (f"y must be {FLOATS}, got float8_e4m3fn", lambda: combine(Y.astype(FP8))),
    ("weights must be float32, got bfloat16", lambda: combine(weights=ROW_WEIGHTS.astype(BF16))),
    ("weights must be float32, got float64", lambda: combine(weights=ROW_WEIGHTS.astype(F64))),
    (
        "weights must be float32 or float64, got float16",
        lambda: combine(Y.astype(F64), ROW_WEIGHTS.astype(F16)),
    ),
    (
        "values must be float32 or float64, got int32",
        lambda: reference.collect(ROW_WEIGHTS.astype(np.int32), LAYOUT),
    ),
    (f"d_tokens must be {FLOATS}, got int8", lambda: dispatch_vjp(Y.astype(np.int8))),
    (
        "d_weights must be float32 or float64, got bfloat16",
        lambda: dispatch_vjp(d_weights=ROW_WEIGHTS.astype(BF16)),
    ),
    (f"y must be {FLOATS}, got int64", lambda: combine_vjp(Y.astype(np.int64))),
    ("g must be bfloat16, got float32", lambda: combine_vjp(Y.astype(BF16))),
    ("weights must be float32, got float16", lambda: combine_vjp(weights=ROW_WEIGHTS.astype(F16))),
    (
        "x must be bfloat16, float16 or float32, got float64",
        lambda: quantize(np.zeros(128)),
    ),
    (
        "q must be float8_e4m3fn, got uint8",
        lambda: reference.dequantize(np.zeros(128, np.uint8), ONE_SCALE),
    ),
    (
        "scales must be float32, got float64",
        lambda: reference.dequantize(FP8_ROW, np.ones(1)),  # type: ignore[arg-type]
    ),
    (
        "dtype must be bfloat16, float16 or float32, got int32",
        lambda: reference.dequantize(FP8_ROW, ONE_SCALE, np.int32),
    ),
    ("topk_idx must be int32, got uint32", lambda: dense(topk_idx=EXAMPLE_IDS.astype(np.uint32))),
]

VALUE_ERRORS: Failures = [
    # default_capacity(T, K, R, E, A)
    ("num_tokens must be at least 1, got 0", lambda: reference.default_capacity(0, 1, 1, 1, 1)),
    ("top_k must be at least 1, got 0", lambda: reference.default_capacity(1, 0, 1, 1, 1)),
    ("num_ranks must be at least 1, got 0", lambda: reference.default_capacity(1, 1, 0, 1, 1)),
    ("num_experts must be at least 1, got -1", lambda: reference.default_capacity(1, 1, 1, -1, 1)),
    (
        "expert_alignment must be at least 1, got 0",
        lambda: reference.default_capacity(1, 1, 1, 1, 0),
    ),
    (
        "num_experts must be a multiple of num_ranks (3), got 4",
        lambda: reference.default_capacity(1, 1, 3, 4, 1),
    ),
    (
        "top_k must be at most num_experts (4), got 5",
        lambda: reference.default_capacity(1, 5, 2, 4, 1),
    ),
    # make_layout
    ("topk_idx must be [R, T, K], got shape (3, 2)", lambda: make(EXAMPLE_IDS[0])),
    ("num_tokens must be at least 1, got 0", lambda: make(EXAMPLE_IDS[:, :0])),
    ("top_k must be at least 1, got 0", lambda: make(EXAMPLE_IDS[:, :, :0])),
    ("num_experts must be a multiple of num_ranks (2), got 5", lambda: make(num_experts=5)),
    ("top_k must be at most num_experts (4), got 6", lambda: make(np.tile(EXAMPLE_IDS, 3))),
    ("expert_alignment must be at least 1, got 0", lambda: make(expert_alignment=0)),
    (
        "capacity must be a positive multiple of expert_alignment (1), got 0",
        lambda: make(capacity=0),
    ),
    (
        "capacity must be a positive multiple of expert_alignment (4), got -4",
        lambda: make(capacity=-4, expert_alignment=4),
    ),
    (
        "capacity must be a positive multiple of expert_alignment (4), got 6",
        lambda: make(capacity=6, expert_alignment=4),
    ),
    (
        "topk_idx must have fewer than 2**31 entries, got 2147483648",
        lambda: make(np.broadcast_to(np.int32(0), (2**11, 2**11, 2**9)), 2**11, capacity=1),
    ),
    # The verbs and their gradients
    ("x must have three axes, got shape (3, 2)", lambda: dispatch(EXAMPLE_X[0])),
    ("x must have shape (2, 3, 2), got (2, 2, 2)", lambda: dispatch(EXAMPLE_X[:, :2])),
    (
        "topk_weights must have shape (2, 3, 2), got (2, 3, 1)",
        lambda: dispatch(topk_weights=EXAMPLE_WEIGHTS[:, :, :1]),
    ),
    ("y must have three axes, got shape (6, 2)", lambda: combine(Y[0])),
    ("y must have shape (2, 6, 2), got (2, 4, 2)", lambda: combine(Y[:, :4])),
    ("weights must have shape (2, 6), got (2, 3, 2)", lambda: combine(weights=EXAMPLE_WEIGHTS)),
    (
        "values must have shape (2, 6), got (2, 5)",
        lambda: reference.collect(ROW_WEIGHTS[:, :5], LAYOUT),
    ),
    ("d_tokens must have shape (2, 6, 2), got (2, 4, 2)", lambda: dispatch_vjp(Y[:, :4])),
    (
        "d_weights must have shape (2, 6), got (1, 6)",
        lambda: dispatch_vjp(d_weights=ROW_WEIGHTS[:1]),
    ),
    ("y must have shape (2, 6, 2), got (2, 3, 2)", lambda: combine_vjp(Y[:, :3])),
    ("weights must have shape (2, 6), got (1, 6)", lambda: combine_vjp(weights=ROW_WEIGHTS[:1])),
    ("g must have shape (2, 3, 2), got (2, 3, 1)", lambda: combine_vjp(g=EXAMPLE_X[:, :, :1])),
    # fp8
    (
        "x must have a last axis that is a positive multiple of 128, got shape (2, 192)",
        lambda: quantize(np.zeros((2, 192), np.float32)),
    ),
    (
        "x must have a last axis that is a positive multiple of 128, got shape (2, 0)",
        lambda: quantize(np.zeros((2, 0), np.float32)),
    ),
    (
        "scale_format must be 'float32' or 'power_of_two', got 'e8m0'",
        lambda: quantize(np.zeros(128, np.float32), "e8m0"),
    ),
    (
        "q must have a last axis that is a positive multiple of 128, got shape (64,)",
        lambda: reference.dequantize(FP8_ROW[:64], ONE_SCALE),
    ),
    (
        "scales must have shape (1,), got (2,)",
        lambda: reference.dequantize(FP8_ROW, np.ones(2, np.float32)),
    ),
    # moe_dense
    ("num_experts must be at least 1, got 0", lambda: dense(num_experts=0)),
    ("x must have three axes, got shape (3, 2)", lambda: dense(EXAMPLE_X[0])),
    (
        "topk_idx must be [R, T, K] with x's R and T (2, 3), got shape (2, 2, 2)",
        lambda: dense(topk_idx=EXAMPLE_IDS[:, :2]),
    ),
    (
        "topk_weights must have shape (2, 3, 2), got (2, 3, 1)",
        lambda: dense(topk_weights=EXAMPLE_WEIGHTS[:, :, :1]),
    ),
]


@pytest.mark.parametrize(("message", "call"), TYPE_ERRORS, ids=[m for m, _ in TYPE_ERRORS])
def test_type_errors(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(("message", "call"), VALUE_ERRORS, ids=[m for m, _ in VALUE_ERRORS])
def test_value_errors(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert str(caught.value) == message


def test_layout_is_frozen() -> None:
    layout = example_layout(6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.capacity = 8  # type: ignore[misc]


def test_bad_routing_kind() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'unifrom'"):
        routings.topk_ids(np.random.default_rng(0), routings.STATIC_SIZES[0], "unifrom")


def test_assert_same_bits_can_fail() -> None:
    zeros = np.zeros((2, 2), BF16)
    other = zeros.copy()
    other[1, 0] = -0.0
    with pytest.raises(AssertionError, match=r"1 of 4 differ. At \(1, 0\)"):
        assert_same_bits(other, zeros)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(zeros.astype(np.float16), zeros)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_bits(zeros[:1], zeros)
    nans = np.array([0x7FC0, 0xFFC1], np.uint16).view(BF16)
    assert_same_bits(nans, nans[::-1])
