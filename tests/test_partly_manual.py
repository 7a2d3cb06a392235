"""shard_map that is manual over some axes of the mesh and leaves the others to the compiler."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sharded_layers import (
    AUTO,
    EXPLICIT,
    Placement,
    assert_equal,
    calls_in,
    in_specs,
    make_problem,
    place,
    shard_layer,
    sizes,
)

import jax_ep

# Tokens are whole on every device of "tp", the compiler's axis.
MESHES = {
    "ep_tp": Placement((("ep", 4), ("tp", 2)), replicated=("tp",)),
    "tp_ep": Placement((("tp", 2), ("ep", 4)), replicated=("tp",)),
    "dp_ep_tp": Placement((("dp", 2), ("ep", 2), ("tp", 2)), replicated=("tp",)),
}


def _manual(placement: Placement) -> set[str]:
    return {name for name, _ in placement.axes} - {"tp"}


@pytest.mark.versions
@pytest.mark.parametrize(
    ("name", "check_vma"),
    [("tp_ep", True), ("tp_ep", False), ("ep_tp", False), ("dp_ep_tp", True)],
)
def test_experts_that_the_compiler_splits(name: str, check_vma: bool) -> None:
    """Two matrices per expert, split along their inner size; results and gradients are exact."""
    placement = MESHES[name]
    mesh, case = placement.mesh(), sizes(placement, capacity=None)
    problem = make_problem(placement, case)
    rng = np.random.default_rng(7)
    up, down = (
        rng.integers(-2, 3, (case.num_experts, *shape)).astype(np.float32)
        for shape in ((case.hidden, 4), (4, case.hidden))
    )

    def feed_forward(rows: Any, up: Any, down: Any) -> jax.Array:
        inner = jnp.einsum("...h,...hf->...f", rows, up)
        return jnp.einsum("...f,...fh->...h", inner, down)

    def shard(x: Any, weights: Any, up: Any, down: Any, ids: Any) -> jax.Array:
        def experts(tokens: Any, group_sizes: Any) -> jax.Array:
            expert = jnp.repeat(
                jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=len(tokens)
            )
            return feed_forward(tokens, up[expert], down[expert])

        return jax_ep.moe(x, ids, weights, experts, num_experts=case.num_experts, axis_name="ep")[0]

    tokens = placement.tokens
    run = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(tokens, tokens, P("ep"), P("ep"), tokens),
        out_specs=tokens,
        axis_names=_manual(placement),
        check_vma=check_vma,
    )

    def dense(x: Any, weights: Any, up: Any, down: Any, ids: Any) -> jax.Array:
        rows = feed_forward(x[:, None], up[ids], down[ids])
        return jnp.sum(jnp.where(ids >= 0, weights, 0)[..., None] * rows, axis=1)

    arguments = (problem.x, problem.topk_weights, up, down, problem.topk_idx)
    specs = (tokens, tokens, P("ep", None, "tp"), P("ep", "tp"), tokens)

    def value_and_grad(f: Any) -> Any:
        def loss(*args: Any) -> Any:
            out = f(*args)
            return jnp.sum(out * problem.target), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))

    compiled = value_and_grad(run).lower(*place(mesh, specs, arguments)).compile()
    assert calls_in(compiled) == (1, 2, 2)
    assert "all-gather" not in compiled.as_text()
    assert_equal(
        compiled(*place(mesh, specs, arguments)),
        value_and_grad(dense)(*map(jnp.asarray, arguments)),
    )


@pytest.mark.versions
@pytest.mark.parametrize(
    ("what", "verb", "kind"),
    [
        ("x", "layout_and_dispatch", r"float32\[6, 8\]"),
        ("ids", "layout_and_dispatch", r"int32\[6, 2\]"),
        ("y", "combine", r"float32\[10, 8\]"),
    ],
)
def test_what_the_compiler_splits_is_refused(what: str, verb: str, kind: str) -> None:
    """When the program is compiled, by verb, array and axis; what the message says helps."""
    placement = MESHES["ep_tp"]
    mesh, case = placement.mesh(), sizes(placement)
    problem = make_problem(placement, case)
    split = {"x": (0, P("ep", "tp")), "ids": (1, P(("ep", "tp"))), "y": (3, P("ep", "tp"))}
    specs = list(in_specs(placement))
    argument, specs[argument] = split[what]

    def shard(whole: bool, x: Any, ids: Any, weights: Any, scale: Any) -> jax.Array:
        arguments = [x, ids, weights, scale]
        if whole:
            arguments[argument] = lax.with_sharding_constraint(arguments[argument], P())
        return shard_layer(case, "ep")(*arguments)[0]

    arguments = place(mesh, specs, problem.inputs)

    def run(whole: bool) -> jax.Array:
        f = jax.shard_map(
            lambda *args: shard(whole, *args),
            mesh=mesh,
            in_specs=in_specs(placement),
            out_specs=P("ep"),
            axis_names={"ep"},
        )
        return jax.jit(f)(*arguments)

    message = (
        rf"jax_ep\.{verb}: an array {kind} that it takes is split over axes of the mesh that "
        r"jax\.shard_map leaves to the compiler \('tp'\)\. Add them to shard_map's axis_names"
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        run(False)
    assert_equal(run(True), problem.out())


@pytest.mark.versions
def test_gradients_that_the_compiler_splits_are_refused() -> None:
    placement = MESHES["ep_tp"]
    mesh, case = placement.mesh(), sizes(placement)
    problem = make_problem(placement, case)
    layer = shard_layer(case, "ep")

    def gradient(whole: bool) -> jax.Array:
        def shard(x: Any, *rest: Any) -> jax.Array:
            *arguments, target = rest

            def loss(x: Any) -> jax.Array:
                out = layer(x, *arguments)[0]
                if whole:
                    out = lax.with_sharding_constraint(out, P())
                return jnp.sum(out * target)

            return jax.grad(loss)(x)

        f = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(*in_specs(placement), P("ep")),
            out_specs=P("ep"),
            axis_names={"ep"},
        )
        specs = (*in_specs(placement), P("ep", "tp"))
        return jax.jit(f)(*place(mesh, specs, (*problem.inputs, problem.target)))

    with pytest.raises(jax.errors.JaxRuntimeError, match=r"jax_ep\.\w+: an array .*for a gradient"):
        gradient(False)
    assert_equal(gradient(True), problem.gradients()[0])


@pytest.mark.versions
@pytest.mark.parametrize(
    ("axis_type", "check_ids", "message"),
    [
        (
            EXPLICIT,
            False,
            r"mesh axis 'tp' is Explicit, and the enclosing jax\.shard_map is manual over \['ep'\] "
            r"alone: where jax\.vmap maps over the axis .*else add it to shard_map's axis_names",
        ),
        (
            AUTO,
            True,
            r"check_ids=True needs a jax\.shard_map that is manual over all axes of the mesh; 'tp' "
            r"is left to the compiler",
        ),
    ],
    ids=["explicit", "check_ids"],
)
def test_refused_when_traced(axis_type: AxisType, check_ids: bool, message: str) -> None:
    mesh = MESHES["ep_tp"].mesh(axis_type)

    def shard(ids: Any) -> jax.Array:
        layout = jax_ep.make_layout(ids, num_experts=16, axis_name="ep", check_ids=check_ids)
        return layout.group_sizes

    run = jax.shard_map(shard, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), axis_names={"ep"})
    with pytest.raises(NotImplementedError, match=r"make_layout: " + message):
        jax.jit(run).trace(jax.device_put(np.zeros((8, 2), np.int32), NamedSharding(mesh, P("ep"))))
