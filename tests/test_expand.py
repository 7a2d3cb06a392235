"""dispatch(expand=False) on every backend: a row per (token, rank), and which row is whose."""

from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import BACKENDS, Backend, BackendLayout, JaxBackend
from hypothesis import given
from numpy.typing import DTypeLike, NDArray
from routings import Case, RoutedCase, assert_same_bits, routed_cases
from sharded_layers import EP, POLICIES, make_problem, sizes, traced_calls
from test_dispatch import FP8_SCALES, assert_same_received, fp8_sizes, rows_shape

import jax_ep
from jax_ep import reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, on NaN and overflow
]

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
ORACLE = BACKENDS["reference"]


def num_rows(case: Case) -> int:
    return case.num_ranks * case.num_tokens + 1


def has_rows(layout: BackendLayout) -> NDArray[np.bool_]:
    """Which rows hold a token, bool [R, R * T + 1]."""
    held = np.zeros((layout.case.num_ranks, num_rows(layout.case)), bool)
    held[:, :-1] = np.diff(layout.recv_offsets, axis=1) > 0
    return held


def random_cotangent(
    rng: np.random.Generator, layout: BackendLayout, dtype: DTypeLike, hidden: int
) -> NDArray[Any]:
    """Rows [R, R * T + 1, H], NaN where no token is."""
    shape = (layout.case.num_ranks, num_rows(layout.case), hidden)
    rows = routings.random_rows(rng, shape, dtype, specials=True)
    rows[~has_rows(layout)] = np.nan
    return rows


def check_dispatch(
    backend: Backend, case: Case, ids: NDArray[np.int32], x: Any, weights: Any, **options: Any
) -> None:
    """As the oracle, and gathered by row_token as the rows that expand=True gives."""
    theirs, ours = ORACLE.make_layout(case, ids), backend.make_layout(case, ids)
    received = backend.dispatch(x, ours, weights, expand=False, **options)
    expected = ORACLE.dispatch(x, theirs, weights, expand=False, **options)
    specified = reference.specified_rows(theirs.handle, expand=False)
    by_expert = reference.specified_rows(theirs.handle)
    if weights is not None:
        assert_same_bits(received[1][by_expert], expected[1][by_expert])
    assert_same_received(
        type(received)((received.tokens, None, received.scales)),
        type(received)((expected.tokens, None, expected.scales)),
        specified,
    )
    assert_same_bits(ours.row_token, theirs.row_token)
    expanded = ORACLE.dispatch(x, theirs, weights, **options)
    rank = np.arange(case.num_ranks)[:, None]
    assert_same_bits(received.tokens[rank, ours.row_token][by_expert], expanded.tokens[by_expert])


@pytest.mark.versions
def test_example(backend: Backend) -> None:
    # Without the oracle. Two ranks, two experts each, two tokens a rank; expert 1 is cut after two
    # rows, so rank 1's second token loses the only row that it has on rank 0.
    case = Case(2, 2, 3, 4, hidden=8, capacity=4)
    ids = np.array([[[0, 1, 0], [2, 3, -1]], [[1, 9, 2], [1, 3, 3]]], np.int32)
    layout = backend.make_layout(case, ids)
    np.testing.assert_array_equal(layout.num_dropped, [1, 1])
    np.testing.assert_array_equal(layout.row_token, [[0, 0, 0, 2], [1, 2, 1, 3]])
    x = np.array([[1, 2], [3, 4]], F32)[..., None] * np.ones(8, F32)
    received = backend.dispatch(x, layout, np.full((2, 2, 3), 0.5, F32), expand=False)
    tokens = np.array([[1, 0, 3, 0, 0], [0, 2, 3, 4, 0]], F32)[..., None] * np.ones(8, F32)
    assert_same_bits(received.tokens, tokens)
    assert received.weights is not None
    assert_same_bits(received.weights, np.full((2, 4), 0.5, F32))
    assert received.scales is None

    d_tokens = np.array([[1, 9, 2, 9, 9], [9, 4, 8, 16, 9]], F32)[..., None] * np.ones(8, F32)
    d_weights = np.arange(8, dtype=F32).reshape(2, 4)
    d_x, d_topk = backend.dispatch_vjp(layout, d_tokens, d_weights, expand=False)
    assert_same_bits(d_x, np.array([[1, 4], [10, 16]], F32)[..., None] * np.ones(8, F32))
    assert_same_bits(d_topk, np.array([[[0, 2, 1], [4, 6, 0]], [[3, 0, 5], [0, 7, 0]]], F32))


def test_padding_points_to_zeros(backend: Backend) -> None:
    # One token, so 15 rows of padding and a tail. With zero_tail=False the last row is zero all
    # the same.
    ids = np.full((2, 3, 1), -1, np.int32)
    ids[1, 2] = 1  # the second expert of rank 0
    for zero_tail in (True, False):
        case = Case(2, 3, 1, 4, hidden=8, capacity=48, expert_alignment=16, zero_tail=zero_tail)
        layout = backend.make_layout(case, ids)
        expected = np.full((2, 48), 6)
        expected[0, 0] = 5
        np.testing.assert_array_equal(layout.row_token, expected)
        received = backend.dispatch(np.full((2, 3, 8), 7, F32), layout, expand=False)
        assert received.tokens.shape == (2, 7, 8)
        assert_same_bits(received.tokens[:, 6], np.zeros((2, 8), F32))
        assert_same_bits(received.tokens[0, 5], np.full(8, 7, F32))
        if zero_tail:
            assert not received.tokens[0, :5].any()
            assert not received.tokens[1].any()


def test_poison_is_seen(device_backend: JaxBackend) -> None:
    # What zero_tail=False leaves unspecified is the poison here.
    case = Case(1, 3, 1, 1, hidden=128, zero_tail=False)
    layout = device_backend.make_layout(case, np.array([[[-1], [0], [-1]]], np.int32))
    for fp8 in (None, "float32"):
        received = device_backend.dispatch(np.ones((1, 3, 128), F32), layout, fp8=fp8, expand=False)
        for result in [received.tokens] + [received.scales] * (fp8 is not None):
            seen = np.isnan(result[0].astype(F32)).all(axis=-1)
            np.testing.assert_array_equal(seen, [True, False, True, False])


@routings.examples(14)
@given(routed=routed_cases(), dtype=st.sampled_from([BF16, F16, F32]), weighted=st.booleans())
def test_any_routing(
    device_backend: JaxBackend, routed: RoutedCase, dtype: DTypeLike, weighted: bool
) -> None:
    # zero_tail is drawn: without it gaps are not looked at. Capacities that drop, ids of nobody
    # and experts that stand twice in a token are among the routings.
    rng, case = routed.rng, routed.case
    x = routings.random_rows(rng, rows_shape(case), dtype, specials=True)
    weights = routings.random_weights(rng, case) if weighted else None
    check_dispatch(device_backend, case, routed.topk_idx, x, weights)


@routings.examples(14)
@given(
    routed=routed_cases(fp8_sizes()),
    fp8=st.sampled_from(FP8_SCALES),
    dequantize=st.booleans(),
    weighted=st.booleans(),
)
def test_fp8(
    device_backend: JaxBackend, routed: RoutedCase, fp8: str, dequantize: bool, weighted: bool
) -> None:
    rng, case = routed.rng, routed.case
    x = routings.random_rows(rng, rows_shape(case), BF16, specials=bool(rng.integers(2)))
    weights = routings.random_weights(rng, case) if weighted else None
    options = {"fp8": fp8, "dequantize": dequantize}
    check_dispatch(device_backend, case, routed.topk_idx, x, weights, **options)


@pytest.mark.parametrize("num_scales", [None, 1, 3])
def test_float8_rows(device_backend: JaxBackend, num_scales: int | None) -> None:
    case, rng = Case(3, 7, 3, 6, hidden=384, capacity=20), np.random.default_rng(4)
    ids = routings.topk_ids(rng, case, "repeated")
    x = routings.random_rows(rng, rows_shape(case), ml_dtypes.float8_e4m3fn)
    scales = None
    if num_scales is not None:
        scales = routings.random_rows(rng, (3, 7, num_scales), F32, specials=True)
    check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case), scales=scales)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_integer_rows(device_backend: JaxBackend, dtype: DTypeLike) -> None:
    case, rng = Case(3, 7, 3, 6, hidden=32, capacity=20), np.random.default_rng(3)
    ids = routings.topk_ids(rng, case, "repeated")
    x = routings.random_rows(rng, rows_shape(case), dtype)
    check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case))


@pytest.mark.parametrize(
    "options", [{}, {"fp8": "float32"}, {"fp8": "float32", "dequantize": True}]
)
@pytest.mark.parametrize(("num_tokens", "hidden"), [(700, 384), (3, 20480)])
def test_many_and_long_rows(
    device_backend: JaxBackend, num_tokens: int, hidden: int, options: Any
) -> None:
    """More tokens than a GPU's blocks take at a time, and rows longer than their buffers."""
    case, rng = Case(2, num_tokens, 4, 8, hidden=hidden), np.random.default_rng(7)
    ids = routings.topk_ids(rng, case, "nowhere")
    x = routings.random_rows(rng, rows_shape(case), BF16)
    check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case), **options)
    if options:
        return
    layout, oracle = device_backend.make_layout(case, ids), ORACLE.make_layout(case, ids)
    d_tokens = random_cotangent(rng, oracle, BF16, hidden)
    d_x, _ = device_backend.dispatch_vjp(layout, d_tokens, expand=False)
    assert_same_bits(d_x, ORACLE.dispatch_vjp(oracle, d_tokens, expand=False)[0])


def test_every_rank_count(device_backend: JaxBackend) -> None:
    rng = np.random.default_rng(8)
    for num_ranks in range(1, min(device_backend.num_devices, 8) + 1):
        case = Case(num_ranks, 3, 2, 2 * num_ranks, hidden=8)
        ids = routings.topk_ids(rng, case, "uniform")
        x = routings.random_rows(rng, rows_shape(case), F32)
        check_dispatch(device_backend, case, ids, x, routings.random_weights(rng, case))


# Gradients ----------------------------------------------------------------------------------------


@routings.examples(14)
@given(routed=routed_cases(), dtype=st.sampled_from([BF16, F16, F32]), weighted=st.booleans())
def test_vjp(
    device_backend: JaxBackend, routed: RoutedCase, dtype: DTypeLike, weighted: bool
) -> None:
    # Bitwise. Cotangents of gaps and of the row of zeros are NaN and reach nothing.
    rng, case = routed.rng, routed.case
    oracle = ORACLE.make_layout(case, routed.topk_idx)
    layout = device_backend.make_layout(case, routed.topk_idx)
    d_tokens = random_cotangent(rng, oracle, dtype, case.hidden)
    d_weights = rng.standard_normal(oracle.row_valid.shape).astype(F32) if weighted else None
    d_x, d_topk = device_backend.dispatch_vjp(layout, d_tokens, d_weights, expand=False)
    expected = ORACLE.dispatch_vjp(oracle, d_tokens, d_weights, expand=False)
    assert_same_bits(d_x, expected[0])
    assert (d_topk is None) == (not weighted)
    if weighted:
        assert_same_bits(d_topk, expected[1])


@pytest.mark.parametrize("fp8", FP8_SCALES)
def test_fp8_gradient_is_the_exact_dispatchs(device_backend: JaxBackend, fp8: Any) -> None:
    case, rng = Case(2, 5, 2, 4, hidden=128, capacity=12), np.random.default_rng(21)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    x = routings.random_rows(rng, rows_shape(case), BF16)
    cotangent = random_cotangent(rng, layout, BF16, 128)

    def straight_through(layout: Any, x: Any, cotangent: Any) -> Any:
        _, pull = jax.vjp(
            lambda x: jax_ep.dispatch(x, layout, fp8=fp8, dequantize=True, expand=False).tokens, x
        )
        return pull(cotangent)[0]

    d_x = device_backend.run(2, straight_through, layout.handle, x, cotangent)
    assert_same_bits(d_x, device_backend.dispatch_vjp(layout, cotangent, expand=False)[0])


def grouped_layer(expand: bool, layout: Any, x: Any, topk_weights: Any, w: Any) -> Any:
    """A grouped GEMM on the rows, and what it puts out summed up."""
    received = jax_ep.dispatch(x, layout, topk_weights, expand=expand)
    rows = received.tokens if expand else received.tokens[layout.row_token]
    y = jax.lax.ragged_dot(rows, w, received.group_sizes)
    return jax_ep.combine(y, layout, received.weights)


@pytest.mark.parametrize(("dtype", "capacity"), [(BF16, 12), (F32, None)])
def test_grouped_gemm_that_gathers(
    device_backend: JaxBackend, dtype: DTypeLike, capacity: int | None
) -> None:
    """The layer and its gradients are those of expert rows, bit for bit.

    Forward for any data. Data of the gradients are small integers, so that the order in which XLA
    adds up what was gathered more than once does not show.
    """
    case = Case(2, 6, 4, 8, hidden=16, capacity=capacity, expert_alignment=4)
    rng = np.random.default_rng(27)
    ids = routings.topk_ids(rng, case, "uniform")
    layout = device_backend.make_layout(case, ids)
    assert layout.num_dropped.any() == (capacity is not None)

    def both(function: Any) -> Any:
        return lambda *args: [function(expand, *args) for expand in (False, True)]

    def gradients(expand: bool, layout: Any, *params: Any) -> Any:
        def loss(x: Any, topk_weights: Any, w: Any) -> Any:
            return (grouped_layer(expand, layout, x, topk_weights, w) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*params)

    x = routings.random_rows(rng, rows_shape(case), dtype)
    w = routings.random_rows(rng, (2, 4, 16, 8), dtype)
    weights = routings.random_weights(rng, case)
    ours, theirs = device_backend.run(2, both(grouped_layer), layout.handle, x, weights, w)
    assert_same_bits(ours, theirs)

    x = rng.integers(-1, 2, (2, 6, 16)).astype(F32)  # bfloat16 has too few bits for these sums
    w = rng.integers(-1, 2, (2, 4, 16, 8)).astype(F32)
    weights = rng.integers(1, 3, (2, 6, 4)).astype(F32)
    ours, theirs = device_backend.run(2, both(gradients), layout.handle, x, weights, w)
    for mine, yours in zip(ours, theirs, strict=True):
        assert yours.any(), "a zero gradient shows nothing"
        assert_same_bits(mine, yours)


@pytest.mark.versions
def test_checkpoint_policies() -> None:
    """As many calls as with expert rows, whatever is saved: tokens carry the same name."""
    case = sizes(EP)
    x, ids, topk_weights, _ = make_problem(EP, case).inputs
    w = np.ones((16, 8, 8), F32)

    def loss(expand: bool, policy: str) -> Any:
        def layer(x: Any, topk_weights: Any, w: Any, ids: Any) -> Any:
            layout = jax_ep.make_layout(
                ids,
                num_experts=16,
                axis_name="ep",
                capacity=case.capacity,
                expert_alignment=case.expert_alignment,
            )
            return jnp.sin(grouped_layer(expand, layout, x, topk_weights, w))

        def local(*args: Any) -> Any:
            return jax.checkpoint(layer, policy=POLICIES[policy])(*args).sum()[None]

        spec = EP.tokens
        run = jax.shard_map(local, mesh=EP.mesh(), in_specs=spec, out_specs=spec)
        return jax.grad(lambda *args: run(*args).sum(), argnums=(0, 1, 2))

    args = x, topk_weights, w, ids
    for policy in POLICIES:
        assert traced_calls(loss(False, policy), *args) == traced_calls(loss(True, policy), *args)
    policy = "layout_dispatch"
    ours, theirs = (jax.jit(loss(expand, policy))(*args) for expand in (False, True))
    for mine, yours in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, yours, rtol=1e-6)


# What the verbs say -------------------------------------------------------------------------------


def test_token_rows_are_no_expert_rows() -> None:
    def f(x: Any, ids: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=16, axis_name="ep", capacity=10)
        return jax_ep.combine(jax_ep.dispatch(x, layout, expand=False).tokens, layout)

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=EP.tokens, out_specs=EP.tokens)
    with pytest.raises(ValueError, match=r"y has 49 rows, .* each entry of layout.row_token"):
        run(np.zeros((48, 8), F32), np.zeros((48, 2), np.int32))
