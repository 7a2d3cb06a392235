"""Layout is a pytree: it goes through jit, shard_map, loops and branches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backends import LAYOUT_ARRAYS
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from routings import Case
from sharded_layers import (
    EP,
    assert_equal,
    checks_vma,
    compiled_calls,
    experts,
    in_specs,
    make_problem,
    place,
    sizes,
)

import jax_ep
from jax_ep import reference


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


STATIC = (
    "axis_name",
    "num_ranks",
    "num_experts",
    "capacity",
    "expert_alignment",
    "expert_capacity",
    "zero_tail",
)


@pytest.mark.versions
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
        dataclasses.replace(layout, expert_capacity=5),
        dataclasses.replace(layout, zero_tail=True),
        dataclasses.replace(layout, axis_name=("other",)),
    ]
    assert all(jax.tree.structure(other) != structure for other in others)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(layout)]
    assert paths[:2] == [".topk_idx", ".send_row"]


@pytest.mark.versions
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


@pytest.mark.versions
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
