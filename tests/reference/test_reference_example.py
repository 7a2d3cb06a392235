"""The NumPy oracle on the worked example: numbers written by hand."""

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import DTypeLike
from routings import assert_same_bits
from worked_example import (
    EXAMPLE_DATA,
    EXAMPLE_IDS,
    EXAMPLE_LAYOUTS,
    EXAMPLE_WEIGHTS,
    EXAMPLE_X,
    both_channels,
    example_layout,
)

from jax_ep import reference

BF16, F16, F32, F64 = ml_dtypes.bfloat16, np.float16, np.float32, np.float64


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
