"""Layers under jax.checkpoint and lax.scan: right gradients, and the calls a policy asks for."""

import functools
from typing import Any

import jax
import pytest
from jax.ad_checkpoint import checkpoint_name
from sharded_layers import (
    EP,
    EXPLICIT,
    PLACEMENTS,
    POLICIES,
    Stack,
    assert_equal,
    calls_in,
    check_values_and_gradients,
    in_specs,
    make_problem,
    save_only,
    shard_layer,
    sharded_layer,
    sizes,
    stack_loss,
    traced_calls,
)

# Calls of layout, dispatch and combine for one layer and its backward pass, whose backward needs
# both the rows and combine's result: each is 1 forward + 1 backward (the layout has no backward),
# and 1 more for each that is recomputed.
CALLS_PER_LAYER: dict[str | None, tuple[int, int, int]] = {
    None: (1, 2, 2),
    "none": (2, 3, 3),
    "layout": (1, 3, 3),
    "dispatch": (2, 2, 3),
    "layout_dispatch": (1, 2, 3),
    "layout_combine": (1, 3, 2),
    "all": (1, 2, 2),
    "dots": (2, 3, 3),
    "everything": (1, 2, 2),
}


@pytest.fixture(scope="module")
def two_layers() -> tuple[Stack, Any]:
    """Two layers, with the loss and the gradients that they must give."""
    stack = Stack.make(EP, 2)
    return stack, stack.expected()


@pytest.mark.parametrize(
    ("policy", "in_one"),
    [
        *((policy, True) for policy in CALLS_PER_LAYER if policy not in ("layout", "dispatch")),
        pytest.param("layout", True, marks=pytest.mark.versions),
        pytest.param("dispatch", True, marks=pytest.mark.versions),
        ("none", False),
        ("layout", False),
    ],
)
def test_checkpoint(two_layers: tuple[Stack, Any], policy: str | None, in_one: bool) -> None:
    """Right gradients, and exactly the calls that the policy asks for, traced and compiled.

    Where the layout is saved, rows that came with it are recomputed by a dispatch alone; where the
    rows are, the layout by itself.
    """
    mesh, (stack, expected) = EP.mesh(), two_layers
    f, arrays = stack_loss(stack, EP, mesh, policy=policy, scan=True, in_one=in_one)
    compiled = jax.jit(f).lower(*arrays).compile()
    assert_equal(compiled(*arrays), expected)
    assert traced_calls(f, *arrays) == CALLS_PER_LAYER[policy]
    assert calls_in(compiled) == CALLS_PER_LAYER[policy]


def test_checkpoint_without_a_loop(two_layers: tuple[Stack, Any]) -> None:
    """The same, but for what is compiled: XLA may merge a recomputation with what it repeats."""
    mesh, (stack, expected) = EP.mesh(), two_layers
    for policy, per_layer in CALLS_PER_LAYER.items():
        f, arrays = stack_loss(stack, EP, mesh, policy=policy, scan=False)
        assert traced_calls(f, *arrays) == tuple(2 * n for n in per_layer), policy
        # What is recomputed: everything, rows by a dispatch alone, a layout by itself.
        if policy in ("none", "layout", "dispatch"):
            assert_equal(jax.jit(f)(*arrays), expected)


@pytest.mark.parametrize(("name", "check_vma"), [("dp_ep", False), ("dp_ep_tp", True)])
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


@pytest.mark.versions
def test_checkpoint_outside_shard_map() -> None:
    """jax.checkpoint around a function that contains the shard_map, with the layout policy."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case)
    for policy in ("none", "layout"):
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
