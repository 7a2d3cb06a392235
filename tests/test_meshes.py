"""A layer on all kinds of meshes: Auto and Explicit axes, several axes, any order of devices."""

from typing import Any

import jax
import numpy as np
import pytest
from backends import LAYOUT_ARRAYS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    AUTO,
    DP_EP,
    EXPLICIT,
    PLACEMENTS,
    Placement,
    assert_equal,
    dense_layer,
    in_specs,
    make_problem,
    place,
    shard_layer,
    sharded_layer,
    sizes,
    value_and_gradients,
)

import jax_ep


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


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [(name, AUTO) for name in PLACEMENTS if name not in ("reversed", "dp_ep", "dp_ep_tp")]
    + [
        pytest.param("dp_ep_tp", AUTO, marks=pytest.mark.versions),
        ("dp_ep_permuted", EXPLICIT),
        pytest.param("tuple", EXPLICIT, marks=pytest.mark.versions),
        ("dp_ep_tp", EXPLICIT),
    ],
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


@pytest.mark.parametrize(
    ("name", "check_vma"), [("tp_ep_dp", True), ("tuple_around_dp", False), ("permuted", True)]
)
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


@pytest.mark.versions
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


@pytest.mark.versions
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


@pytest.mark.versions
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
