"""Gradients of dispatch and combine on every backend, against closed forms."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import AXIS, BACKENDS, Backend, JaxBackend
from hypothesis import given
from jax import dtypes
from numpy.typing import DTypeLike
from routings import Case, RoutedCase, assert_same_bits, routed_cases
from test_combine import as_example_rows, random_row_weights, random_y
from test_layout import EXAMPLE
from worked_example import EXAMPLE_DATA, EXAMPLE_IDS

import jax_ep
from jax_ep import reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, on NaN and overflow
]

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
ORACLE = BACKENDS["reference"]


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("capacity", EXAMPLE_DATA)
def test_example(backend: Backend, capacity: int, dtype: DTypeLike) -> None:
    expected = EXAMPLE_DATA[capacity]
    layout = backend.make_layout(EXAMPLE.with_capacity(capacity), EXAMPLE_IDS)
    y = as_example_rows(expected["y"], dtype)  # NaN in padding and tail
    weights = np.array(expected["weights"], F32)
    weights[~layout.row_valid] = np.nan
    g = as_example_rows([[1, 2, 3], [4, 5, 6]], dtype)

    d_y, d_weights = backend.combine_vjp(y, layout, weights, g)
    assert d_y.dtype == dtype
    np.testing.assert_array_equal(d_y, as_example_rows(expected["d_y"], dtype))
    # The row is the example's two channels four times.
    assert d_weights is not None
    assert_same_bits(d_weights, 4 * np.array(expected["d_weights"], F32))
    d_y, nothing = backend.combine_vjp(y, layout, None, g)
    assert nothing is None
    np.testing.assert_array_equal(d_y, as_example_rows(expected["d_y_without_weights"], dtype))

    row_numbers = np.outer([1, 10], np.arange(1, capacity + 1))
    d_tokens = as_example_rows(row_numbers, dtype)
    d_x, d_topk_weights = backend.dispatch_vjp(layout, d_tokens, row_numbers.astype(F32))
    assert d_x.dtype == dtype
    np.testing.assert_array_equal(d_x, as_example_rows(expected["d_x"], dtype))
    assert d_topk_weights is not None
    assert_same_bits(d_topk_weights, np.array(expected["d_topk_weights"], F32))
    d_x, nothing = backend.dispatch_vjp(layout, d_tokens)
    assert nothing is None
    np.testing.assert_array_equal(d_x, as_example_rows(expected["d_x"], dtype))


# dispatch -----------------------------------------------------------------------------------------


@routings.examples(20)
@given(
    routed=routed_cases(),
    dtype=st.sampled_from([BF16, F16, F32]),
    weights_dtype=st.sampled_from([None, F32, BF16, F16]),
)
def test_dispatch_vjp(
    device_backend: JaxBackend, routed: RoutedCase, dtype: DTypeLike, weights_dtype: Any
) -> None:
    # Bitwise: dx is combine without weights; a weight's cotangent is a copy, rounded to the dtype
    # that the weights came in. Cotangents of padding and tail are NaN and reach nothing.
    rng, case = routed.rng, routed.case
    expected_layout = ORACLE.make_layout(case, routed.topk_idx)
    layout = device_backend.make_layout(case, routed.topk_idx)
    d_tokens = random_y(rng, expected_layout, case.hidden, dtype, specials=True)
    d_weights = None if weights_dtype is None else random_row_weights(rng, expected_layout)
    options = {} if weights_dtype is None else {"weights_dtype": weights_dtype}
    d_x, d_topk = device_backend.dispatch_vjp(layout, d_tokens, d_weights, **options)
    expected_d_x, expected_d_topk = ORACLE.dispatch_vjp(
        expected_layout, d_tokens, d_weights, **options
    )
    assert_same_bits(d_x, expected_d_x)
    assert (d_topk is None) == (weights_dtype is None)
    if d_topk is not None:
        assert expected_d_topk is not None
        assert_same_bits(d_topk, expected_d_topk)


@pytest.mark.versions
def test_weights_alone(device_backend: JaxBackend) -> None:
    # Integer rows have no gradient; the weights that travel with them do. Both ways to ask.
    case, rng = Case(3, 4, 2, 6, hidden=8, capacity=6), np.random.default_rng(20)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    assert layout.num_dropped.any()
    x = rng.integers(-9, 9, (3, 4, 8), dtype=np.int32)
    weights = routings.random_weights(rng, case)
    d_weights = random_row_weights(rng, layout)

    def only_weights(layout: Any, x: Any, weights: Any, d_weights: Any) -> Any:
        received, pull = jax.vjp(lambda w: jax_ep.dispatch(x, layout, w).weights, weights)
        return received, *pull(d_weights)

    def rows_and_weights(layout: Any, x: Any, weights: Any, d_weights: Any) -> Any:
        (tokens, received), pull = jax.vjp(
            lambda x, w: jax_ep.dispatch(x, layout, w)[:2], x, weights
        )
        d_x, d_topk = pull((np.zeros(tokens.shape, dtypes.float0), d_weights))
        assert d_x.dtype == dtypes.float0
        assert d_x.shape == x.shape
        return received, d_topk

    expected = reference.collect(d_weights, case.reference_layout(ids))
    for function in (only_weights, rows_and_weights):
        received, d_topk = device_backend.run(3, function, layout.handle, x, weights, d_weights)
        assert_same_bits(d_topk, expected)
        assert_same_bits(received, ORACLE.dispatch(x, ORACLE.make_layout(case, ids), weights)[1])


@pytest.mark.parametrize("fp8", ["float32", "power_of_two"])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("hidden", [128, 144])
def test_fp8_gradient_is_the_exact_dispatchs(
    device_backend: JaxBackend, fp8: Any, hidden: int, dtype: DTypeLike
) -> None:
    case, rng = Case(2, 5, 2, 4, hidden=hidden, capacity=12), np.random.default_rng(21)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    x = routings.random_rows(rng, (2, 5, hidden), dtype)
    weights = routings.random_weights(rng, case)
    cotangents = random_y(rng, layout, hidden, dtype), random_row_weights(rng, layout)

    def straight_through(layout: Any, x: Any, weights: Any, cotangents: Any) -> Any:
        def both(x: Any, weights: Any) -> Any:
            return jax_ep.dispatch(x, layout, weights, fp8=fp8, dequantize=True)[:2]

        _, pull = jax.vjp(both, x, weights)
        return pull(cotangents)

    d_x, d_topk = device_backend.run(2, straight_through, layout.handle, x, weights, cotangents)
    expected_d_x, expected_d_topk = device_backend.dispatch_vjp(layout, *cotangents)
    assert_same_bits(d_x, expected_d_x)
    assert_same_bits(d_topk, expected_d_topk)


# combine ------------------------------------------------------------------------------------------


def assert_weight_gradient(actual: Any, expected: Any, y: Any, g_rows: Any, valid: Any) -> None:
    # The sum over H in float32, in any order, fused or not, has one rounding a product and one a
    # sum: off by less than (H + 1) * 2**-24 * sum(|y * g|) to first order, and the oracle's own
    # rounding adds one more; 1% is for the second order. Magnitudes of the data are between 2**-30
    # and 2**20, so nothing underflows. Where no token is, exactly +0.
    assert actual.dtype == F32
    assert_same_bits(actual[~valid], np.zeros(np.count_nonzero(~valid), F32))
    y, g_rows = y.astype(np.float64), g_rows.astype(np.float64)
    magnitude = np.abs(np.where(valid[..., None], y * g_rows, 0)).sum(axis=-1)
    bound = 1.01 * (y.shape[-1] + 2) * 2.0**-24 * magnitude
    error = np.abs(actual.astype(np.float64) - expected)
    assert (error <= bound).all(), f"error / bound is up to {np.nanmax(error / bound)}"


@routings.examples(20)
@given(
    routed=routed_cases(),
    dtype=st.sampled_from([BF16, F16, F32]),
    weighted=st.booleans(),
    hidden=st.sampled_from([8, 264]),
)
def test_combine_vjp(
    device_backend: JaxBackend, routed: RoutedCase, dtype: DTypeLike, weighted: bool, hidden: int
) -> None:
    # dy is bitwise: one product and one rounding, or without weights a copy. y and weights are NaN
    # where no token is; with zero_tail=False the tail of dy is not looked at.
    rng, case = routed.rng, routed.case
    expected_layout = ORACLE.make_layout(case, routed.topk_idx)
    layout = device_backend.make_layout(case, routed.topk_idx)
    y = random_y(rng, expected_layout, hidden, dtype)
    g = routings.random_rows(
        rng, (case.num_ranks, case.num_tokens, hidden), dtype, specials=not weighted
    )
    weights = random_row_weights(rng, expected_layout) if weighted else None
    d_y, d_weights = device_backend.combine_vjp(y, layout, weights, g)
    expected_d_y, expected_d_weights = ORACLE.combine_vjp(y, expected_layout, weights, g)
    specified = reference.specified_rows(expected_layout.handle)
    assert d_y.shape == expected_d_y.shape
    assert_same_bits(d_y[specified], expected_d_y[specified])
    assert (d_weights is None) == (not weighted)
    if weighted:
        g_rows = ORACLE.dispatch(g, expected_layout).tokens
        valid = expected_layout.row_valid
        assert_weight_gradient(d_weights, expected_d_weights, y, g_rows, valid)


@pytest.mark.parametrize("zero_tail", [True, False], ids=["zero_tail", "any_tail"])
@pytest.mark.parametrize(("dtype", "hidden"), [(BF16, 20480), (BF16, 20488), (F32, 10240)])
def test_combine_vjp_of_long_rows(
    device_backend: JaxBackend, dtype: DTypeLike, hidden: int, zero_tail: bool
) -> None:
    # The longest rows that CUDA's own call for the gradient takes, and longer ones, which are
    # dispatched. Bounds as above; products of normal numbers, so that dy is bitwise everywhere.
    case = Case(2, 6, 3, 6, hidden=hidden, capacity=24, expert_alignment=4, zero_tail=zero_tail)
    rng = np.random.default_rng(26)
    ids = routings.topk_ids(rng, case, "nowhere")
    expected_layout = ORACLE.make_layout(case, ids)
    layout = device_backend.make_layout(case, ids)
    assert not expected_layout.row_valid.all()
    y = random_y(rng, expected_layout, hidden, dtype)
    g = routings.random_rows(rng, (2, 6, hidden), dtype)
    weights = random_row_weights(rng, expected_layout)
    d_y, d_weights = device_backend.combine_vjp(y, layout, weights, g)
    expected_d_y, expected_d_weights = ORACLE.combine_vjp(y, expected_layout, weights, g)
    specified = reference.specified_rows(expected_layout.handle)
    assert_same_bits(d_y[specified], expected_d_y[specified])
    g_rows = ORACLE.dispatch(g, expected_layout).tokens
    assert_weight_gradient(d_weights, expected_d_weights, y, g_rows, expected_layout.row_valid)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_combine_vjp_of_subnormals(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    """On CPU weights * g is XLA's, whose threads flush what is subnormal in float32."""
    backend = device_backend
    case, rng = Case(2, 5, 2, 4, hidden=8), np.random.default_rng(22)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = backend.make_layout(case, ids)
    weights = np.full(layout.row_valid.shape, 0.75, F32)
    g = (rng.standard_normal((2, 5, 8)) * float(ml_dtypes.finfo(dtype).tiny)).astype(dtype)
    y = np.ones((*layout.row_valid.shape, 8), dtype)
    d_y, _ = backend.combine_vjp(y, layout, weights, g)
    expected, _ = ORACLE.combine_vjp(y, ORACLE.make_layout(case, ids), weights, g)
    magnitude = np.abs(expected.astype(F32))
    subnormal = (magnitude > 0) & (magnitude < np.finfo(F32).tiny)
    assert np.any(subnormal) == (dtype != F16)
    if backend.platform == "cuda":
        assert_same_bits(d_y, expected)
    else:
        assert np.all((d_y == expected) | (subnormal & (d_y == 0)))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_row_weights_cotangent_has_their_dtype(
    device_backend: JaxBackend, dtype: DTypeLike
) -> None:
    case, rng = Case(2, 4, 2, 4, hidden=8), np.random.default_rng(23)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    # Small integers: the dot product over 8 channels is exact in float32.
    y = rng.integers(-3, 4, (*layout.row_valid.shape, 8)).astype(F32)
    g = rng.integers(-3, 4, (2, 4, 8)).astype(F32)
    weights = random_row_weights(rng, layout).astype(dtype)
    _, d_weights = device_backend.combine_vjp(y, layout, weights, g)
    oracle = ORACLE.make_layout(case, ids)
    _, expected = ORACLE.combine_vjp(y, oracle, weights.astype(F32), g)
    assert expected is not None
    assert d_weights is not None
    assert_same_bits(d_weights, expected.astype(dtype))


def test_dropped_rows_get_no_gradient(backend: Backend) -> None:
    # By hand: rank 0 sends both tokens to expert 1, which keeps one row.
    case = Case(2, 2, 1, 2, hidden=8, capacity=1)
    layout = backend.make_layout(case, np.array([[[1], [1]], [[-1], [9]]], np.int32))
    rows, ones = np.full((2, 1, 8), 3, F32), np.ones((2, 1), F32)
    d_x, d_topk = backend.dispatch_vjp(layout, rows, 5 * ones)
    expected_d_x, expected_d_topk = np.zeros((2, 2, 8), F32), np.zeros((2, 2, 1), F32)
    expected_d_x[0, 0], expected_d_topk[0, 0] = 3, 5
    assert_same_bits(d_x, expected_d_x)
    assert_same_bits(d_topk, expected_d_topk)
    g = np.array([[7, 100], [100, 100]], F32)[..., None] * np.ones(8, F32)
    d_y, d_weights = backend.combine_vjp(rows, layout, 2 * ones, g)
    assert_same_bits(d_y, np.array([[[0]], [[14]]], F32) * np.ones(8, F32))
    assert_same_bits(d_weights, np.array([[0], [8 * 3 * 7]], F32))


@pytest.mark.versions
def test_a_layout_has_no_gradient(device_backend: JaxBackend) -> None:
    # Differentiating with respect to it gives float0, not an error and not numbers.
    case = Case(2, 2, 1, 2, hidden=8)
    layout = device_backend.make_layout(case, np.zeros((2, 2, 1), np.int32))

    def function(layout: Any, x: Any) -> jax.Array:
        def loss(layout: Any, x: Any) -> Any:
            return jax_ep.dispatch(x, layout).tokens.sum()

        d_layout, d_x = jax.grad(loss, argnums=(0, 1), allow_int=True)(layout, x)
        assert {leaf.dtype for leaf in jax.tree.leaves(d_layout)} == {dtypes.float0}
        return d_x

    d_x = device_backend.run(2, function, layout.handle, np.ones((2, 2, 8), F32))
    assert_same_bits(d_x, np.ones((2, 2, 8), F32))


def test_repeated_runs_are_bitwise_equal(device_backend: JaxBackend) -> None:
    case, rng = Case(8, 32, 8, 64, hidden=64), np.random.default_rng(24)
    layout = device_backend.make_layout(case, routings.topk_ids(rng, case, "zipf"))
    y, weights = random_y(rng, layout, 64, F32), random_row_weights(rng, layout)
    g = routings.random_rows(rng, (8, 32, 64), F32)

    def gradients() -> list[bytes]:
        results = [
            *device_backend.combine_vjp(y, layout, weights, g),
            *device_backend.dispatch_vjp(layout, y, weights),
        ]
        assert all(isinstance(result, np.ndarray) for result in results)
        return [np.asarray(result).tobytes() for result in results]

    first = gradients()
    for _ in range(3):
        assert gradients() == first


# Any order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("expand", "capacity"), [(True, None), (True, 2), (False, 2)])
def test_first_and_second_derivatives_are_exact(
    device_backend: JaxBackend, expand: bool, capacity: int | None
) -> None:
    # A layer whose expert e maps a row to v_e * row**2, differentiated twice. Data are small
    # integers, so all sums and products are exact in float32, whatever their order: equality with
    # the dense layer in float64. Dropped rows are taken out of the dense layer by `kept`.
    case, rng = Case(2, 3, 2, 4, hidden=4, capacity=capacity), np.random.default_rng(25)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    assert layout.num_dropped.any() == (capacity is not None)
    x = rng.integers(-3, 4, (2, 3, 4)).astype(F32)
    topk_weights = rng.integers(1, 4, (2, 3, 2)).astype(F32)
    v = rng.integers(-2, 3, (2, 2)).astype(F32)
    g = rng.integers(-2, 3, (2, 3, 4)).astype(F32)

    def derivatives(loss: Any, g: Any, *params: Any) -> Any:
        """Gradients of the loss, and of a quadratic form of its gradients."""
        first = jax.grad(loss, argnums=(0, 1, 2))

        def of_first(*params: Any) -> Any:
            d_x, d_topk, d_v = first(*params)
            return (g * d_x**2).sum() + (d_topk**2).sum() + (d_v**2).sum()

        return first(*params), jax.grad(of_first, argnums=(0, 1, 2))(*params)

    def sharded(layout: Any, g: Any, *params: Any) -> Any:
        def loss(x: Any, topk_weights: Any, v: Any) -> Any:
            received = jax_ep.dispatch(x, layout, topk_weights, expand=expand)
            rows = received.tokens if expand else received.tokens[layout.row_token]
            total = v.shape[0]
            ends = jnp.cumsum(layout.group_sizes)
            group = jnp.searchsorted(ends, jnp.arange(layout.capacity), side="right")
            y = jnp.append(v, 0)[jnp.minimum(group, total), None] * rows**2
            return (g * jax_ep.combine(y, layout, received.weights)).sum()

        return derivatives(loss, g, *params)

    actual = device_backend.run(2, sharded, layout.handle, g, x, topk_weights, v)

    with jax.enable_x64(True):
        kept = jnp.asarray(layout.kept)

        def dense(x: Any, topk_weights: Any, v: Any) -> Any:
            scale = jnp.where(kept, topk_weights * v.reshape(-1)[ids], 0).sum(-1)
            return (g * scale[..., None] * x**2).sum()

        double = [jnp.asarray(a, jnp.float64) for a in (g, x, topk_weights, v)]
        expected = jax.device_get(derivatives(dense, *double))
    for order in range(2):
        for name, ours, theirs in zip(
            ("x", "topk_weights", "v"), actual[order], expected[order], strict=True
        ):
            assert theirs.any(), "a zero gradient shows nothing"
            assert np.array_equal(theirs.astype(F32), theirs), "the data must be exact"
            np.testing.assert_array_equal(ours, theirs, f"order {order + 1}, {name}")


@pytest.mark.versions
@pytest.mark.parametrize("verb", ["dispatch", "layout_and_dispatch", "combine", "combine_weighted"])
def test_forward_mode(device_backend: JaxBackend, verb: str) -> None:
    """JAX's own words about custom_vjp."""

    def tangent(ids: Any) -> Any:
        options: dict[str, Any] = {"num_experts": 6, "axis_name": AXIS, "capacity": 8}
        layout = jax_ep.make_layout(ids, **options)
        x, y, weights = jnp.zeros((4, 8)), jnp.zeros((8, 8)), jnp.zeros(8)
        f, operand = {
            "dispatch": (lambda x: jax_ep.dispatch(x, layout).tokens, x),
            "layout_and_dispatch": (
                lambda x: jax_ep.layout_and_dispatch(x, ids, **options)[1].tokens,
                x,
            ),
            "combine": (lambda y: jax_ep.combine(y, layout), y),
            "combine_weighted": (lambda y: jax_ep.combine(y, layout, weights), y),
        }[verb]
        return jax.jvp(f, (operand,), (operand,))

    with pytest.raises(TypeError, match=r"forward-mode autodiff.*custom_vjp"):
        device_backend.run(2, tangent, np.zeros((2, 4, 2), np.int32))
