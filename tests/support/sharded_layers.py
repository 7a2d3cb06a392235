"""One layer, or a stack of them, on any mesh, with its data and what must come out.

Data are small integers and quarters, so every sum is exact in float32 whatever its order: results
and gradients must equal those of the unsharded layer exactly. Capacities are tight, so rows drop.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routings
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray
from routings import Case

import jax_ep
from jax_ep import reference

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
OPS = ("layout", "dispatch", "combine")
CUDA_OPS = (*OPS, "combine_gradient")
ALL_OPS = (*CUDA_OPS, "layout_and_dispatch")

checks_vma = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


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


def shard_layer(
    case: Case, axis: str | tuple[str, ...], *, square: bool = True, in_one: bool = True
) -> Callable:
    """The layer as a per-shard function: x, topk_idx, topk_weights, scale -> out, layout.

    ``moe``, whose layout and rows come in one call; or without ``in_one`` the three verbs.
    """
    options: dict[str, Any] = {
        "num_experts": case.num_experts,
        "axis_name": axis,
        "capacity": case.capacity,
        "expert_alignment": case.expert_alignment,
        "expert_capacity": case.expert_capacity,
    }

    def layer(x: Any, topk_idx: Any, topk_weights: Any, scale: Any) -> Any:
        expert_fn = functools.partial(experts, scale, square)
        if in_one:
            return jax_ep.moe(x, topk_idx, topk_weights, expert_fn, **options)
        layout = jax_ep.make_layout(topk_idx, **options)
        received = jax_ep.dispatch(x, layout, topk_weights)
        y = expert_fn(received.tokens, received.group_sizes)
        return jax_ep.combine(y, layout, received.weights), layout

    return layer


def in_specs(placement: Placement) -> tuple[P, ...]:
    return (placement.tokens,) * 3 + (placement.experts,)


def sharded_layer(
    placement: Placement, mesh: Mesh, case: Case, *, check_vma: bool = True, **options: bool
) -> Callable:
    """The layer as a function of global arrays: x, topk_idx, topk_weights, scale -> out.

    ``options`` as in ``shard_layer``.
    """
    layer = shard_layer(case, placement.ep, **options)
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


# Layers on top of each other, with jax.checkpoint -------------------------------------------------

save_only = jax.checkpoint_policies.save_only_these_names

POLICIES: dict[str, Any] = {
    "none": None,
    "layout": save_only("jax_ep_layout"),
    "dispatch": save_only("jax_ep_dispatch"),
    "layout_dispatch": save_only("jax_ep_layout", "jax_ep_dispatch"),
    "layout_combine": save_only("jax_ep_layout", "jax_ep_combine"),
    "all": save_only("jax_ep_layout", "jax_ep_dispatch", "jax_ep_combine"),
    "dots": jax.checkpoint_policies.dots_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
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
    in_one: bool = True,
) -> tuple[Callable, list[jax.Array]]:
    """value_and_grad of the stack, by x, weights and scales, and its arguments."""
    layer = shard_layer(stack.case, placement.ep, square=False, in_one=in_one)

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
    """Calls of layout, dispatch and combine in f's jaxpr; a loop's body counts once.

    layout_and_dispatch counts as both. The gradient of the weighted combine counts as what it is on
    CPU, a dispatch.
    """
    names = collections.Counter(
        e.primitive.name for e in _equations(jax.make_jaxpr(f)(*args).jaxpr)
    )
    names["jax_ep_dispatch"] += names["jax_ep_combine_gradient"]
    return _by_op(names)


def calls_in(compiled: Any) -> tuple[int, ...]:
    """The same of a program that was compiled for CPU."""
    targets = re.findall(r'custom_call_target="(jax_ep_\w+)"', compiled.as_text())
    return _by_op(collections.Counter(targets))


def _by_op(names: collections.Counter) -> tuple[int, ...]:
    in_one = names["jax_ep_layout_and_dispatch"]
    return tuple(names[f"jax_ep_{op}"] + in_one * (op != "combine") for op in OPS)


def compiled_calls(f: Callable, *args: Any) -> tuple[int, ...]:
    """The same of a function."""
    return calls_in(jax.jit(f).lower(*args).compile())
