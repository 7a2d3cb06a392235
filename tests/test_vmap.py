"""vmap of the verbs: one call after the other, or one on each device of a mesh axis."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    EP,
    Placement,
    Problem,
    assert_equal,
    calls_in,
    checks_vma,
    dense_layer,
    gate,
    make_problem,
    place,
    shard_layer,
    sharded_layer,
    sizes,
)

import jax_ep

# A stage is a slice of the mesh, whose layer has parameters of its own. The helpers split tokens
# over every axis but the replicated ones; here vmap splits the batch over the stages.
STAGES = {
    "2x2": Placement((("stage", 2), ("ep", 2)), replicated=("stage",)),
    "2x4": Placement((("stage", 2), ("ep", 4)), replicated=("stage",)),
    "ep_outside": Placement((("ep", 2), ("stage", 4)), replicated=("stage",)),
    "permuted": Placement(
        (("stage", 2), ("ep", 4)), replicated=("stage",), order=(5, 0, 3, 6, 1, 7, 4, 2)
    ),
}
ARGUMENTS = ("x", "topk_idx", "topk_weights", "scale")  # of the layer, fields of a problem


def _stack(problems: Sequence[Problem], mapped: Sequence[bool]) -> list[Any]:
    """The layer's arguments: those that are mapped of each problem, the others of the first."""
    arrays = zip(*(p.inputs for p in problems), strict=True)
    return [np.stack(a) if m else a[0] for a, m in zip(arrays, mapped, strict=True)]


def _vmapped_layer_is_right(
    placement: Placement, batch: int, mapped: Sequence[bool], *, check_vma: bool, **vmap: Any
) -> None:
    """Result and gradients are those of each element by itself, on all tokens at once."""
    mesh, case = placement.mesh(), sizes(placement, capacity=None)
    problems = [make_problem(placement, case, seed=i) for i in range(batch)]
    arguments = _stack(problems, mapped)
    target = np.stack([p.target for p in problems])
    layer = sharded_layer(placement, mesh, case, check_vma=check_vma)
    run = jax.vmap(layer, in_axes=tuple(0 if m else None for m in mapped), **vmap)

    def loss(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
        out = run(x, ids, weights, scale)
        return jnp.sum(out * target), out

    f = jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3), has_aux=True))
    (value, out), gradients = f(*arguments)

    fields = list(itertools.compress(ARGUMENTS, mapped))
    if "topk_idx" in fields:
        fields.append("layouts")
    elements = [
        dataclasses.replace(problems[0], target=p.target, **{n: getattr(p, n) for n in fields})
        for p in problems
    ]
    assert float(value) == sum(e.loss for e in elements)
    assert_equal(out, np.stack([e.out() for e in elements]))
    of_elements = zip(*(e.gradients() for e in elements), strict=True)
    for gradient, parts, m in zip(gradients, of_elements, np.delete(mapped, 1), strict=True):
        expected = np.stack(parts) if m else sum(parts)
        assert np.any(expected)
        assert_equal(gradient, expected)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "per_device", "check_vma"),
    [
        ("2x4", 1, True),
        ("2x4", 2, False),
        ("ep_outside", 1, False),
        ("ep_outside", 2, True),
        ("permuted", 1, True),
        ("permuted", 2, False),
    ],
)
def test_vmap_over_a_mesh_axis(name: str, per_device: int, check_vma: bool) -> None:
    """A device has one element of the batch, or two, which it maps one after the other."""
    placement = STAGES[name]
    batch = per_device * dict(placement.axes)["stage"]
    _vmapped_layer_is_right(
        placement, batch, (True,) * 4, check_vma=check_vma, spmd_axis_name="stage"
    )


@pytest.mark.parametrize(
    ("mapped", "spmd_axis_name", "check_vma"),
    [
        pytest.param("x", "stage", True, marks=pytest.mark.versions),
        ("topk_idx", "stage", True),
        ("topk_weights", "stage", True),
        ("scale", "stage", True),
        ("x topk_idx topk_weights", "stage", True),
        ("x topk_idx scale", "stage", True),
        ("x topk_weights scale", "stage", True),
        pytest.param("topk_idx topk_weights scale", "stage", True, marks=pytest.mark.versions),
        ("x topk_idx scale", "stage", False),
        ("topk_idx topk_weights scale", "stage", False),
        pytest.param("x", None, True, marks=pytest.mark.versions),
        ("topk_idx topk_weights scale", None, True),
    ],
)
def test_what_is_not_mapped_is_shared(
    mapped: str, spmd_axis_name: str | None, check_vma: bool
) -> None:
    """Its gradient is the sum over the batch, also over the devices that have its elements."""
    names = mapped.split()
    of_arguments = [name in names for name in ARGUMENTS]
    _vmapped_layer_is_right(
        STAGES["2x2"], 2, of_arguments, check_vma=check_vma, spmd_axis_name=spmd_axis_name
    )


@pytest.mark.versions
@checks_vma
def test_one_call_for_each_stage(check_vma: bool) -> None:
    """No loop: a device's one element is squeezed, forward and backward."""
    placement = STAGES["2x4"]
    mesh, case = placement.mesh(), sizes(placement)
    arguments = _stack([make_problem(placement, case, seed=i) for i in range(2)], (True,) * 4)
    layer = sharded_layer(placement, mesh, case, check_vma=check_vma)
    mapped = jax.vmap(layer, spmd_axis_name="stage")

    def loss(x: Any, ids: Any, weights: Any, scale: Any) -> jax.Array:
        return jnp.sum(mapped(x, ids, weights, scale) ** 2)

    compiled = jax.jit(jax.grad(loss, argnums=(0, 2, 3))).lower(*arguments).compile()
    assert calls_in(compiled) == (1, 2, 2)
    assert " while(" not in compiled.as_text()


@checks_vma
def test_pipeline(check_vma: bool) -> None:
    """Stages in parallel, microbatches one after the other: loss and gradients of the stack.

    Each step, every stage runs its layer on what came from the stage before, and the results move
    on by a ppermute. What comes out in the first steps is not used, so it has no gradient.
    """
    placement = STAGES["2x4"]
    num_stages, num_batches = dict(placement.axes)["stage"], 3
    mesh, case = placement.mesh(), sizes(placement, capacity=None)
    # ids belong to the stages: each routes all microbatches alike.
    stages = [make_problem(placement, case, seed=i) for i in range(num_stages)]
    batches = [make_problem(placement, case, seed=10 + i) for i in range(num_batches)]
    x, target = np.stack([b.x for b in batches]), np.stack([b.target for b in batches])
    ids, weights, scale = (np.stack([s.inputs[i] for s in stages]) for i in (1, 2, 3))
    layer = sharded_layer(placement, mesh, case, check_vma=check_vma, square=False)
    run_stages = jax.vmap(lambda h, i, w, s: gate(h, layer(h, i, w, s)), spmd_axis_name="stage")
    order = [(i, (i + 1) % num_stages) for i in range(num_stages)]
    move_on = jax.shard_map(
        lambda h: lax.ppermute(h, "stage", order),
        mesh=mesh,
        in_specs=P("stage", "ep"),
        out_specs=P("stage", "ep"),
    )

    def pipeline(x: Any, weights: Any, scale: Any, ids: Any, target: Any) -> jax.Array:
        def step(state: Any, feed: Any) -> Any:
            state = run_stages(state.at[0].set(feed), ids, weights, scale)
            return move_on(state), state[-1]

        empty = jnp.zeros((num_stages - 1, *x.shape[1:]), x.dtype)
        state = jnp.zeros((num_stages, *x.shape[1:]), x.dtype)
        _, outs = lax.scan(step, state, jnp.concatenate([x, empty]))
        return jnp.sum(outs[num_stages - 1 :] * target)

    def stack(x: Any, weights: Any, scale: Any, ids: Any, target: Any) -> jax.Array:
        for i in range(num_stages):
            out = jax.vmap(
                lambda h, i=i: dense_layer(False, h, ids[i], weights[i], scale[i], ids[i] >= 0)
            )(x)
            x = gate(x, out)
        return jnp.sum(x * target)

    arguments = (x, weights, scale, ids, target)
    expected = jax.jit(jax.value_and_grad(stack, argnums=(0, 1, 2)))(*arguments)
    assert all(np.any(g) for g in jax.tree.leaves(expected))
    of_stage, of_batch = P("stage", "ep"), P(None, "ep")
    placed = place(mesh, (of_batch, of_stage, of_stage, of_stage, of_batch), arguments)
    actual = jax.jit(jax.value_and_grad(pipeline, argnums=(0, 1, 2)))(*placed)
    assert_equal(actual, expected)


@pytest.mark.versions
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
def test_checkpoint_and_scan(inside: bool) -> None:
    """Outside of shard_map with check_vma; inside it without, with which JAX itself fails."""
    placement = STAGES["2x2"]
    mesh, case = placement.mesh(), sizes(placement, capacity=None)
    problems = [make_problem(placement, case, seed=i) for i in range(2)]
    arguments = _stack(problems, (True,) * 4)
    target = np.stack([p.target for p in problems])

    def twice(layer: Callable) -> Callable:
        def run(x: Any, ids: Any, weights: Any, scale: Any) -> jax.Array:
            @jax.checkpoint
            def step(h: Any, s: Any) -> Any:
                return gate(h, layer(h, ids, weights, s)), None

            return lax.scan(step, x, jnp.stack([scale, -scale]))[0]

        return run

    if inside:
        shard = shard_layer(case, "ep", square=False)
        layers = jax.shard_map(
            twice(lambda *args: shard(*args)[0]),
            mesh=mesh,
            in_specs=P("ep"),
            out_specs=P("ep"),
            check_vma=False,
        )
    else:
        layers = twice(sharded_layer(placement, mesh, case, check_vma=True, square=False))
    dense = twice(lambda x, ids, w, scale: dense_layer(False, x, ids, w, scale, ids >= 0))

    def gradients(f: Callable) -> Any:
        def loss(x: Any, ids: Any, weights: Any, scale: Any) -> jax.Array:
            return jnp.sum(f(x, ids, weights, scale) * target)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 2, 3)))(*arguments)

    expected = gradients(jax.vmap(dense))
    assert all(np.any(g) for g in jax.tree.leaves(expected))
    assert_equal(gradients(jax.vmap(layers, spmd_axis_name="stage")), expected)


@checks_vma
def test_vmap_inside_shard_map(check_vma: bool) -> None:
    """Of the three verbs together, over any axis, drops and statistics as in single calls."""
    mesh, case = EP.mesh(), sizes(EP)
    problems = [make_problem(EP, case, seed=i) for i in range(3)]
    x, ids, weights, _ = _stack(problems, (True, True, True, False))
    layer = shard_layer(case, "ep")

    def shard(x: Any, ids: Any, weights: Any, scale: Any) -> Any:
        def one(x: Any, ids: Any, weights: Any) -> Any:
            out, layout = layer(x, ids, weights, scale)
            return out, layout.stats()["num_dropped"]

        return jax.vmap(one, in_axes=(0, 1, 0), out_axes=(0, 1))(
            x, jnp.swapaxes(ids, 0, 1), weights
        )

    run = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(P(None, "ep"), P(None, "ep"), P(None, "ep"), P("ep")),
        out_specs=(P(None, "ep"), P("ep")),
        check_vma=check_vma,
    )
    out, num_dropped = jax.jit(run)(x, ids, weights, problems[0].scale)
    expected = [dense_layer(True, *p.inputs[:3], problems[0].scale, p.kept) for p in problems]
    assert_equal(out, np.stack(expected))
    dropped = np.stack([p.layouts[0].num_dropped for p in problems], axis=1)
    assert dropped.any()
    assert_equal(num_dropped, dropped)


@pytest.mark.versions
def test_vmap_of_vmap() -> None:
    """The outer one over the stages, the inner one over a batch.

    Without check_vma, with which JAX's own operations (jnp.repeat) fail in it.
    """
    placement = STAGES["2x2"]
    mesh, case = placement.mesh(), sizes(placement)
    problems = [make_problem(placement, case, seed=i) for i in range(6)]
    x, ids, weights, _ = (a.reshape(2, 3, *a.shape[1:]) for a in _stack(problems, (True,) * 4))
    scale = problems[0].scale
    layer = sharded_layer(placement, mesh, case, check_vma=False)
    run = jax.vmap(
        jax.vmap(layer, in_axes=(0, 0, 0, None)), in_axes=(0, 0, 0, None), spmd_axis_name="stage"
    )
    expected = np.stack([dense_layer(True, *p.inputs[:3], scale, p.kept) for p in problems])
    assert_equal(jax.jit(run)(x, ids, weights, scale), expected.reshape(x.shape))


def test_jacrev() -> None:
    """It maps the backward pass; the Jacobian of some sums of the result is the dense layer's."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case)
    x, ids, weights, scale = problem.inputs

    def sums(f: Callable) -> Callable:
        return jax.jit(jax.jacrev(lambda x, w: jnp.sum(f(x, w), axis=0)[:3], argnums=(0, 1)))

    actual = sums(lambda x, w: layer(x, ids, w, scale))(x, weights)
    expected = sums(lambda x, w: dense_layer(True, x, ids, w, scale, problem.kept))(x, weights)
    assert all(np.any(j) for j in expected)
    assert_equal(actual, expected)


@checks_vma
def test_fp8_and_integer_rows(check_vma: bool) -> None:
    """What has no gradient: float8 tokens with their scales, and ids of rows."""
    placement = STAGES["2x2"]
    mesh, case = placement.mesh(), sizes(placement, hidden=128)
    problems = [make_problem(placement, case, seed=i) for i in range(2)]
    x, ids, _, _ = _stack(problems, (True,) * 4)

    def shard(x: Any, ids: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=16, axis_name="ep", capacity=10)
        received = jax_ep.dispatch(x, layout, fp8="float32")
        numbers = jax_ep.dispatch(x.astype(jnp.int32), layout).tokens
        scales = x[:, :2].astype(jnp.float32)
        passed_on = jax_ep.dispatch(x.astype(jnp.float8_e5m2), layout, scales=scales)
        wide = [r.tokens.astype(jnp.float32) for r in (received, passed_on)]
        return *wide, received.scales, passed_on.scales, numbers

    run = jax.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=check_vma)
    singly = [jax.jit(run)(x[i], ids[i]) for i in range(2)]
    expected = jax.tree.map(lambda *a: np.stack(a), *singly)
    assert_equal(jax.jit(jax.vmap(run, spmd_axis_name="stage"))(x, ids), expected)
    assert_equal(jax.jit(jax.vmap(run))(x, ids), expected)


@pytest.mark.versions
@pytest.mark.parametrize("spmd_axis_name", ["stage", None])
def test_checked_ids(spmd_axis_name: str | None) -> None:
    """check_ids looks at every element of the batch."""
    placement = STAGES["2x2"]
    mesh, case = placement.mesh(), sizes(placement)
    ids = np.stack([make_problem(placement, case, seed=i).topk_idx for i in range(2)])
    run = jax.shard_map(
        lambda ids: (
            jax_ep.make_layout(ids, num_experts=16, axis_name="ep", check_ids=True).group_sizes
        ),
        mesh=mesh,
        in_specs=P("ep"),
        out_specs=P("ep"),
    )
    checked = jax.jit(jax.vmap(run, spmd_axis_name=spmd_axis_name))
    assert np.sum(checked(ids)) == np.sum(ids >= 0)
    ids[1, -1, 0] = 16
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"rank 1.*has 1 of 12"):
        jax.block_until_ready(checked(ids))
