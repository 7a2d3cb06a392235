"""Ranks on several nodes: the order of sums on CPU, and who says how many ranks a node has."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import routings
from backends import BACKENDS, BackendLayout
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from numpy.typing import DTypeLike
from roundings import NODE_ROUNDINGS, one_token_on_six_ranks
from routings import Case, assert_same_bits
from sharded_layers import EP, make_problem, sharded_layer, sizes
from test_lowering import DISABLED_CHECKS, calls, gradients, lower

import jax_ep
from jax_ep import environment, nodes

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, on NaN and overflow
]

BF16, F16, F32 = ml_dtypes.bfloat16, np.float16, np.float32
ORACLE = BACKENDS["reference"]


def on_nodes(layout: BackendLayout, ranks_per_node: int) -> BackendLayout:
    handle = dataclasses.replace(layout.handle, ranks_per_node=ranks_per_node)
    return dataclasses.replace(layout, handle=handle)


# The order of sums --------------------------------------------------------------------------------


def test_rounding_by_hand() -> None:
    cpu = BACKENDS["cpu"]
    for name, (dtype, choices, expected, _) in NODE_ROUNDINGS.items():
        ids, y = one_token_on_six_ranks(dtype, choices)
        layout = cpu.make_layout(Case(6, 1, 4, 6, hidden=8), ids)
        out = cpu.combine(y, on_nodes(layout, 2))
        try:
            assert_same_bits(out[0, 0], np.full(8, expected, dtype))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_any_routing(dtype: DTypeLike) -> None:
    """To the bit as the oracle: zeros of both signs, subnormals, numbers that overflow."""
    cpu, case, rng = BACKENDS["cpu"], Case(8, 12, 8, 64, hidden=520), np.random.default_rng(60)
    ids = routings.topk_ids(rng, case, "nowhere")
    layout, oracle = cpu.make_layout(case, ids), ORACLE.make_layout(case, ids)
    y = routings.random_rows(rng, (8, case.num_rows, case.hidden), dtype, specials=True)
    y[~layout.row_valid] = np.nan
    weights = rng.standard_normal(y.shape[:2]).astype(F32)
    results = [ORACLE.combine(y, oracle, weights)]
    for n in (2, 4):
        expected = ORACLE.combine(y, on_nodes(oracle, n), weights)
        assert_same_bits(cpu.combine(y, on_nodes(layout, n), weights), expected)
        results.append(expected)
    assert np.isinf(results[0].astype(F32)).any()
    finite = np.isfinite(np.stack(results).astype(F32)).all(axis=0)
    for a, b in itertools.combinations(results, 2):
        assert (a != b)[finite].mean() > 0.01, "the data misses the point"


@pytest.mark.parametrize("expand", [True, False])
def test_gradient_of_dispatch(expand: bool) -> None:
    cpu, case, rng = BACKENDS["cpu"], Case(8, 12, 8, 64, hidden=64), np.random.default_rng(61)
    ids = routings.topk_ids(rng, case, "nowhere")
    layout, oracle = cpu.make_layout(case, ids), ORACLE.make_layout(case, ids)
    num_rows = case.num_rows if expand else 8 * 12 + 1
    rows = routings.random_rows(rng, (8, num_rows, case.hidden), BF16)
    d_x, _ = cpu.dispatch_vjp(on_nodes(layout, 4), rows, expand=expand)
    expected, on_one = (
        ORACLE.dispatch_vjp(of, rows, expand=expand)[0] for of in (on_nodes(oracle, 4), oracle)
    )
    assert_same_bits(d_x, expected)
    assert (expected != on_one).mean() > 0.01, "the data misses the point"


# Who says it --------------------------------------------------------------------------------------


@pytest.fixture
def nodes_of_two() -> Iterator[None]:
    jax_ep.initialize(ranks_per_node=2)
    yield
    jax_ep.finalize()


def ranks_per_node_in(mesh: Any, axis_name: Any, *, by_moe: bool = False) -> set[Any]:
    """Of all combines in a layer and its gradient, as they are lowered for CPU."""

    def f(x: Any, ids: Any) -> Any:
        if by_moe:
            weights, options = jnp.ones(ids.shape), {"num_experts": 24, "axis_name": axis_name}
            return jax_ep.moe(x, ids, weights, lambda tokens, _: tokens, **options)[0]
        layout = jax_ep.make_layout(ids, num_experts=24, axis_name=axis_name)
        return jax_ep.combine(jax_ep.dispatch(x, layout).tokens, layout)

    spec = P(mesh.axis_names)
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)
    args = [
        jax.ShapeDtypeStruct((mesh.size * 4, 8), "float32"),
        jax.ShapeDtypeStruct((mesh.size * 4, 2), "int32"),
    ]
    text = lower(jax.grad(lambda x, ids: jnp.sum(run(x, ids) ** 2)), args, "cpu")
    found = [call.attributes["ranks_per_node"] for call in calls(text) if call.op == "combine"]
    assert len(found) == 2
    return set(found)


def mesh_of(axes: dict[str, int], devices: Any = None) -> Mesh:
    devices = jax.devices("cpu") if devices is None else devices
    return Mesh(np.array(devices).reshape(tuple(axes.values())), tuple(axes))


def test_one_node_unless_something_is_said() -> None:
    assert ranks_per_node_in(mesh_of({"ep": 8}), "ep") == {8}
    assert ranks_per_node_in(mesh_of({"a": 2, "dp": 2, "b": 2}), ("b", "a")) == {4}


@pytest.mark.usefixtures("nodes_of_two")
def test_initialize_says_it() -> None:
    """Whatever the axes; groups of no more ranks lie on one node."""
    assert ranks_per_node_in(mesh_of({"ep": 8}), "ep") == {2}
    assert ranks_per_node_in(mesh_of({"a": 2, "dp": 2, "b": 2}), ("b", "a")) == {2}
    assert ranks_per_node_in(mesh_of({"dp": 4, "ep": 2}), "ep") == {2}
    assert ranks_per_node_in(mesh_of({"dp": 8, "ep": 1}), "ep") == {1}
    assert ranks_per_node_in(mesh_of({"ep": 8}), "ep", by_moe=True) == {2}
    abstract = AbstractMesh((4,), ("ep",), axis_types=(AxisType.Auto,))
    assert ranks_per_node_in(abstract, "ep") == {2}
    # It is what the arithmetic does, too.
    dtype, choices, on_nodes_of_two, alike = NODE_ROUNDINGS[
        "bf16 rounds what a node's ranks add up to"
    ]
    ids, y = one_token_on_six_ranks(dtype, choices)
    backend = type(BACKENDS["cpu"])("cpu", "cpu")  # without what it compiled before
    layout = backend.make_layout(Case(6, 1, 4, 6, hidden=8), ids)
    assert backend.combine(y, layout)[0, 0, 0] == on_nodes_of_two
    jax_ep.finalize()
    # What was compiled keeps its order, a new program has the usual one.
    assert backend.combine(y, layout)[0, 0, 0] == on_nodes_of_two
    backend = type(backend)("cpu", "cpu")
    assert backend.combine(y, layout)[0, 0, 0] == alike


@pytest.mark.usefixtures("nodes_of_two")
def test_a_layout_says_it_first() -> None:
    def f(x: Any, ids: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=8, axis_name="ep")
        layout = dataclasses.replace(layout, ranks_per_node=4)
        return jax_ep.combine(jax_ep.dispatch(x, layout).tokens, layout)

    run = jax.shard_map(f, mesh=EP.mesh(), in_specs=P("ep"), out_specs=P("ep"))
    args = [jax.ShapeDtypeStruct((16, 8), "float32"), jax.ShapeDtypeStruct((16, 2), "int32")]
    call = calls(lower(run, args, "cpu"))[-1]
    assert call.attributes["ranks_per_node"] == 4


def test_exported_program_keeps_its_order() -> None:
    """Wherever it is loaded it gives the same bits."""
    case = sizes(EP)
    inputs = make_problem(EP, case).inputs
    jax_ep.initialize(ranks_per_node=2)
    try:
        f = jax.jit(sharded_layer(EP, EP.mesh(), case))
        exported = jax.export.export(f, disabled_checks=DISABLED_CHECKS)(*inputs)
    finally:
        jax_ep.finalize()
    loaded = jax.export.deserialize(exported.serialize())
    assert calls(loaded.mlir_module())[-1].attributes["ranks_per_node"] == 2


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_EP_RANKS_PER_NODE", raising=False)
    assert environment.ranks_per_node() is None
    monkeypatch.setenv("JAX_EP_RANKS_PER_NODE", "8")
    assert environment.ranks_per_node() == 8
    for text in ("0", "-1", "2.0", "two", ""):
        monkeypatch.setenv("JAX_EP_RANKS_PER_NODE", text)
        with pytest.raises(ValueError, match="JAX_EP_RANKS_PER_NODE must be an integer above 0"):
            environment.ranks_per_node()


# By the hosts -------------------------------------------------------------------------------------


def test_hosts() -> None:
    """[groups, R] names of nodes."""

    def count(*groups: str) -> int:
        return nodes.on_each_node(np.array([list(names) for names in groups]), "test")

    assert count("aaaa") == 4
    assert count("aabb") == 2
    assert count("abcd") == 1
    assert count("bbaa", "ccdd") == 2
    assert count("ab", "ba", "ab") == 1  # ep across nodes, dp within
    for groups, told in (
        (["abab"], "group 0 has ranks 0 on a, 1 on b, 2 on a, 3 on b"),
        (["abba"], "group 0 has ranks 0 on a, 1 to 2 on b, 3 on a"),
        (["aaabbb", "aaaabb"], "group 0 has .* on b; group 1 has ranks 0 to 3 on a, 4 to 5 on b"),
        (["aaab"], "group 0 has ranks 0 to 2 on a, 3 on b"),
        (["aabaab"], "group 0 has ranks 0 to 1 on a, 2 on b, 3 to 4 on a, 5 on b"),
        (["aabb", "aaaa"], "group 1 has ranks 0 to 3 on a"),
        (["ababab"], "3 on b and 2 runs more"),
    ):
        with pytest.raises(ValueError, match=f"test: each group must have as many .*{told}"):
            count(*groups)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -2, 2.0, "2"])
def test_initialize_refuses(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="ranks_per_node must be"):
        jax_ep.initialize(ranks_per_node=value)


@pytest.mark.usefixtures("nodes_of_two")
def test_groups_that_it_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"ranks_per_node=2\).* got a group of 3"):
        ranks_per_node_in(mesh_of({"ep": 3}, jax.devices("cpu")[:3]), "ep")


def test_layouts_are_refused() -> None:
    def f(ids: Any, value: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=8, axis_name="ep")
        layout = dataclasses.replace(layout, ranks_per_node=value)
        return jax_ep.combine(jnp.zeros((layout.capacity, 8)), layout)

    ids = jax.ShapeDtypeStruct((16, 2), "int32")
    for value, error in ((3, ValueError), (0, ValueError), (16, ValueError), (2.0, TypeError)):
        run = jax.shard_map(
            lambda ids, value=value: f(ids, value),
            mesh=EP.mesh(),
            in_specs=P("ep"),
            out_specs=P("ep"),
        )
        with pytest.raises(error, match=r"jax_ep\.combine: layout\.ranks_per_node must"):
            jax.eval_shape(run, ids)


@pytest.mark.usefixtures("nodes_of_two")
def test_cuda_is_refused() -> None:
    """When it is lowered, forward and backward; on one node it is as ever."""
    case = sizes(EP)
    layer = sharded_layer(EP, EP.mesh(), case)
    inputs = make_problem(EP, case).inputs
    for f in (layer, gradients(layer)):
        with pytest.raises(NotImplementedError, match="8 ranks with 2 on each node is for CPU"):
            lower(f, inputs, "cuda")
    jax_ep.finalize()
    jax_ep.initialize(ranks_per_node=8)
    assert calls(lower(layer, inputs, "cuda"))[-1].attributes["ranks_per_node"] == 8
