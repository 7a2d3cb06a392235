"""The NumPy oracle's order of sums where ranks lie on several nodes."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import routings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from roundings import NODE_ROUNDINGS, one_token_on_six_ranks
from routings import RoutedCase, assert_same_bits, oracle_examples, routed_cases

from jax_ep import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, on NaN and overflow

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32


@pytest.mark.parametrize("name", NODE_ROUNDINGS)
def test_rounding_by_hand(name: str) -> None:
    dtype, choices, on_nodes_of_two, alike = NODE_ROUNDINGS[name]
    ids, y = one_token_on_six_ranks(dtype, choices)
    for ranks_per_node, expected in ((1, alike), (2, on_nodes_of_two), (6, alike)):
        layout = reference.make_layout(ids, num_experts=6, ranks_per_node=ranks_per_node)
        out = reference.combine(y, layout)
        assert_same_bits(out[0, 0, :1], np.array([expected], dtype))
        # Cotangents of one row per (token, rank), in the same places.
        rows = np.full((6, 7, y.shape[-1]), np.nan, dtype)
        rows[:, 0] = y[:, 0]
        d_x, _ = reference.dispatch_vjp(layout, rows, expand=False)
        assert_same_bits(d_x, out)


def sum_by_loops(
    y: NDArray[Any], layout: reference.ReferenceLayout, weights: NDArray[Any]
) -> NDArray[Any]:
    """combine, one number after the other."""
    num_local_experts = layout.num_experts // layout.num_ranks
    out = np.zeros((layout.num_ranks, layout.num_tokens, y.shape[-1]), y.dtype)
    for source, token in np.ndindex(out.shape[:2]):
        total: Any = np.zeros(y.shape[-1], np.float32)
        for node in range(layout.num_ranks // layout.ranks_per_node):
            node_total: Any = np.zeros_like(total)
            for rank in range(layout.num_ranks):
                if rank // layout.ranks_per_node != node:
                    continue
                rank_total: Any = np.zeros_like(total)
                for k in range(layout.top_k):
                    row = layout.send_row[source, token, k]
                    if row >= 0 and layout.topk_idx[source, token, k] // num_local_experts == rank:
                        rank_total = rank_total + weights[rank, row] * y[rank, row].astype(F32)
                node_total = node_total + rank_total.astype(y.dtype).astype(F32)
            total = total + node_total.astype(y.dtype).astype(F32)
        out[source, token] = total.astype(y.dtype)
    return out


@oracle_examples
@given(routed_cases(), st.sampled_from([BF16, F16, F32]), st.data())
def test_any_routing(routed: RoutedCase, dtype: DTypeLike, data: st.DataObject) -> None:
    layout, rng = routed.reference_layout(), routed.rng
    divisors = [n for n in range(1, layout.num_ranks + 1) if layout.num_ranks % n == 0]
    n = data.draw(st.sampled_from(divisors))
    y = routings.random_rows(rng, (*layout.recv_src.shape, 8), dtype, specials=True)
    weights = rng.standard_normal(layout.recv_src.shape).astype(F32)
    on_nodes = dataclasses.replace(layout, ranks_per_node=n)
    out = reference.combine(y, on_nodes, weights)
    assert_same_bits(out, sum_by_loops(y, on_nodes, weights))
    # A rank on each node, and all on one, are the same.
    ends = [dataclasses.replace(layout, ranks_per_node=m) for m in (1, layout.num_ranks)]
    assert_same_bits(*(reference.combine(y, end, weights) for end in ends))
