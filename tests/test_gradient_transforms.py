"""Gradients of a layer under JAX's transformations: outside and inside shard_map, of any argument.

The gradients of the single verbs, on every backend, are in test_gradients.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    DP_EP,
    EP,
    PLACEMENTS,
    assert_equal,
    check_values_and_gradients,
    checks_vma,
    dense_layer,
    in_specs,
    make_problem,
    place,
    shard_layer,
    sharded_layer,
    sizes,
)


@pytest.mark.parametrize("name", ["dp_ep_tp", "tuple_around_dp"])
def test_value_and_grad_outside(name: str) -> None:
    """As test_mesh in test_meshes.py, but without check_vma, and only the layer itself in jit.

    Parameters that are replicated over dp or tp get the sum over dp, once.
    """
    placement = PLACEMENTS[name]
    mesh, case = placement.mesh(), sizes(placement)
    problem = make_problem(placement, case, seed=2)
    layer = jax.jit(sharded_layer(placement, mesh, case, check_vma=False))
    check_values_and_gradients(problem, placement, mesh, layer)


@pytest.mark.parametrize(("argument", "check_vma"), [(0, True), (1, False), (2, True)])
def test_grad_by_one_argument(argument: int, check_vma: bool) -> None:
    """The others are constants to autodiff: their cotangents need not be formed."""
    mesh, case = EP.mesh(), sizes(EP)
    problem = make_problem(EP, case)
    layer = sharded_layer(EP, mesh, case, check_vma=check_vma)
    gradient = jax.grad(lambda *a: jnp.sum(layer(*a[:4]) * a[4]), argnums=(0, 2, 3)[argument])
    arrays = place(mesh, (*in_specs(EP), EP.tokens), (*problem.inputs, problem.target))
    assert_equal(jax.jit(gradient)(*arrays), problem.gradients()[argument])


@pytest.mark.versions
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


@pytest.mark.versions
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


@pytest.mark.versions
@pytest.mark.parametrize(
    ("replicated", "where", "check_vma"),
    [
        (("x",), "outside", False),
        (("x",), "inside", True),
        (("topk_weights",), "outside", True),
        (("topk_weights",), "inside", False),
        (("x", "topk_idx", "topk_weights"), "outside", True),
        (("x", "topk_idx", "topk_weights"), "inside", True),
    ],
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


@pytest.mark.versions
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
    with pytest.raises(NotImplementedError, match=r"Transpose rule .* not implemented"):
        jax.linear_transpose(lambda x: f(x, *rest), x)(x)
