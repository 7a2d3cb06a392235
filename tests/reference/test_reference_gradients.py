"""The NumPy oracle's gradients: closed forms against differences, and their roundings."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import given
from numpy.typing import NDArray
from routings import RoutedCase, assert_same_bits, expert_rows, oracle_examples, routed_cases
from worked_example import EXAMPLE_IDS, example_layout

from jax_ep import reference

BF16 = ml_dtypes.bfloat16

# dispatch is linear, combine is linear in y and in weights. For a linear f the central difference
# f(a + d) - f(a - d) = 2 f(d) has no truncation error, whatever the step. What is left is float64
# rounding: fewer than 2**12 operations on terms whose magnitudes are summed in `scale`.

LINEAR_TOLERANCE = 2.0**12 * 2.0**-53


@oracle_examples
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


@oracle_examples
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
