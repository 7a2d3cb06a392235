"""Rows that come narrow: float8 with and without scales, and 4-bit types by the guide's recipe."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import BACKENDS, Backend, BackendLayout, JaxBackend
from numpy.typing import DTypeLike, NDArray
from routings import Case, assert_same_bits

import jax_ep
from jax_ep import reference

pytestmark = pytest.mark.usefixtures("poison")

E4M3, E5M2, F32 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float32
ORACLE = BACKENDS["reference"]
GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"


def any_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """NaNs with their payloads included."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(size), np.dtype(dtype)).reshape(shape).copy()


def bits(array: Any) -> NDArray[Any]:
    return np.asarray(array).view(f"u{array.dtype.itemsize}")


def check_bits(
    backend: Backend, case: Case, dtype: DTypeLike, num_scales: int | None, *, weighted: bool = True
) -> None:
    """Dispatches rows of any bits, with scales of any bits, and compares them with the oracle's."""
    rng = np.random.default_rng(case.hidden + (num_scales or 0))
    ids = routings.topk_ids(rng, case, "invalid" if case.num_experts > 2 else "uniform")
    x = any_bits(rng, (case.num_ranks, case.num_tokens, case.hidden), dtype)
    scales = None
    if num_scales is not None:
        scales = any_bits(rng, (case.num_ranks, case.num_tokens, num_scales), F32)
    weights = routings.random_weights(rng, case) if weighted else None
    ours, theirs = backend.make_layout(case, ids), ORACLE.make_layout(case, ids)
    received = backend.dispatch(x, ours, weights, scales=scales)
    expected = ORACLE.dispatch(x, theirs, weights, scales=scales)
    specified = reference.specified_rows(theirs.handle)
    for name in ("tokens", "weights", "scales"):
        got, right = getattr(received, name), getattr(expected, name)
        assert (got is None) == (right is None), name
        if got is None:
            continue
        assert (got.dtype, got.shape) == (right.dtype, right.shape), name
        np.testing.assert_array_equal(bits(got)[specified], bits(right)[specified], name)


@pytest.mark.parametrize(("dtype", "zero_tail"), [(E4M3, True), (E5M2, False)])
@pytest.mark.parametrize(
    ("hidden", "num_scales"),
    [
        (16, 1),
        (256, 1),
        (256, 2),
        (256, 4),
        (256, 256),
        (2880, 1),
        (2880, 23),
        (2880, 180),
    ],
)
def test_rows_with_scales_are_passed_on(
    device_backend: JaxBackend, hidden: int, num_scales: int, dtype: DTypeLike, zero_tail: bool
) -> None:
    # Some rows are dropped, each expert has padding and the ranks that receive less have a tail.
    case = Case(3, 9, 3, 6, hidden, capacity=24, expert_alignment=4, zero_tail=zero_tail)
    check_bits(device_backend, case, dtype, num_scales)


@pytest.mark.parametrize(("hidden", "num_scales"), [(2880, 23), (7168, 56)])
def test_many_rows_with_scales(device_backend: JaxBackend, hidden: int, num_scales: int) -> None:
    """More tokens than a GPU's blocks take at a time."""
    tokens = 90 if device_backend.platform == "cpu" else 700
    check_bits(device_backend, Case(2, tokens, 4, 8, hidden), E4M3, num_scales, weighted=False)


def test_every_rank_count(device_backend: JaxBackend) -> None:
    for num_ranks in range(1, min(device_backend.num_devices, 8) + 1):
        check_bits(device_backend, Case(num_ranks, 5, 2, 2 * num_ranks, hidden=384), E4M3, 3)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_without_scales_are_copies(
    device_backend: JaxBackend, dtype: DTypeLike, weighted: bool
) -> None:
    case = Case(3, 9, 3, 6, hidden=48, capacity=24, expert_alignment=4)
    check_bits(device_backend, case, dtype, None, weighted=weighted)


def test_what_dispatch_quantises_it_would_pass_on(device_backend: JaxBackend) -> None:
    """fp8= is quantising and then scales=, to the bit."""
    case, rng = Case(2, 9, 3, 4, hidden=2880), np.random.default_rng(3)
    layout = device_backend.make_layout(case, routings.topk_ids(rng, case, "uniform"))
    x = routings.random_rows(rng, (2, 9, 2880), ml_dtypes.bfloat16)
    q, scales = reference.quantize(x, scale_format="power_of_two")
    quantized = device_backend.dispatch(x, layout, fp8="power_of_two")
    passed_on = device_backend.dispatch(q, layout, scales=scales)
    np.testing.assert_array_equal(bits(quantized.tokens), bits(passed_on.tokens))
    assert quantized.scales is not None
    assert passed_on.scales is not None
    assert_same_bits(quantized.scales, passed_on.scales)


# Gradients ----------------------------------------------------------------------------------------


@pytest.fixture
def layout(device_backend: JaxBackend) -> BackendLayout:
    case = Case(2, 4, 2, 4, hidden=32, capacity=12)
    ids = routings.topk_ids(np.random.default_rng(5), case, "uniform")
    return device_backend.make_layout(case, ids)


def rows_of(form: str, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Rows in a form without gradient, and the options of dispatch for it."""
    if form == "quantised":
        return x, {"fp8": "float32"}
    scales = {"scales": jnp.abs(x[:, :1]) + 1} if form == "scaled" else {}
    return x.astype(jnp.int8 if form == "integer" else jnp.float8_e4m3fn), scales


@pytest.mark.versions
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("transform", ["grad", "jvp", "remat", "scan"])
@pytest.mark.parametrize("form", ["quantised", "scaled", "plain"])
def test_differentiating_float8_rows(
    device_backend: JaxBackend, layout: BackendLayout, form: str, transform: str, jit: bool
) -> None:
    def differentiate(lay: Any) -> Any:
        def loss(x: Any) -> Any:
            rows, options = rows_of(form, x)
            received = jax_ep.dispatch(rows, lay, **options)
            scales = 0 if received.scales is None else received.scales.sum()
            return received.tokens.astype(jnp.float32).sum() + scales

        def scanned(x: Any) -> Any:
            return jax.lax.scan(lambda total, _: (total + loss(x), None), loss(x), None, 2)[0]

        function = {"remat": jax.checkpoint(loss), "scan": scanned}.get(transform, loss)
        function = jax.jit(function) if jit else function
        x = jnp.ones((4, 32))
        return jax.jvp(function, (x,), (x,)) if transform == "jvp" else jax.grad(function)(x)

    message = (
        "^jax_ep.dispatch was differentiated where it has no gradient.*with fp8=.*dequantize=True.*"
        r"jax\.lax\.stop_gradient"
    )
    with pytest.raises(TypeError, match=message):
        device_backend.run(2, differentiate, layout.handle)


@pytest.mark.versions
@pytest.mark.parametrize("given", ["x", "scales"])
def test_differentiating_one_of_rows_and_scales(
    device_backend: JaxBackend, layout: BackendLayout, given: str
) -> None:
    def differentiate(lay: Any) -> Any:
        def loss(value: Any) -> Any:
            x, scales = jnp.ones((4, 32), E4M3), jnp.ones((4, 1))
            if given == "x":
                x = value.astype(E4M3)
            else:
                scales = value[:, :1]
            return jax_ep.dispatch(x, lay, scales=scales).scales.sum()

        return jax.grad(loss)(jnp.ones((4, 32)))

    with pytest.raises(TypeError, match="differentiated where it has no gradient"):
        device_backend.run(2, differentiate, layout.handle)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("form", ["quantised", "scaled", "plain", "integer"])
def test_gradient_of_the_weights_beside(
    device_backend: JaxBackend, layout: BackendLayout, form: str, stopped: bool
) -> None:
    """As it is beside rows that have a gradient; also where x is cut off from one."""
    rng = np.random.default_rng(6)
    case = layout.case
    weights = routings.random_weights(rng, case)
    x = routings.random_rows(rng, (2, 4, 32), F32)
    d_weights = rng.standard_normal((2, 12)).astype(F32)
    d_weights[~layout.row_valid] = 0

    def gradient(lay: Any, x: Any, weights: Any, d_weights: Any) -> Any:
        def weigh(weights: Any, x: Any) -> Any:
            rows, options = rows_of(form, jax.lax.stop_gradient(x) if stopped else x)
            received = jax_ep.dispatch(rows, lay, weights, **options)
            used = received.tokens.astype(jnp.float32).sum() * 0
            return (received.weights * d_weights).sum() + used

        if stopped:
            return jax.grad(weigh, (0, 1))(weights, x)[0]
        return jax.grad(weigh)(weights, x)

    d_topk = device_backend.run(2, gradient, layout.handle, x, weights, d_weights)
    y = np.zeros((2, 12, 8), F32)
    _, expected = device_backend.dispatch_vjp(layout, y, d_weights)
    assert_same_bits(d_topk, expected)


# The guide's recipe -------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn"])
def test_the_guides_recipe_for_narrower_rows(device_backend: JaxBackend, dtype: str) -> None:
    section = GUIDE.read_text().split("## Narrow rows")[1].split("\n## ")[0]
    (recipe,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    case, rng = Case(3, 9, 3, 6, hidden=64, expert_alignment=4), np.random.default_rng(8)
    ids = routings.topk_ids(rng, case, "uniform")
    nibbles = rng.integers(0, 16, (3, 9, 64), dtype=np.uint8)
    weights = routings.random_weights(rng, case)

    def dispatch(layout: Any, nibbles: Any, topk_weights: Any) -> Any:
        x = jax.lax.bitcast_convert_type(nibbles.astype(jnp.uint4), jnp.dtype(dtype))
        names: dict[str, Any] = {"jax": jax, "jnp": jnp, "jax_ep": jax_ep}
        exec(recipe, names)
        tokens = names["dispatch_narrow"](x, layout, topk_weights).tokens
        assert tokens.dtype == x.dtype
        return jax.lax.bitcast_convert_type(tokens, jnp.uint4).astype(jnp.uint8)

    layout = device_backend.make_layout(case, ids)
    tokens = device_backend.run(3, dispatch, layout.handle, nibbles, weights)
    expected = ORACLE.dispatch(nibbles, ORACLE.make_layout(case, ids)).tokens
    np.testing.assert_array_equal(tokens, expected)
