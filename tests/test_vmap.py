"""vmap of the verbs is an error that says what to do instead; what it says works."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    EP,
    assert_equal,
    dense_layer,
    make_problem,
    shard_layer,
    sharded_layer,
    sizes,
)

import jax_ep


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
        "jax_ep_combine_gradient": lambda x, ids, w: jax.vmap(
            jax.vjp(
                lambda y, w: jax_ep.combine(y, make(ids[:, 0]), w), jnp.ones((10, 8)), jnp.ones(10)
            )[1]
        )(jnp.swapaxes(x, 0, 1))[0],
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
