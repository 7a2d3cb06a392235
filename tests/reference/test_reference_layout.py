"""The NumPy oracle's layout: invariants of any routing, and a few routings by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from routings import RoutedCase, assert_same_bits, oracle_examples, routed_cases
from worked_example import EXAMPLE_IDS, example_layout

from jax_ep import reference


@oracle_examples
@given(routed_cases())
def test_layout_invariants(routed: RoutedCase) -> None:
    case, layout = routed.case, routed.reference_layout()
    num_tokens, top_k, alignment = case.num_tokens, case.top_k, case.expert_alignment
    assert layout.capacity == case.num_rows
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
            end = layout.capacity
            if case.expert_capacity is not None:
                padded = case.expert_capacity
                end = start + padded
            for row, source in enumerate(sources, start):
                assert send_row[source] == (row if row < end else -1)
                if row < end:
                    expected_src[row] = source
            inside = min(start + padded, layout.capacity) - min(start, layout.capacity)
            assert layout.group_sizes[rank, local] == inside
            assert layout.expert_counts[rank, local] == len(sources)
            assert (layout.expert_load[:, expert] == len(sources)).all()
            start += padded
        assert layout.recv_src[rank].tolist() == expected_src

        kept = [source for source in expected_src if source >= 0]
        times_received[kept] += 1
        if case.expert_capacity is None:
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


@oracle_examples
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


def test_layout_is_frozen() -> None:
    layout = example_layout(6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.capacity = 8  # type: ignore[misc]
