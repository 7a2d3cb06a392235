"""The NumPy oracle's dispatch, collect and combine, against loops and against the dense layer."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import routings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike, NDArray
from roundings import ROUNDINGS
from routings import RoutedCase, assert_same_bits, expert_rows, oracle_examples, routed_cases
from worked_example import EXAMPLE_DATA, EXAMPLE_IDS, EXAMPLE_WEIGHTS, EXAMPLE_X, example_layout

from jax_ep import reference

BF16, F16, F32, F64 = ml_dtypes.bfloat16, np.float16, np.float32, np.float64
FP8 = ml_dtypes.float8_e4m3fn


# Dispatch and collect -----------------------------------------------------------------------------


@oracle_examples
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


@oracle_examples
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


@oracle_examples
@given(routed_cases(), st.sampled_from([BF16, F16, F32, F64]))
def test_combine_without_weights_is_combine_with_ones(routed: RoutedCase, dtype: DTypeLike) -> None:
    layout = routed.reference_layout()
    y = routings.random_rows(
        routed.rng, (layout.num_ranks, layout.capacity, 8), dtype, specials=True
    )
    ones = np.ones((layout.num_ranks, layout.capacity), np.float32)
    assert_same_bits(reference.combine(y, layout), reference.combine(y, layout, ones))


# Against the dense layer --------------------------------------------------------------------------


def fits_capacity() -> st.SearchStrategy[RoutedCase]:
    return routed_cases(capacity_kinds=("exact",))


@oracle_examples
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
