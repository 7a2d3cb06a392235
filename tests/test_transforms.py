"""The verbs under JAX's transformations, and on all kinds of meshes.

Data are small integers and quarters, so every sum is exact in float32 whatever its order: results
and gradients must equal those of the unsharded layer exactly. Capacities are tight, so rows drop.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from backends import LAYOUT_ARRAYS
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray
from routings import Case

import jax_ep
from jax_ep import reference

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
OPS = ("layout", "dispatch", "combine")
save_only = jax.checkpoint_policies.save_only_these_names

checks_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
axis_types = pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT], ids=["auto", "explicit"])


# Meshes -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and which of its axes are the EP group.

    Attributes:
        axes: names and sizes, outermost first.
        ep: the EP axes, row-major.
        replicated: axes over which everything is the same; all the others split the tokens.
        order: ids of the devices in the mesh's order; None for the first ones, ascending.
    """

    axes: tuple[tuple[str, int], ...]
    ep: str | tuple[str, ...] = "ep"
    replicated: tuple[str, ...] = ()
    order: tuple[int, ...] | None = None

    def mesh(self, axis_type: AxisType = AUTO) -> Mesh:
        names, shape = zip(*self.axes, strict=True)
        order = self.order or range(math.prod(shape))
        devices = np.array([jax.devices("cpu")[i] for i in order])
        return Mesh(devices.reshape(shape), names, axis_types=(axis_type,) * len(names))

    @property
    def ep_axes(self) -> tuple[str, ...]:
        return (self.ep,) if isinstance(self.ep, str) else self.ep

    @property
    def group_axes(self) -> tuple[str, ...]:
        """The axes that number the groups which have tokens of their own."""
        without = (*self.ep_axes, *self.replicated)
        return tuple(name for name, _ in self.axes if name not in without)

    @property
    def num_ranks(self) -> int:
        return math.prod(dict(self.axes)[name] for name in self.ep_axes)

    @property
    def num_groups(self) -> int:
        return math.prod(dict(self.axes)[name] for name in self.group_axes)

    @property
    def tokens(self) -> P:
        """Splits the leading axis of global arrays: group by group, ranks ascending."""
        return P((*self.group_axes, *self.ep_axes))

    @property
    def experts(self) -> P:
        """Splits the leading axis of the experts' parameters."""
        return P(self.ep_axes)


PLACEMENTS: dict[str, Placement] = {
    "ep": Placement((("ep", 8),)),
    "reversed": Placement((("ep", 8),), order=(7, 6, 5, 4, 3, 2, 1, 0)),
    "permuted": Placement((("ep", 8),), order=(3, 6, 0, 7, 1, 5, 2, 4)),
    "dp_ep": Placement((("dp", 2), ("ep", 4))),
    "ep_dp": Placement((("ep", 4), ("dp", 2))),
    "dp_ep_permuted": Placement((("dp", 2), ("ep", 4)), order=(5, 0, 3, 6, 1, 7, 4, 2)),
    "tuple": Placement((("a", 2), ("b", 4)), ep=("a", "b")),
    "tuple_reversed": Placement((("a", 2), ("b", 4)), ep=("b", "a")),
    "tuple_around_dp": Placement((("a", 2), ("dp", 2), ("b", 2)), ep=("a", "b")),
    "dp_ep_tp": Placement((("dp", 2), ("ep", 2), ("tp", 2)), replicated=("tp",)),
    "tp_ep_dp": Placement((("tp", 2), ("ep", 2), ("dp", 2)), replicated=("tp",)),
    "one_rank": Placement((("dp", 8), ("ep", 1))),
    "three_of_eight": Placement((("ep", 3),), order=(6, 1, 4)),
}
EP = PLACEMENTS["ep"]
DP_EP = PLACEMENTS["dp_ep"]


def sizes(placement: Placement, **changes: Any) -> Case:
    """The usual static sizes on this mesh."""
    experts = 24 if placement.num_ranks == 3 else 16
    case = Case(placement.num_ranks, 6, 2, experts, hidden=8, capacity=10, expert_alignment=2)
    return dataclasses.replace(case, **changes)


# Data, and the layer without sharding -------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Global inputs of one layer (N = groups * ranks), and what must come out.

    Attributes:
        x: [N * T, H].
        topk_idx: [N * T, K].
        topk_weights: [N * T, K].
        scale: [E, H], the experts' parameters.
        target: [N * T, H]; the loss is the sum of out * target.
        layouts: the oracle's layout of each group.
    """

    x: NDArray[np.float32]
    topk_idx: NDArray[np.int32]
    topk_weights: NDArray[np.float32]
    scale: NDArray[np.float32]
    target: NDArray[np.float32]
    layouts: tuple[reference.ReferenceLayout, ...]

    @property
    def inputs(self) -> tuple[NDArray[Any], ...]:
        return self.x, self.topk_idx, self.topk_weights, self.scale

    @functools.cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Bool [N * T, K]."""
        return np.concatenate([layout.kept for layout in self.layouts]).reshape(self.topk_idx.shape)

    def out(self, *, square: bool = True) -> NDArray[np.float32]:
        """The layer's result by the oracle, [N * T, H]."""
        parts = zip(self.layouts, np.split(self.x, len(self.layouts)), strict=True)
        weights = np.split(self.topk_weights, len(self.layouts))
        outs = []
        for (layout, x), group_weights in zip(parts, weights, strict=True):
            rows, row_weights = reference.dispatch(
                x.reshape(layout.num_ranks, layout.num_tokens, -1),
                layout,
                group_weights.reshape(layout.topk_idx.shape),
            )
            scale = self.scale.reshape(layout.num_ranks, -1, self.scale.shape[1])
            for rank in range(layout.num_ranks):
                factors = np.repeat(scale[rank], layout.group_sizes[rank], axis=0)
                here = rows[rank, : len(factors)]
                here *= factors * here if square else factors
            outs.append(reference.combine(rows, layout, row_weights).reshape(x.shape))
        return np.concatenate(outs)

    def gradients(self, *, square: bool = True) -> tuple[NDArray[np.float32], ...]:
        """The gradients of the loss by x, topk_weights and scale, without sharding."""
        grads = dense_gradients(square, *self.inputs, self.kept, self.target)
        return tuple(np.asarray(g) for g in grads)

    @property
    def loss(self) -> float:
        return float(np.sum(self.out() * self.target))


def make_problem(placement: Placement, case: Case, seed: int = 0, kind: str = "nowhere") -> Problem:
    rng = np.random.default_rng(seed)
    num_shards = placement.num_groups * placement.num_ranks
    ids = [routings.topk_ids(rng, case, kind) for _ in range(placement.num_groups)]

    def quarters(low: int, high: int, *shape: int) -> NDArray[np.float32]:
        return (rng.integers(low, high + 1, shape) / 4).astype(np.float32)

    rows = num_shards * case.num_tokens
    return Problem(
        x=4 * quarters(-2, 2, rows, case.hidden),
        topk_idx=np.concatenate(ids).reshape(rows, case.top_k),
        topk_weights=quarters(1, 4, rows, case.top_k),
        scale=4 * quarters(-2, 2, case.num_experts, case.hidden),
        target=4 * quarters(-2, 2, rows, case.hidden),
        layouts=tuple(case.reference_layout(i) for i in ids),
    )


def dense_layer(
    square: bool, x: Any, topk_idx: Any, topk_weights: Any, scale: Any, kept: Any
) -> jax.Array:
    """The layer on all tokens at once, no expert parallelism."""
    factors = jnp.asarray(scale)[jnp.clip(topk_idx, 0, scale.shape[0] - 1)]
    rows = factors * (x * x if square else x)[:, None]
    return jnp.sum(jnp.where(kept, topk_weights, 0)[..., None] * rows, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def dense_gradients(square: bool, x: Any, ids: Any, weights: Any, *rest: Any) -> Any:
    def loss(x: Any, weights: Any, scale: Any, kept: Any, target: Any) -> jax.Array:
        return jnp.sum(dense_layer(square, x, ids, weights, scale, kept) * target)

    return jax.grad(loss, argnums=(0, 1, 2))(x, weights, *rest)


# The layer with expert parallelism ----------------------------------------------------------------


def experts(scale: Any, square: bool, tokens: Any, group_sizes: Any) -> jax.Array:
    """Expert e multiplies its rows (or their squares) by scale[e]."""
    expert = jnp.repeat(
        jnp.arange(group_sizes.shape[0]), group_sizes, total_repeat_length=tokens.shape[0]
    )
    return scale[expert] * (tokens * tokens if square else tokens)


def shard_layer(case: Case, axis: str | tuple[str, ...], *, square: bool = True) -> Callable:
    """The layer as a per-shard function: x, topk_idx, topk_weights, scale -> out, layout."""

    def layer(x: Any, topk_idx: Any, topk_weights: Any, scale: Any) -> Any:
        return jax_ep.moe(
            x,
            topk_idx,
            topk_weights,
            functools.partial(experts, scale, square),
            num_experts=case.num_experts,
            axis_name=axis,
            capacity=case.capacity,
            expert_alignment=case.expert_alignment,
        )

    return layer


def in_specs(placement: Placement) -> tuple[P, ...]:
    return (placement.tokens,) * 3 + (placement.experts,)


def sharded_layer(
    placement: Placement, mesh: Mesh, case: Case, *, check_vma: bool = True, square: bool = True
) -> Callable:
    """The layer as a function of global arrays: x, topk_idx, topk_weights, scale -> out."""
    layer = shard_layer(case, placement.ep, square=square)
    return jax.shard_map(
        lambda *args: layer(*args)[0],
        mesh=mesh,
        in_specs=in_specs(placement),
        out_specs=placement.tokens,
        check_vma=check_vma,
    )


def place(mesh: Mesh, specs: Sequence[P], arrays: Sequence[Any]) -> list[jax.Array]:
    return [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)]


def value_and_gradients(layer: Callable, placement: Placement, mesh: Mesh) -> Callable:
    """x, topk_idx, topk_weights, scale, target -> loss, out and the three gradients."""

    def loss(x: Any, ids: Any, weights: Any, scale: Any, target: Any) -> Any:
        out = layer(x, ids, weights, scale)
        return jnp.sum(out * target), out

    return jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True)


def assert_equal(actual: Any, expected: Any) -> None:
    """All leaves, exactly (zeros of either sign are equal)."""
    actual_leaves, expected_leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves)
    for a, e in zip(actual_leaves, expected_leaves, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


def check_values_and_gradients(
    problem: Problem, placement: Placement, mesh: Mesh, layer: Callable
) -> None:
    arrays = place(
        mesh, (*in_specs(placement), placement.tokens), (*problem.inputs, problem.target)
    )
    (loss, out), grads = value_and_gradients(layer, placement, mesh)(*arrays)
    assert_equal(out, problem.out())
    assert float(loss) == problem.loss
    assert_equal(grads, problem.gradients())


# Counting custom calls ----------------------------------------------------------------------------


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def traced_calls(f: Callable, *args: Any) -> tuple[int, ...]:
    """Calls of layout, dispatch and combine in f's jaxpr; a loop's body counts once."""
    names = collections.Counter(
        e.primitive.name for e in _equations(jax.make_jaxpr(f)(*args).jaxpr)
    )
    return tuple(names[f"jax_ep_{op}"] for op in OPS)


def calls_in(compiled: Any) -> tuple[int, ...]:
    """Calls of layout, dispatch and combine in a compiled program; a loop's body counts once."""
    text = compiled.as_text()
    return tuple(text.count(f'custom_call_target="jax_ep_{op}"') for op in OPS)


def compiled_calls(f: Callable, *args: Any) -> tuple[int, ...]:
    """The same of a function."""
    return calls_in(jax.jit(f).lower(*args).compile())


# The harness itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLACEMENTS)
def test_problem_is_not_trivial(name: str) -> None:
    """Some rows drop, some arrive everywhere, and the oracle agrees with the dense layer."""
    placement = PLACEMENTS[name]
    problem = make_problem(placement, sizes(placement))
    for layout in problem.layouts:
        assert layout.num_recv.all()
    assert sum(layout.num_dropped.sum() for layout in problem.layouts) > 0
    for square in (True, False):
        dense = dense_layer(square, *problem.inputs, problem.kept)
        assert_equal(problem.out(square=square), dense)
    assert all(np.any(g) for g in problem.gradients())


# Meshes: Auto and Explicit axes, several axes, any order of devices -------------------------------


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [(name, AUTO) for name in PLACEMENTS]
    + [(name, EXPLICIT) for name in ("ep", "ep_dp", "dp_ep_permuted", "tuple", "dp_ep_tp")],
    ids=lambda v: v if isinstance(v, str) else v.name.lower(),
)
def test_mesh(name: str, axis_type: AxisType) -> None:
    """Result, loss and gradients on every mesh, in one jit."""
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(axis_type), sizes(placement)
    problem = make_problem(placement, case)
    layer = sharded_layer(placement, mesh, case)
    arrays = place(
        mesh, (*in_specs(placement), placement.tokens), (*problem.inputs, problem.target)
    )
    (loss, out), grads = jax.jit(value_and_gradients(layer, placement, mesh))(*arrays)
    assert_equal(out, problem.out())
    assert float(loss) == problem.loss
    assert_equal(grads, problem.gradients())
    for gradient, spec in zip(grads, (placement.tokens,) * 2 + (placement.experts,), strict=True):
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)


@checks_vma
@pytest.mark.parametrize("name", ["dp_ep_tp", "tp_ep_dp", "tuple_around_dp", "permuted"])
def test_layout_on_mesh(name: str, check_vma: bool) -> None:
    """Every array of every rank's layout, in groups that a replicated axis repeats."""
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(), sizes(placement)
    problem = make_problem(placement, case, kind="invalid")

    def f(topk_idx: Any) -> Any:
        layout = jax_ep.make_layout(
            topk_idx,
            num_experts=case.num_experts,
            axis_name=placement.ep,
            capacity=case.capacity,
            expert_alignment=case.expert_alignment,
        )
        arrays = {name: getattr(layout, name)[None] for name in LAYOUT_ARRAYS}
        return arrays | {"stats": layout.stats()}

    run = jax.shard_map(
        f, mesh=mesh, in_specs=placement.tokens, out_specs=placement.tokens, check_vma=check_vma
    )
    results = jax.jit(run)(jax.device_put(problem.topk_idx, NamedSharding(mesh, placement.tokens)))
    for field in LAYOUT_ARRAYS:
        assert_equal(
            results[field], np.concatenate([getattr(layout, field) for layout in problem.layouts])
        )
    for field, value in results["stats"].items():
        assert_equal(value, np.concatenate([getattr(layout, field) for layout in problem.layouts]))


@pytest.mark.parametrize("axis_type", [AUTO, EXPLICIT, None], ids=["auto", "explicit", "default"])
def test_mesh_from_context(axis_type: AxisType | None) -> None:
    """jax.make_mesh and jax.set_mesh, no mesh argument anywhere."""
    types = None if axis_type is None else (axis_type,) * 2
    mesh = jax.make_mesh((2, 4), ("dp", "ep"), axis_types=types, devices=jax.devices("cpu"))
    case = sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    layer = shard_layer(case, "ep")
    with jax.set_mesh(mesh):
        f = jax.shard_map(
            lambda *args: layer(*args)[0], in_specs=in_specs(DP_EP), out_specs=DP_EP.tokens
        )
        specs = (*in_specs(DP_EP), DP_EP.tokens)
        arrays = place(mesh, specs, (*problem.inputs, problem.target))
        (loss, out), grads = jax.jit(value_and_gradients(f, DP_EP, mesh))(*arrays)
    assert_equal(out, problem.out())
    assert float(loss) == problem.loss
    assert_equal(grads, problem.gradients())


def test_explicit_types_carry_through() -> None:
    """With Explicit axes the result's type says how it is sharded, and ops on it follow."""
    mesh, case = DP_EP.mesh(EXPLICIT), sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    seen = []

    @jax.jit
    def f(*args: Any) -> jax.Array:
        out = sharded_layer(DP_EP, mesh, case)(*args) + args[0]
        seen.append(jax.typeof(out).sharding.spec)
        return out

    out = f(*place(mesh, in_specs(DP_EP), problem.inputs))
    assert seen == [P(("dp", "ep"), None)]
    assert_equal(out, problem.out() + problem.x)


def test_disjoint_and_overlapping_meshes_in_turn() -> None:
    """Programs on different devices keep to themselves, also while several are in flight."""
    runs = []
    for i, order in enumerate([(0, 1, 2, 3), (4, 5, 6, 7), (5, 4, 3, 2), (4, 6, 7, 5)]):
        placement = Placement((("ep", 4),), order=order)
        mesh, case = placement.mesh(), sizes(placement)
        problem = make_problem(placement, case, seed=i)
        run = jax.jit(sharded_layer(placement, mesh, case))
        runs.append((run, place(mesh, in_specs(placement), problem.inputs), problem.out()))
    for _ in range(4):
        outs = [run(*arrays) for run, arrays, _ in runs]
        for out, (_, _, expected) in zip(outs, runs, strict=True):
            assert_equal(out, expected)


def test_two_meshes_of_half_the_devices_in_one_step() -> None:
    """Two disjoint meshes: what one gives feeds the other, both ways, forward and backward."""
    halves = [Placement((("ep", 4),), order=order) for order in [(0, 1, 2, 3), (7, 6, 5, 4)]]
    case = sizes(halves[0])
    problem = make_problem(halves[0], case)
    x, rest = problem.x, problem.inputs[1:]
    for placement in halves:
        mesh = placement.mesh()
        step = jax.jit(sharded_layer(placement, mesh, case, square=False))
        arrays = place(mesh, in_specs(placement), (x, *rest))
        expected = dense_layer(False, x, *rest, problem.kept)
        x = np.asarray(step(*arrays))
        assert_equal(x, expected)


# jit and eager ------------------------------------------------------------------------------------


@checks_vma
@axis_types
@pytest.mark.parametrize("name", ["ep", "dp_ep_tp"])
def test_jit(name: str, axis_type: AxisType, check_vma: bool) -> None:
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(axis_type), sizes(placement)
    problem = make_problem(placement, case, seed=1)
    f = jax.jit(sharded_layer(placement, mesh, case, check_vma=check_vma))
    assert_equal(f(*place(mesh, in_specs(placement), problem.inputs)), problem.out())


@pytest.mark.parametrize(
    ("name", "axis_type", "check_vma"),
    [("ep", EXPLICIT, True), ("dp_ep_tp", AUTO, False)],
    ids=["ep-explicit-vma", "dp_ep_tp-auto-no_vma"],
)
def test_eager(name: str, axis_type: AxisType, check_vma: bool) -> None:
    """An eager shard_map runs primitive by primitive, each compiled on its own."""
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(axis_type), sizes(placement)
    problem = make_problem(placement, case, seed=1)
    f = sharded_layer(placement, mesh, case, check_vma=check_vma)
    assert_equal(f(*place(mesh, in_specs(placement), problem.inputs)), problem.out())


def test_eager_value_and_grad() -> None:
    mesh, case = DP_EP.mesh(), sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    check_values_and_gradients(problem, DP_EP, mesh, sharded_layer(DP_EP, mesh, case))


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ep", "dp_ep", "dp_ep_tp", "tuple_around_dp"])
def test_value_and_grad_outside(name: str) -> None:
    """As test_mesh, but without check_vma, and only the layer itself in jit.

    Parameters that are replicated over dp or tp get the sum over dp, once.
    """
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(), sizes(placement)
    problem = make_problem(placement, case, seed=2)
    layer = jax.jit(sharded_layer(placement, mesh, case, check_vma=False))
    check_values_and_gradients(problem, placement, mesh, layer)


@checks_vma
@pytest.mark.parametrize("argument", range(3), ids=["x", "topk_weights", "scale"])
def test_grad_by_one_argument(argument: int, check_vma: bool) -> None:
    """The others are constants to autodiff: their cotangents need not be formed."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case, check_vma=check_vma)
    gradient = jax.grad(lambda *a: jnp.sum(layer(*a[:4]) * a[4]), argnums=(0, 2, 3)[argument])
    arrays = place(mesh, (*in_specs(EP), EP.tokens), (*problem.inputs, problem.target))
    assert_equal(jax.jit(gradient)(*arrays), problem.gradients()[argument])


@pytest.mark.parametrize(("how", "check_vma"), [("jit", True), ("jit", False), ("eager", False)])
def test_value_and_grad_inside(how: str, check_vma: bool) -> None:
    """Each shard's loss is its own; the gradient is that of their sum."""
    mesh, case = DP_EP.mesh(), sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    layer = shard_layer(case, "ep")

    def step(x: Any, ids: Any, weights: Any, scale: Any, target: Any) -> Any:
        def loss(x: Any, weights: Any, scale: Any) -> jax.Array:
            return jnp.sum(layer(x, ids, weights, scale)[0] * target)

        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(x, weights, scale)
        if not check_vma:  # with it JAX itself sums over the axes that scale is replicated over
            grads = (*grads[:2], lax.psum(grads[2], "dp"))
        return value[None], grads

    specs = (*in_specs(DP_EP), DP_EP.tokens)
    run = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=specs,
        out_specs=(DP_EP.tokens, (DP_EP.tokens, DP_EP.tokens, DP_EP.experts)),
        check_vma=check_vma,
    )
    run = jax.jit(run) if how == "jit" else run
    values, grads = run(*place(mesh, specs, (*problem.inputs, problem.target)))
    assert_equal(values, np.sum((problem.out() * problem.target).reshape(8, -1), axis=1))
    assert_equal(grads, problem.gradients())


def _directional(loss: Callable, tangents: Sequence[Any]) -> Callable:
    """The gradient's inner product with the tangents, a function to differentiate once more."""

    def inner(*args: Any) -> jax.Array:
        grads = jax.grad(loss, argnums=(0, 1, 2))(*args)
        return sum(jnp.sum(g * t) for g, t in zip(grads, tangents, strict=True))

    return inner


@checks_vma
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_grad_of_grad(where: str, check_vma: bool) -> None:
    """A Hessian-vector product by reverse over reverse, in all three arguments."""
    mesh, case = EP.mesh(), sizes(EP)
    problem, other = make_problem(EP, case), make_problem(EP, case, seed=9)
    x, ids, weights, scale = problem.inputs
    tangents = (other.x, other.topk_weights, other.scale)

    def dense(x: Any, weights: Any, scale: Any) -> jax.Array:
        return jnp.sum(dense_layer(True, x, ids, weights, scale, problem.kept) * problem.target)

    expected = jax.jit(jax.grad(_directional(dense, tangents), argnums=(0, 1, 2)))
    layer = shard_layer(case, "ep")

    def local_loss(ids: Any, target: Any, x: Any, weights: Any, scale: Any) -> jax.Array:
        return jnp.sum(layer(x, ids, weights, scale)[0] * target)

    if where == "inside":

        def inside(ids: Any, target: Any, args: Any, tangents: Any) -> Any:
            loss = functools.partial(local_loss, ids, target)
            return jax.grad(_directional(loss, tangents), argnums=(0, 1, 2))(*args)

        hvp = jax.shard_map(
            inside, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=check_vma
        )
    else:
        run = sharded_layer(EP, mesh, case, check_vma=check_vma)

        def hvp(ids: Any, target: Any, args: Any, tangents: Any) -> Any:
            def loss(x: Any, weights: Any, scale: Any) -> jax.Array:
                return jnp.sum(run(x, ids, weights, scale) * target)

            return jax.grad(_directional(loss, tangents), argnums=(0, 1, 2))(*args)

    arrays = jax.device_put(
        (ids, problem.target, (x, weights, scale), tangents), NamedSharding(mesh, P("ep"))
    )
    products = expected(x, weights, scale)
    assert all(np.any(p) for p in products)
    assert_equal(jax.jit(hvp)(*arrays), products)


@checks_vma
@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize(
    "replicated", [("x",), ("topk_weights",), ("x", "topk_idx", "topk_weights")], ids="-".join
)
def test_replicated_inputs(replicated: tuple[str, ...], where: str, check_vma: bool) -> None:
    """An input that is the same on all ranks gets the sum of all ranks' cotangents."""
    mesh, case = EP.mesh(), sizes(EP, capacity=32)
    problem = make_problem(EP, case)
    names = ("x", "topk_idx", "topk_weights", "scale")
    small = {n: v for n, v in zip(names, problem.inputs, strict=True)}
    specs = dict(zip(names, in_specs(EP), strict=True))
    for name in replicated:
        small[name] = small[name][: case.num_tokens]
        specs[name] = P()

    def tile(name: str, value: Any) -> Any:
        return jnp.tile(value, (8, 1)) if name in replicated else value

    full = {n: np.asarray(tile(n, v)) for n, v in small.items()}
    layout = case.reference_layout(full["topk_idx"].reshape(8, case.num_tokens, case.top_k))
    kept = layout.kept.reshape(full["topk_idx"].shape)

    def dense(x: Any, weights: Any, scale: Any) -> jax.Array:
        args = tile("x", x), full["topk_idx"], tile("topk_weights", weights), scale
        return jnp.sum(dense_layer(True, *args, kept) * problem.target)

    by = ("x", "topk_weights", "scale")
    expected = jax.jit(jax.grad(dense, argnums=(0, 1, 2)))(*(small[n] for n in by))
    layer = shard_layer(case, "ep")
    arrays = dict(zip(names, place(mesh, list(specs.values()), list(small.values())), strict=True))
    (target,) = place(mesh, [P("ep")], [problem.target])
    if where == "outside":
        run = jax.shard_map(
            lambda *args: layer(*args)[0],
            mesh=mesh,
            in_specs=tuple(specs.values()),
            out_specs=P("ep"),
            check_vma=check_vma,
        )

        def loss(*args: Any) -> jax.Array:
            return jnp.sum(run(*args) * target)

        grads = jax.jit(jax.grad(loss, argnums=(0, 2, 3)))(*arrays.values())
    else:

        def inside(x: Any, ids: Any, weights: Any, scale: Any, target: Any) -> Any:
            grads = jax.grad(lambda *a: jnp.sum(layer(a[0], ids, *a[1:])[0] * target), (0, 1, 2))(
                x, weights, scale
            )
            if check_vma:
                return grads
            return tuple(
                lax.psum(g, "ep") if n in replicated else g for n, g in zip(by, grads, strict=True)
            )

        run = jax.shard_map(
            inside,
            mesh=mesh,
            in_specs=(*specs.values(), P("ep")),
            out_specs=tuple(specs[n] for n in by),
            check_vma=check_vma,
        )
        grads = jax.jit(run)(*arrays.values(), target)
    assert_equal(grads, expected)


@checks_vma
def test_router_is_trained_through_the_weights(check_vma: bool) -> None:
    """Ids come from top_k of what is differentiated; the gradient goes through the weights."""
    mesh, case = EP.mesh(), sizes(EP, capacity=96)
    problem = make_problem(EP, case)
    rng = np.random.default_rng(3)
    # Not exact: products of random numbers, whose gaps are far wider than rounding.
    router = rng.standard_normal((case.hidden, case.num_experts)).astype(np.float32)
    x = rng.standard_normal(problem.x.shape).astype(np.float32)

    def choose(logits: Any) -> Any:
        weights, ids = lax.top_k(jax.nn.softmax(logits), case.top_k)
        return weights, ids.astype(jnp.int32)

    def dense(x: Any, router: Any) -> jax.Array:
        weights, ids = choose(x @ router)
        out = dense_layer(True, x, ids, weights, problem.scale, True)
        return jnp.sum(out * problem.target)

    layer = shard_layer(case, "ep")

    def shard(x: Any, router: Any, scale: Any) -> Any:
        weights, ids = choose(x @ router)
        return layer(x, ids, weights, scale)[0]

    run = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(P("ep"), P(), P("ep")),
        out_specs=P("ep"),
        check_vma=check_vma,
    )
    grads = jax.jit(jax.grad(lambda *a: jnp.sum(run(*a, problem.scale) * problem.target), (0, 1)))
    expected = jax.jit(jax.grad(dense, (0, 1)))(x, router)
    for actual, wanted in zip(grads(x, router), expected, strict=True):
        # An entry is a sum of at most 48 * 8 * 2 products, in another order, and no cancellation
        # here makes it small beside its terms: the largest entry bounds the rounding.
        atol = 48 * 8 * 2 * 2.0**-24 * np.max(np.abs(wanted))
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def test_forward_mode_raises_jaxs_own_error() -> None:
    """In jit: in an eager shard_map JAX fails on any custom_vjp with another error."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    f = jax.jit(sharded_layer(EP, mesh, case))
    x, *rest = problem.inputs
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda x: f(x, *rest), (x,), (x,))
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jit(lambda x: jax.jvp(lambda x: f(x, *rest), (x,), (x,)))(x)


# jax.checkpoint and lax.scan ----------------------------------------------------------------------

POLICIES: dict[str, Any] = {
    "none": None,
    "layout": save_only("jax_ep_layout"),
    "layout_dispatch": save_only("jax_ep_layout", "jax_ep_dispatch"),
    "layout_combine": save_only("jax_ep_layout", "jax_ep_combine"),
    "all": save_only("jax_ep_layout", "jax_ep_dispatch", "jax_ep_combine"),
    "dots": jax.checkpoint_policies.dots_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}

# Calls of layout, dispatch and combine for one layer and its backward pass, whose backward needs
# both the rows and combine's result: each is 1 forward + 1 backward (the layout has no backward),
# and 1 more for each that is recomputed.
CALLS_PER_LAYER: dict[str | None, tuple[int, int, int]] = {
    None: (1, 2, 2),
    "none": (2, 3, 3),
    "layout": (1, 3, 3),
    "layout_dispatch": (1, 2, 3),
    "layout_combine": (1, 3, 2),
    "all": (1, 2, 2),
    "dots": (2, 3, 3),
    "everything": (1, 2, 2),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Stack:
    """Layers of the same sizes with their own ids, weights and parameters, on top of each other."""

    case: Case
    problems: tuple[Problem, ...]

    @classmethod
    def make(cls, placement: Placement, num_layers: int, **changes: Any) -> "Stack":
        case = sizes(placement, **changes)
        return cls(case, tuple(make_problem(placement, case, seed=i) for i in range(num_layers)))

    @property
    def stacked(self) -> tuple[NDArray[Any], ...]:
        """topk_idx, topk_weights and scale with a leading axis over the layers."""
        rest = zip(*(p.inputs[1:] for p in self.problems), strict=True)
        return tuple(np.stack(arrays) for arrays in rest)

    def expected(self) -> Any:
        """Loss and gradients by x and by the stacked weights and scales."""
        kept = [p.kept for p in self.problems]
        ids = [p.topk_idx for p in self.problems]

        def loss(x: Any, weights: Any, scale: Any) -> jax.Array:
            for i in range(len(kept)):
                x = gate(x, dense_layer(False, x, ids[i], weights[i], scale[i], kept[i]))
            return jnp.sum(x * self.problems[0].target)

        x, (_, weights, scale) = self.problems[0].x, self.stacked
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, weights, scale)


def gate(x: Any, out: Any) -> Any:
    """What follows a layer: a step whose gradient needs the layer's result."""
    return x + jnp.where(out > 0, out, 0)


def stacked_specs(placement: Placement) -> tuple[P, ...]:
    return (P(None, *placement.tokens),) * 2 + (P(None, *placement.experts),)


def stack_loss(
    stack: Stack,
    placement: Placement,
    mesh: Mesh,
    *,
    policy: str | None,
    scan: bool,
    check_vma: bool = True,
) -> tuple[Callable, list[jax.Array]]:
    """value_and_grad of the stack, by x, weights and scales, and its arguments."""
    layer = shard_layer(stack.case, placement.ep, square=False)

    def block(x: Any, parameters: Any) -> Any:
        return gate(x, layer(x, *parameters)[0])

    if policy is not None:
        block = jax.checkpoint(block, policy=POLICIES[policy])

    def shard(x: Any, *stacked: Any) -> Any:
        if scan:
            return lax.scan(lambda x, p: (block(x, p), None), x, stacked)[0]
        for i in range(stacked[0].shape[0]):
            x = block(x, tuple(a[i] for a in stacked))
        return x

    run = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(placement.tokens, *stacked_specs(placement)),
        out_specs=placement.tokens,
        check_vma=check_vma,
    )
    specs = (placement.tokens, *stacked_specs(placement), placement.tokens)
    values = (stack.problems[0].x, *stack.stacked, stack.problems[0].target)

    def loss(x: Any, ids: Any, weights: Any, scale: Any, target: Any) -> jax.Array:
        return jnp.sum(run(x, ids, weights, scale) * target)

    return jax.value_and_grad(loss, argnums=(0, 2, 3)), place(mesh, specs, values)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("policy", CALLS_PER_LAYER)
def test_checkpoint(policy: str | None, scan: bool) -> None:
    """Right gradients, and exactly the calls that the policy asks for.

    What is traced is exact. XLA on CPU may merge a recomputation with what it repeats, but not
    across the bodies of loops, so there the compiled program is counted as well.
    """
    mesh, stack = EP.mesh(), Stack.make(EP, 2)
    f, arrays = stack_loss(stack, EP, mesh, policy=policy, scan=scan)
    compiled = jax.jit(f).lower(*arrays).compile()
    assert_equal(compiled(*arrays), stack.expected())
    per_layer = CALLS_PER_LAYER[policy]
    if scan:
        assert traced_calls(f, *arrays) == per_layer
        assert calls_in(compiled) == per_layer
    else:
        assert traced_calls(f, *arrays) == tuple(2 * n for n in per_layer)


@pytest.mark.parametrize("name", ["dp_ep", "dp_ep_tp"])
@checks_vma
def test_scan_over_checkpointed_layers(name: str, check_vma: bool) -> None:
    """The usual model: scan, checkpoint with the layout policy, parameters split over EP only."""
    placement = PLACEMENTS[name]
    mesh, stack = placement.mesh(), Stack.make(placement, 3)
    f, arrays = stack_loss(stack, placement, mesh, policy="layout", scan=True, check_vma=check_vma)
    assert_equal(jax.jit(f)(*arrays), stack.expected())


def test_scan_without_gradient() -> None:
    mesh, stack = EP.mesh(EXPLICIT), Stack.make(EP, 3)
    f, arrays = stack_loss(stack, EP, mesh, policy=None, scan=True)
    loss = jax.jit(lambda *args: f(*args)[0]).lower(*arrays).compile()
    assert_equal(loss(*arrays), stack.expected()[0])
    assert calls_in(loss) == (1, 1, 1)


def test_checkpoint_outside_shard_map() -> None:
    """jax.checkpoint around a function that contains the shard_map, with the layout policy."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case)
    for policy in ("none", "layout", "all"):
        remat = jax.checkpoint(layer, policy=POLICIES[policy])
        check_values_and_gradients(problem, EP, mesh, jax.jit(remat))


def test_names_in_a_users_policy() -> None:
    """Our names and the user's own in one policy."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = shard_layer(case, "ep")

    @functools.partial(jax.checkpoint, policy=save_only("jax_ep_layout", "mine"))
    def block(*args: Any) -> jax.Array:
        return checkpoint_name(layer(*args)[0], "mine")

    run = jax.shard_map(block, mesh=mesh, in_specs=in_specs(EP), out_specs=EP.tokens)
    check_values_and_gradients(problem, EP, mesh, jax.jit(run))


# Several calls in one program ---------------------------------------------------------------------


def test_layers_of_different_sizes_in_one_jit() -> None:
    """K, E, capacity and alignment differ; also two layers that differ in one of them only."""
    mesh = EP.mesh()
    cases = [
        sizes(EP),
        sizes(EP, expert_alignment=1),
        sizes(EP, capacity=12),
        sizes(EP, top_k=1, num_experts=8, capacity=None, expert_alignment=1),
        sizes(EP, top_k=4, num_experts=32, capacity=24, expert_alignment=8),
        sizes(EP, top_k=3, num_experts=24, capacity=15, expert_alignment=1),
    ]
    problems = [make_problem(EP, case, seed=i) for i, case in enumerate(cases)]
    rest = [p.inputs[1:] for p in problems]
    layers = [shard_layer(case, "ep", square=False) for case in cases]

    def mix(functions: Sequence[Callable], x: Any, rest: Any) -> Any:
        for f, parameters in zip(functions, rest, strict=True):
            x = jnp.clip(f(x, *parameters), -4, 4)
        return x

    run = jax.shard_map(
        lambda x, rest: mix([lambda *a, f=f: f(*a)[0] for f in layers], x, rest),
        mesh=mesh,
        in_specs=(P("ep"), P("ep")),
        out_specs=P("ep"),
    )

    def dense_loss(x: Any, weights: Any, scales: Any) -> Any:
        functions = [
            functools.partial(lambda kept, *a: dense_layer(False, *a, kept), p.kept)
            for p in problems
        ]
        parameters = [(r[0], w, s) for r, w, s in zip(rest, weights, scales, strict=True)]
        return jnp.sum(mix(functions, x, parameters) * problems[0].target)

    def loss(x: Any, weights: Any, scales: Any) -> Any:
        parameters = [(r[0], w, s) for r, w, s in zip(rest, weights, scales, strict=True)]
        return jnp.sum(run(x, parameters) * problems[0].target)

    args = problems[0].x, [r[1] for r in rest], [r[2] for r in rest]
    expected = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1, 2)))(*args)
    assert_equal(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args), expected)


def _busy(x: Any, steps: Any) -> Any:
    """x, after so many steps of work that XLA cannot remove."""
    return lax.fori_loop(0, steps, lambda _, x: jnp.where(jnp.sin(x) > 2, 0, x), x)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_one_jitted_layer_called_on_independent_data(where: str) -> None:
    """Calls with equal attributes whose data become ready in another order on every device."""
    mesh, case, num_calls = EP.mesh(), sizes(EP), 4
    problems = [make_problem(EP, case, seed=i) for i in range(num_calls)]
    arrays = [place(mesh, in_specs(EP), p.inputs) for p in problems]
    layer = shard_layer(case, "ep")

    def delayed(call: Any, x: Any, *rest: Any) -> Any:
        steps = (lax.axis_index("ep") + call) % num_calls * 300
        return layer(_busy(x, steps), *rest)[0]

    # `call` is data, so all calls are of one jitted function.
    specs = (P(), *in_specs(EP))
    if where == "inside":
        f = jax.jit(delayed)
        run = jax.jit(
            jax.shard_map(
                lambda all_args: [f(jnp.int32(i), *args) for i, args in enumerate(all_args)],
                mesh=mesh,
                in_specs=([list(in_specs(EP))] * num_calls,),
                out_specs=[EP.tokens] * num_calls,
            )
        )
    else:
        f = jax.jit(jax.shard_map(delayed, mesh=mesh, in_specs=specs, out_specs=EP.tokens))
        run = jax.jit(lambda all_args: [f(jnp.int32(i), *a) for i, a in enumerate(all_args)])
    run = run.lower(arrays).compile()
    expected = [p.out() for p in problems]
    for _ in range(5):
        assert_equal(run(arrays), expected)
    assert calls_in(run) == (num_calls,) * 3


def test_unused_results_are_removed() -> None:
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    arrays = place(mesh, in_specs(EP), problem.inputs)
    layer = shard_layer(case, "ep")

    def keep(pick: Callable) -> Callable:
        def f(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
            out, layout = layer(x, ids, weights, scale)
            dispatched = jax_ep.dispatch(x, layout)
            return pick(x, out, layout, dispatched)

        return jax.shard_map(f, mesh=mesh, in_specs=in_specs(EP), out_specs=P("ep"))

    nothing = keep(lambda x, out, layout, dispatched: x)
    assert compiled_calls(nothing, *arrays) == (0, 0, 0)
    stats = keep(lambda x, out, layout, dispatched: layout.stats())
    assert compiled_calls(stats, *arrays) == (1, 0, 0)
    for name, value in jax.jit(stats)(*arrays).items():
        assert_equal(value, getattr(problem.layouts[0], name))
    out_only = keep(lambda x, out, layout, dispatched: out)
    assert compiled_calls(out_only, *arrays) == (1, 1, 1)
    assert_equal(jax.jit(out_only)(*arrays), problem.out())
    dispatched_only = keep(lambda x, out, layout, dispatched: dispatched.tokens)
    assert compiled_calls(dispatched_only, *arrays) == (1, 1, 0)
    rows, _ = reference.dispatch(problem.x.reshape(8, 6, -1), problem.layouts[0])
    assert_equal(jax.jit(dispatched_only)(*arrays), rows.reshape(-1, case.hidden))


def test_equal_calls_are_merged() -> None:
    """The same layer written twice is computed once."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    arrays = place(mesh, in_specs(EP), problem.inputs)
    layer = sharded_layer(EP, mesh, case)
    f = jax.jit(lambda *args: (layer(*args), 2 * layer(*args)))
    assert_equal(f(*arrays), (problem.out(), 2 * problem.out()))
    assert compiled_calls(f, *arrays) == (1, 1, 1)


# Donation, AOT, shapes ----------------------------------------------------------------------------


@pytest.mark.parametrize("donated", [(0,), (0, 1, 2, 3)], ids=["x", "all"])
def test_donated_inputs(donated: tuple[int, ...]) -> None:
    """A donated x is gone and its memory is reused; the result does not change."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)

    def f(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
        out = sharded_layer(EP, mesh, case)(x, ids, weights, scale)
        return out, ids + 1, weights + 1, scale + 1

    run = jax.jit(f, donate_argnums=donated)
    for _ in range(2):
        arrays = place(mesh, in_specs(EP), problem.inputs)
        out, *_ = run(*arrays)
        assert_equal(out, problem.out())
        assert [a.is_deleted() for a in arrays] == [i in donated for i in range(4)]
    text = run.lower(*place(mesh, in_specs(EP), problem.inputs)).compile().as_text()
    assert "input_output_alias" in text


def test_donated_carry_of_a_training_loop() -> None:
    """Parameters donated to each step, which returns the updated ones."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    x, ids, weights, scale = place(mesh, in_specs(EP), problem.inputs)
    (target,) = place(mesh, [P("ep")], [problem.target])
    layer = sharded_layer(EP, mesh, case, square=False)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(scale: Any) -> Any:
        gradient = jax.grad(lambda s: jnp.sum(layer(x, ids, weights, s) * target))(scale)
        return scale + gradient

    # The loss is linear in scale, so the gradient is the same at every step.
    gradient = problem.gradients(square=False)[2]
    for i in range(1, 4):
        scale = step(scale)
        assert_equal(scale, problem.scale + i * gradient)


@axis_types
def test_ahead_of_time(axis_type: AxisType) -> None:
    """Lowered and compiled from shapes alone, then called; compiled twice from one lowering."""
    mesh, case = DP_EP.mesh(axis_type), sizes(DP_EP)
    problem = make_problem(DP_EP, case)
    specs = (*in_specs(DP_EP), DP_EP.tokens)
    values = (*problem.inputs, problem.target)
    structs = [
        jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, s))
        for v, s in zip(values, specs, strict=True)
    ]
    f = jax.jit(value_and_gradients(sharded_layer(DP_EP, mesh, case), DP_EP, mesh))
    lowered = f.trace(*structs).lower()
    arrays = place(mesh, specs, values)
    for compiled in (lowered.compile(), lowered.compile()):
        (loss, out), grads = compiled(*arrays)
        assert float(loss) == problem.loss
        assert_equal(out, problem.out())
        assert_equal(grads, problem.gradients())


@checks_vma
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("fp8", "dequantize"),
    [(None, False), ("float32", False), ("power_of_two", False), ("power_of_two", True)],
)
def test_shapes(fp8: Any, dequantize: bool, dtype: str, check_vma: bool) -> None:
    """jax.eval_shape: every output's shape and type, and what varies over which axes."""
    mesh = DP_EP.mesh()
    num_tokens, top_k, num_experts, capacity, hidden = 6, 2, 16, 12, 256

    def f(x: Any, ids: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=num_experts, axis_name="ep", capacity=capacity, expert_alignment=2
        )
        recv = jax_ep.dispatch(x, layout, weights, fp8=fp8, dequantize=dequantize)
        assert jax_ep.dispatch(x, layout).weights is None
        y = recv.tokens[:, :128].astype(dtype)
        out = jax_ep.combine(y, layout, recv.weights)
        results = {"layout": layout, "recv": recv, "out": out}
        results |= {"kept": layout.kept, "row_valid": layout.row_valid}
        if check_vma:
            for leaf in jax.tree.leaves(results):
                assert jax.typeof(leaf).manual_axis_type.varying == {"dp", "ep"}
        return jax.tree.map(lambda a: a[None], results)

    spec = DP_EP.tokens
    run = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    tokens = 8 * num_tokens
    shapes = jax.eval_shape(
        run,
        jax.ShapeDtypeStruct((tokens, hidden), dtype),
        jax.ShapeDtypeStruct((tokens, top_k), "int32"),
        jax.ShapeDtypeStruct((tokens, top_k), "bfloat16"),
    )
    local_experts = num_experts // 4
    keeps_fp8 = fp8 is not None and not dequantize
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "layout.topk_idx": ((num_tokens, top_k), "int32"),
        "layout.send_row": ((num_tokens, top_k), "int32"),
        "layout.recv_src": ((capacity,), "int32"),
        "layout.recv_order": ((capacity,), "int32"),
        "layout.recv_offsets": ((4 * num_tokens + 1,), "int32"),
        "layout.group_sizes": ((local_experts,), "int32"),
        "layout.expert_counts": ((local_experts,), "int32"),
        "layout.expert_load": ((num_experts,), "int32"),
        "layout.num_recv": ((), "int32"),
        "layout.num_dropped": ((), "int32"),
        "layout.num_invalid": ((), "int32"),
        "recv.tokens": ((capacity, hidden), "float8_e4m3fn" if keeps_fp8 else dtype),
        "recv.weights": ((capacity,), "float32"),
        "recv.group_sizes": ((local_experts,), "int32"),
        "kept": ((num_tokens, top_k), "bool"),
        "row_valid": ((capacity,), "bool"),
        "out": ((num_tokens, 128), dtype),
    }
    if keeps_fp8:
        expected["recv.scales"] = ((capacity, hidden // 128), "float32")
    flat = {
        ".".join(re.findall(r"\w+", jax.tree_util.keystr(path))): (leaf.shape[1:], leaf.dtype.name)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert flat == expected
    layout = shapes["layout"]
    assert (layout.num_ranks, layout.num_experts, layout.capacity) == (4, num_experts, capacity)
    assert (layout.axis_name, layout.expert_alignment, layout.zero_tail) == (("ep",), 2, True)


# Layout is a pytree -------------------------------------------------------------------------------


def _layout_across_boundary(mesh: Mesh, case: Case, ids: Any) -> jax_ep.Layout:
    """A layout made in one shard_map, with a leading axis over the ranks."""

    def make(ids: Any) -> Any:
        layout = jax_ep.make_layout(
            ids,
            num_experts=case.num_experts,
            axis_name="ep",
            capacity=case.capacity,
            expert_alignment=case.expert_alignment,
            zero_tail=case.zero_tail,
        )
        return jax.tree.map(lambda a: a[None], layout)

    run = jax.shard_map(make, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    return jax.jit(run)(jax.device_put(ids, NamedSharding(mesh, P("ep"))))


STATIC = ("axis_name", "num_ranks", "num_experts", "capacity", "expert_alignment", "zero_tail")


def test_layout_round_trip() -> None:
    """Leaves may be anything; static sizes are part of the structure."""
    mesh, case = EP.mesh(), sizes(EP, zero_tail=False)
    problem = make_problem(EP, case)
    layout = _layout_across_boundary(mesh, case, problem.topk_idx)
    leaves, structure = jax.tree.flatten(layout)
    assert len(leaves) == 11
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    for stand_ins in (leaves, structs, [None] * 11, [object() for _ in leaves], [0] * 11):
        copy = jax.tree.unflatten(structure, stand_ins)
        assert all(getattr(copy, name) == getattr(layout, name) for name in STATIC)
        copied = [getattr(copy, name) for name in LAYOUT_ARRAYS[:11]]
        assert all(a is b for a, b in zip(copied, stand_ins, strict=True))
    assert jax.tree.structure(jax.tree.unflatten(structure, structs)) == structure
    assert hash(structure) == hash(jax.tree.structure(jax.tree.map(lambda a: a, layout)))
    others = [
        dataclasses.replace(layout, capacity=12),
        dataclasses.replace(layout, zero_tail=True),
        dataclasses.replace(layout, axis_name=("other",)),
    ]
    assert all(jax.tree.structure(other) != structure for other in others)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(layout)]
    assert paths[:2] == [".topk_idx", ".send_row"]


def test_layout_is_argument_and_result_of_jit_and_shard_map() -> None:
    """A layout leaves one program and serves another, forward and backward."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layout = _layout_across_boundary(mesh, case, problem.topk_idx)
    assert isinstance(layout, jax_ep.Layout)
    for field in LAYOUT_ARRAYS[:10]:
        assert_equal(getattr(layout, field), getattr(problem.layouts[0], field))
    same = jax.jit(lambda layout: layout)(layout)
    assert jax.tree.structure(same) == jax.tree.structure(layout)

    def use(layout: Any, x: Any, weights: Any, scale: Any) -> Any:
        layout = jax.tree.map(lambda a: a[0], layout)
        recv = jax.jit(jax_ep.dispatch)(x, layout, weights)  # also an argument of an inner jit
        y = experts(scale, True, recv.tokens, recv.group_sizes)
        return jax_ep.combine(y, layout, recv.weights)

    run = jax.shard_map(use, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    x, _, weights, scale = place(mesh, in_specs(EP), problem.inputs)
    (target,) = place(mesh, [P("ep")], [problem.target])

    def loss(x: Any, weights: Any, scale: Any, layout: Any) -> Any:
        out = run(layout, x, weights, scale)
        return jnp.sum(out * target), out

    f = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), grads = jax.jit(f)(x, weights, scale, same)
    assert_equal(out, problem.out())
    assert_equal(grads, problem.gradients())
    assert compiled_calls(f, x, weights, scale, same)[0] == 0


@checks_vma
def test_layout_in_loops_and_branches(check_vma: bool) -> None:
    """As the carry of scan and while_loop, as xs of scan, and out of cond."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    rows, _ = reference.dispatch(problem.x.reshape(8, 6, -1), problem.layouts[0])
    once = reference.combine(rows, problem.layouts[0]).reshape(problem.x.shape)
    counts = problem.kept.sum(axis=1, keepdims=True).astype(np.float32)
    assert_equal(once, counts * problem.x)

    def round_trip(x: Any, layout: Any) -> Any:
        return jax_ep.combine(jax_ep.dispatch(x, layout).tokens, layout)

    def f(x: Any, ids: Any) -> Any:
        layout = jax_ep.make_layout(
            ids, num_experts=16, axis_name="ep", capacity=case.capacity, expert_alignment=2
        )

        def body(carry: Any, _: Any) -> Any:
            x, layout = carry
            return (round_trip(x, layout), layout), None

        (scanned, after), _ = lax.scan(body, (x, layout), None, length=2)
        whiled, _, _ = lax.while_loop(
            lambda state: state[2] < 2,
            lambda state: (round_trip(state[0], state[1]), state[1], state[2] + 1),
            (x, layout, 0),
        )
        stacked = jax.tree.map(lambda a: jnp.stack([a, a]), layout)
        mapped, _ = lax.scan(lambda x, layout: (round_trip(x, layout), None), x, stacked)
        chosen = lax.cond(jnp.any(x > 99), lambda: after, lambda: layout)
        return scanned, whiled, mapped, round_trip(x, chosen)

    run = jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=check_vma)
    twice = counts * counts * problem.x
    args = place(mesh, [P("ep")] * 2, [problem.x, problem.topk_idx])
    assert_equal(jax.jit(run)(*args), (twice, twice, twice, once))


# vmap ---------------------------------------------------------------------------------------------


def test_vmap_says_what_to_do_instead() -> None:
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    x, ids, weights, _ = (jnp.stack([a, a], axis=1) for a in problem.inputs)

    def make(ids: Any) -> jax_ep.Layout:
        return jax_ep.make_layout(ids, num_experts=16, axis_name="ep", capacity=10)

    functions: Mapping[str, Callable] = {
        "jax_ep_layout": lambda x, ids, w: jax.vmap(make, 1)(ids).num_recv,
        "jax_ep_dispatch": lambda x, ids, w: jax.vmap(
            lambda x: jax_ep.dispatch(x, make(ids[:, 0])).tokens, 1
        )(x),
        "jax_ep_dispatch (weights)": lambda x, ids, w: jax.vmap(
            lambda w: jax_ep.dispatch(x[:, 0], make(ids[:, 0]), w).weights, 1
        )(w),
        "jax_ep_combine": lambda x, ids, w: jax.vmap(lambda y: jax_ep.combine(y, make(ids[:, 0])))(
            jnp.zeros((2, 10, 8))
        ),
    }
    for name, f in functions.items():
        run = jax.shard_map(f, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        with pytest.raises(NotImplementedError, match=name.split()[0]) as caught:
            jax.jit(run)(x, ids, weights)
        assert "Fold the batch axis into the token axis" in str(caught.value)
        assert "jax.lax.map or jax.lax.scan" in str(caught.value)


def test_vmap_around_shard_map() -> None:
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = jax.jit(sharded_layer(EP, mesh, case))
    x, *rest = problem.inputs
    with pytest.raises(NotImplementedError, match="Fold the batch axis"):
        jax.vmap(lambda x: layer(x, *rest))(np.stack([x, x]))
    with pytest.raises(NotImplementedError, match="Fold the batch axis"):
        jax.jacrev(lambda x: layer(x, *rest))(x)


def test_what_vmaps_message_recommends() -> None:
    """lax.map over the batch, and the batch folded into the tokens."""
    mesh, case = EP.mesh(), sizes(EP)
    problems = [make_problem(EP, case, seed=i) for i in range(2)]
    batches = [np.stack(arrays) for arrays in zip(*(p.inputs[:3] for p in problems), strict=True)]
    scale = problems[0].scale
    layer = shard_layer(case, "ep")
    mapped = jax.shard_map(
        lambda batch, scale: lax.map(lambda args: layer(*args, scale)[0], batch),
        mesh=mesh,
        in_specs=((P(None, "ep"),) * 3, P("ep")),
        out_specs=P(None, "ep"),
    )
    expected = [dataclasses.replace(p, scale=scale).out() for p in problems]
    assert_equal(jax.jit(mapped)(tuple(batches), scale), np.stack(expected))

    wide = sizes(EP, capacity=None)
    fold = shard_layer(wide, "ep")

    def folded(batch: Any, scale: Any) -> Any:
        x, ids, weights = (a.reshape(-1, a.shape[-1]) for a in batch)
        return fold(x, ids, weights, scale)[0].reshape(batch[0].shape)

    run = jax.shard_map(
        folded,
        mesh=mesh,
        in_specs=((P(None, "ep"),) * 3, P("ep")),
        out_specs=P(None, "ep"),
    )
    expected = [dense_layer(True, *p.inputs[:3], scale, (p.topk_idx >= 0)) for p in problems]
    assert_equal(jax.jit(run)(tuple(batches), scale), np.stack(expected))


# Names in programs --------------------------------------------------------------------------------


def test_named_scopes() -> None:
    """Profiles and dumps name the verbs, forward and backward."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case)
    arrays = place(mesh, in_specs(EP), problem.inputs)
    lowered = jax.jit(jax.grad(lambda *a: jnp.sum(layer(*a)), argnums=(0, 2))).lower(*arrays)
    text = lowered.as_text(debug_info=True)
    for scope in ("jax_ep.make_layout", "jax_ep.dispatch", "jax_ep.experts", "jax_ep.combine"):
        assert scope in text
    calls = re.findall(
        r'custom_call_target="jax_ep_(\w+)".*op_name="([^"]*)"', lowered.compile().as_text()
    )
    scopes = collections.defaultdict(set)
    for op, op_name in calls:
        scopes[op] |= set(re.findall(r"jax_ep\.\w+", op_name))
    assert scopes == {
        "layout": {"jax_ep.make_layout"},
        "dispatch": {"jax_ep.dispatch", "jax_ep.combine"},
        "combine": {"jax_ep.dispatch"},
    }
    backward = [op_name for op, op_name in calls if "transpose" in op_name]
    assert any("jax_ep.dispatch" in name for name in backward)
    assert any("jax_ep.combine" in name for name in backward)


# The persistent compilation cache -----------------------------------------------------------------

_CACHE_CHILD = """
import json, sys
import test_transforms
print("RESULT" + json.dumps(test_transforms.run_with_cache(sys.argv[1])))
"""


def run_with_cache(cache_dir: str) -> dict[str, Any]:
    """Runs in a process of its own: a program whose executable comes from the cache, or goes in."""
    jax.config.update("jax_compilation_cache_dir", cache_dir)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    events: collections.Counter[str] = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))

    mesh, stack = EP.mesh(), Stack.make(EP, 2)
    f, arrays = stack_loss(stack, EP, mesh, policy="layout", scan=True)
    compiled = jax.jit(f).lower(*arrays).compile()
    hits = events["/jax/compilation_cache/cache_hits"]
    misses = events["/jax/compilation_cache/cache_misses"]
    results = jax.tree.leaves(compiled(*arrays))
    assert_equal(results, jax.tree.leaves(stack.expected()))
    digest = hashlib.sha256(b"".join(np.asarray(r).tobytes() for r in results)).hexdigest()
    # Two independent calls of one jitted layer, from the cache as well.
    problems = [make_problem(EP, stack.case, seed=i) for i in (3, 4)]
    layer = jax.jit(sharded_layer(EP, mesh, stack.case))
    both = jax.jit(lambda a, b: (layer(*a), layer(*b)))
    outs = both(*(place(mesh, in_specs(EP), p.inputs) for p in problems))
    assert_equal(outs, tuple(p.out() for p in problems))
    return {"hits": hits, "misses": misses, "digest": digest}


def test_persistent_compilation_cache(tmp_path: pathlib.Path) -> None:
    """A second process takes the executable from disk and gets the same bits."""
    tests = pathlib.Path(__file__).resolve().parent
    package = pathlib.Path(jax_ep.__file__).resolve().parent.parent  # the one under test
    paths = [str(tests), str(package), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    results = []
    for _ in range(2):
        process = subprocess.run(
            [sys.executable, "-c", _CACHE_CHILD, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        (line,) = [x for x in process.stdout.splitlines() if x.startswith("RESULT")]
        results.append(
            json.loads(line.removeprefix("RESULT")) | {"files": len(os.listdir(tmp_path))}
        )
    first, second = results
    assert (first["hits"], second["hits"]) == (0, 1)
    assert (first["misses"], second["misses"]) == (1, 0)
    assert first["digest"] == second["digest"]
