"""layout_and_dispatch on every backend: to the bit what the two calls give, gradients too.

`moe` is made of it: what JAX's transformations make of it is in the tests of layers.
"""

import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import AXIS, BACKENDS, LAYOUT_ARRAYS, JaxBackend, layout_options
from hypothesis import given
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import DTypeLike
from routings import STATIC_SIZES, Case, RoutedCase, assert_same_bits, routed_cases
from sharded_layers import EP, make_problem, place, save_only, sizes, traced_calls
from test_dispatch import assert_same_received, fp8_sizes, rows_shape

import jax_ep
from jax_ep import reference

pytestmark = pytest.mark.usefixtures("poison")

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
ORACLE = BACKENDS["reference"]

FORMS: dict[str, tuple[dict[str, Any], tuple[DTypeLike, ...]]] = {
    "plain": ({}, (BF16, F32)),
    "float32 scales": ({"fp8": "float32"}, (BF16, F16)),
    "power of two, dequantized": ({"fp8": "power_of_two", "dequantize": True}, (BF16, F32)),
    "given scales": ({}, (E4M3, E5M2)),
}
"""How rows cross: options of dispatch, and types that x may have."""
SIZES = [case for case in (*STATIC_SIZES, *fp8_sizes()) if case.hidden % 16 == 0]


@routings.examples(14)
@given(
    routed=routed_cases(SIZES),
    form=st.sampled_from(list(FORMS)),
    expand=st.booleans(),
    weighted=st.booleans(),
)
def test_any_routing(
    device_backend: JaxBackend, routed: RoutedCase, form: str, expand: bool, weighted: bool
) -> None:
    rng, case = routed.rng, routed.case
    options, dtypes = FORMS[form]
    x = routings.random_rows(rng, rows_shape(case), F32).astype(dtypes[rng.integers(2)])
    scales = None
    if form == "given scales":
        scales = rng.standard_normal((*x.shape[:2], -(-case.hidden // 128))).astype(F32)
    weights = routings.random_weights(rng, case) if weighted else None
    arguments = (case, routed.topk_idx, x, weights)
    layout, received = device_backend.layout_and_dispatch(
        *arguments, scales=scales, expand=expand, **options
    )
    theirs, expected = ORACLE.layout_and_dispatch(
        *arguments, scales=scales, expand=expand, **options
    )
    for name in LAYOUT_ARRAYS:
        assert_same_bits(getattr(layout, name), getattr(theirs, name))
    # Weights are by expert row in either case.
    by_expert = reference.specified_rows(theirs.handle)
    if weights is not None:
        assert_same_bits(received.weights[by_expert], expected.weights[by_expert])
    by_row = reference.specified_rows(theirs.handle, expand=expand)
    without_weights = [type(r)((r.tokens, None, r.scales)) for r in (received, expected)]
    assert_same_received(*without_weights, by_row)


# Of x, and what of dispatch's rows has a gradient: tokens and weights, or weights alone.
GRADIENTS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("bfloat16", {}, True),
    ("float32", {"expand": False}, True),
    ("bfloat16", {"fp8": "float32", "dequantize": True}, True),
    ("bfloat16", {"fp8": "power_of_two"}, False),
    ("int32", {}, False),
)


@pytest.mark.versions
def test_gradients_are_those_of_dispatch(device_backend: JaxBackend) -> None:
    """To the bit, in every form that has one."""
    case = Case(4, 9, 3, 8, hidden=128, capacity=16, expert_alignment=4)
    rng = np.random.default_rng(40)
    ids = routings.topk_ids(rng, case, "invalid")
    x, weights = routings.random_rows(rng, (4, 9, 128), F32), routings.random_weights(rng, case)

    def send(in_one: bool, ids: Any, x: Any, weights: Any, **form: Any) -> jax_ep.Dispatched:
        if in_one:
            return jax_ep.layout_and_dispatch(x, ids, weights, **layout_options(case), **form)[1]
        layout = jax_ep.make_layout(ids, **layout_options(case))
        return jax_ep.dispatch(x, layout, weights, **form)

    def gradients(ids: Any, x: Any, weights: Any) -> Any:
        """By the call in one, and by the two."""
        pulled: tuple[list[Any], list[Any]] = ([], [])
        for in_one, results in zip((True, False), pulled, strict=True):
            for dtype, form, of_rows in GRADIENTS:
                call = functools.partial(send, in_one, ids, **form)
                rows = (x * 9).astype(dtype)
                if of_rows:
                    both, pull = jax.vjp(lambda x, w, f=call: f(x, w)[:2], rows, weights)
                    results.append(pull((both[0] * 2, both[1] + 1)))
                else:
                    some, pull = jax.vjp(lambda w, x=rows, f=call: f(x, w).weights, weights)
                    results.append(pull(some + 1))
        return pulled

    ours, theirs = device_backend.run(4, gradients, ids, x, weights)
    assert len(jax.tree.leaves(ours)) == 8
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.any(a)
        assert_same_bits(a, b)


def test_rows_without_a_gradient() -> None:
    """The error names this verb."""

    def loss(x: Any, ids: Any, scales: Any) -> Any:
        _, recv = jax_ep.layout_and_dispatch(x, ids, num_experts=16, axis_name="ep", scales=scales)
        return recv.tokens.astype(jnp.float32).sum()

    run = jax.shard_map(jax.grad(loss), mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    arguments = (
        jax.ShapeDtypeStruct((48, 32), E4M3),
        jax.ShapeDtypeStruct((48, 2), np.int32),
        jax.ShapeDtypeStruct((48, 2), F32),
    )
    with pytest.raises(TypeError, match=r"^jax_ep.layout_and_dispatch was differentiated"):
        jax.eval_shape(run, *arguments)


def test_a_rank_may_have_no_tokens(device_backend: JaxBackend) -> None:
    """And the next step others, in the same program."""
    case, rng = Case(3, 5, 2, 6, hidden=8, capacity=12), np.random.default_rng(41)
    for idle in (0, 2, 1):
        ids = routings.topk_ids(rng, case, "uniform")
        ids[idle] = -1
        x, weights = routings.random_rows(rng, (3, 5, 8), BF16), routings.random_weights(rng, case)
        layout, received = device_backend.layout_and_dispatch(case, ids, x, weights)
        theirs, expected = ORACLE.layout_and_dispatch(case, ids, x, weights)
        assert_same_bits(layout.recv_src, theirs.recv_src)
        assert not np.any(layout.recv_src // 10 == idle)
        assert_same_received(received, expected, reference.specified_rows(theirs.handle))


def test_steps_in_a_loop(device_backend: JaxBackend) -> None:
    """A loop of calls on rows that the call before gave, two in a step, as in decoding."""
    case, num_steps = Case(4, 6, 2, 8, hidden=16), 12
    rng = np.random.default_rng(42)
    ids = np.stack([routings.topk_ids(rng, case, "nowhere") for _ in range(num_steps)], axis=1)
    x = rng.integers(-4, 5, rows_shape(case)).astype(F32)

    def decode(ids: Any, x: Any) -> Any:
        options = layout_options(case)

        def step(carry: Any) -> Any:
            i, x = carry
            for ids_now in (ids[i], ids[i, ::-1]):
                layout, recv = jax_ep.layout_and_dispatch(x, ids_now, **options)
                x = (3 * x + jax_ep.combine(recv.tokens, layout) + 1) % 8
            return i + 1, x

        return jax.lax.while_loop(lambda carry: carry[0] < num_steps, step, (0, x))[1]

    expected = x
    for i in range(num_steps):
        for now in (ids[:, i], ids[:, i, ::-1]):
            num_rows = (now >= 0).sum(axis=-1)  # without drops a token's rows come back
            expected = ((3 + num_rows[..., None]) * expected + 1) % 8
    assert_same_bits(device_backend.run(4, decode, ids, x), expected.astype(F32))


@pytest.mark.versions
def test_what_is_recomputed() -> None:
    """Calls of layout, dispatch and combine in the gradient of a layer whose router is frozen."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)

    def calls(argnums: Any, policy: Any, expand: bool = True) -> tuple[int, ...]:
        def layer(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
            layout, recv = jax_ep.layout_and_dispatch(
                x, ids, weights, num_experts=16, axis_name="ep", expand=expand
            )
            rows = recv.tokens if expand else recv.tokens[layout.row_token]
            return jax_ep.combine(jnp.sin(rows * scale), layout, recv.weights)

        run = jax.shard_map(
            jax.checkpoint(layer, policy=policy),
            mesh=mesh,
            in_specs=(P("ep"), P("ep"), P("ep"), P()),
            out_specs=P("ep"),
        )
        arguments = (*problem.inputs[:3], np.ones(8, F32))
        return traced_calls(jax.grad(lambda *args: run(*args).sum(), argnums), *arguments)

    saved = save_only("jax_ep_layout")
    offloaded = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["jax_ep_layout"],
        offload_src="device",
        offload_dst="pinned_host",
    )
    # Forward's layout and dispatch; again the rows; and the gradient of combine.
    assert calls(3, saved) == (1, 3, 1)
    assert calls(3, offloaded) == (1, 3, 1)
    assert calls(3, None) == (2, 3, 1)
    # Rows that are saved are not sent again where the layout is not.
    assert calls(3, save_only("jax_ep_dispatch")) == (2, 2, 1)
    # And of x, backward's combine.
    for expand in (True, False):
        assert calls((0, 3), saved, expand) == (1, 3, 2)
        assert calls((0, 3), None, expand) == (2, 3, 2)


@pytest.mark.versions
def test_a_layout_varies_as_its_ids_do() -> None:
    """Rows may be split over further axes: the layout is the same on these, and may leave so."""
    names = ("ep", "tp")
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), names, axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(43)
    case = Case(4, 5, 2, 8, hidden=16)
    ids = routings.topk_ids(rng, case, "uniform").reshape(20, 2)
    x = rng.standard_normal((20, 16)).astype(F32)

    def layer(x: Any, ids: Any) -> Any:
        layout, recv = jax_ep.layout_and_dispatch(x, ids, num_experts=8, axis_name="ep")
        return layout.stats(), jax_ep.combine(recv.tokens, layout)

    def gradient(x: Any, ids: Any) -> Any:
        (stats, out), pull = jax.vjp(lambda x: layer(x, ids), x)
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), stats)
        return stats, out, *pull((zeros, out))

    rows = P("ep", "tp")
    run = jax.shard_map(
        gradient, mesh=mesh, in_specs=(rows, P("ep")), out_specs=(P("ep"), rows, rows)
    )
    stats, out, d_x = jax.jit(run)(*place(mesh, (rows, P("ep")), (x, ids)))
    np.testing.assert_array_equal(stats["num_recv"].sum(), ids.size)
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(d_x, 4 * x)


@pytest.mark.versions
def test_ids_that_are_not_mapped_have_one_layout() -> None:
    """Under vmap of the rows alone, as with the two calls: it may leave as one."""

    def layer(x: Any, ids: Any) -> Any:
        layout, recv = jax_ep.layout_and_dispatch(x, ids, num_experts=16, axis_name="ep")
        return jax_ep.combine(recv.tokens, layout), layout.stats()

    run = jax.shard_map(
        jax.vmap(layer, in_axes=(0, None), out_axes=(0, None)),
        mesh=EP.mesh(),
        in_specs=(P(None, "ep"), P("ep")),
        out_specs=(P(None, "ep"), P("ep")),
    )
    x = np.arange(2 * 16 * 4, dtype=F32).reshape(2, 16, 4)
    ids = routings.topk_ids(np.random.default_rng(44), Case(8, 2, 2, 16, hidden=8), "uniform")
    out, stats = jax.jit(run)(x, ids.reshape(16, 2))
    np.testing.assert_array_equal(out, 2 * x)
    np.testing.assert_array_equal(stats["num_recv"].sum(), ids.size)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk_idx": ((48, 2), "int64")}, TypeError, "topk_idx must be int32"),
        ({"x": ((40, 8), "float32")}, ValueError, "x has 5 tokens, but topk_idx has ids for 6"),
        ({"x": ((48, 3), "float32")}, ValueError, "a row of x must be a multiple of 16 bytes"),
        ({"topk_weights": ((48, 3), "float32")}, ValueError, "topk_weights must have shape"),
        ({"capacity": 8, "expert_capacity": 4}, ValueError, "give capacity or expert_capacity"),
        ({"dequantize": True}, ValueError, "dequantize=True needs fp8"),
        ({"num_experts": 12}, ValueError, "num_experts must be a multiple of the 8 ranks"),
        # When it is lowered for CUDA, where it is two calls of other names.
        ({"topk_idx": ((48, 40), "int32"), "num_experts": 64}, ValueError, "for CUDA k"),
    ],
)
def test_errors_name_the_verb(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arrays: dict[str, Any] = {"x": ((48, 8), "float32"), "topk_idx": ((48, 2), "int32")}
    arrays |= {name: value for name, value in changes.items() if isinstance(value, tuple)}
    options = {"num_experts": 16, "axis_name": AXIS}
    options |= {name: value for name, value in changes.items() if name not in arrays}

    def f(arrays: dict[str, Any]) -> Any:
        return jax_ep.layout_and_dispatch(**arrays, **options)[1].tokens

    run = jax.jit(jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep")))
    with (
        jax.enable_x64(True),
        pytest.raises(error, match=rf"^jax_ep.layout_and_dispatch: {message}"),
    ):
        run.trace(
            {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}
        ).lower(lowering_platforms=("cuda",))


def test_ids_are_checked(device_backend: JaxBackend) -> None:
    def layer(ids: Any, x: Any) -> Any:
        options = {"num_experts": 8, "axis_name": AXIS, "check_ids": True}
        return jax_ep.layout_and_dispatch(x, ids, **options)[1].tokens

    ids = np.zeros((4, 1, 1), np.int32)
    ids[3] = 99
    named = r"jax_ep.layout_and_dispatch: ids .*: rank 3 has 1 of 1, its ids lie in \[99, 99\]"
    with pytest.raises(jax.errors.JaxRuntimeError, match=named):
        device_backend.run(4, layer, ids, np.zeros((4, 1, 8), F32))
