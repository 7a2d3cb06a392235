"""Expert ids that make no sense as an error: ``make_layout(..., check_ids=True)``."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep import compat, group
from jax_ep.batching import map_calls

_MOST_NAMED = 4  # ranks, in a message


def require_valid_ids(
    where: str, topk_idx: jax.Array, num_experts: int, axis_name: tuple[str, ...]
) -> jax.Array:
    """``topk_idx`` [T, K] as it is, if all ids on the whole mesh are -1 or in [0, E).

    Else a callback raises on every device, before any of them uses the ids: nobody is left to wait
    for a rank that has failed.
    """
    automatic = group.automatic_axes()
    if automatic:  # JAX has no callbacks there
        raise NotImplementedError(
            f"{where}: check_ids=True needs a jax.shard_map that is manual over all axes of the "
            f"mesh; {automatic[0]!r} is left to the compiler. Leave shard_map's axis_names out, or "
            "look at layout.num_invalid"
        )
    (checked,) = _check_p.bind(
        topk_idx,
        where=where,
        num_experts=num_experts,
        axes=(*group.other_axes(axis_name), *axis_name),
        num_ranks=math.prod(compat.manual_mesh().shape[name] for name in axis_name),
    )
    result: jax.Array = checked
    return result


def _check(
    topk_idx: jax.Array, *, where: str, num_experts: int, axes: tuple[str, ...], num_ranks: int
) -> list[jax.Array]:
    invalid = (topk_idx < -1) | (topk_idx >= num_experts)
    own = jnp.stack([jnp.sum(invalid, dtype=jnp.int32), jnp.min(topk_idx), jnp.max(topk_idx)])
    table = lax.all_gather(compat.vary_over(own, axes), axes)
    report = functools.partial(
        _report, where, num_ranks=num_ranks, num_ids=topk_idx.size, num_experts=num_experts
    )
    # Zero: what is computed from the sum waits for the callback.
    zero = jax.pure_callback(report, jax.ShapeDtypeStruct((), jnp.int32), table)
    return [topk_idx + zero]


def _report(
    where: str, table: jax.Array, *, num_ranks: int, num_ids: int, num_experts: int
) -> np.ndarray:
    """Raises if any row of ``table`` [devices, (invalid ids, lowest, highest)] has invalid ids."""
    found = np.asarray(table)
    bad = np.flatnonzero(found[:, 0])
    if bad.size == 0:
        return np.zeros((), np.int32)
    named = []
    for device in bad[:_MOST_NAMED]:
        rank = f"rank {device % num_ranks}"
        if len(found) > num_ranks:
            rank += f" of group {device // num_ranks}"
        num_invalid, lowest, highest = found[device]
        named.append(f"{rank} has {num_invalid} of {num_ids}, its ids lie in [{lowest}, {highest}]")
    if bad.size > _MOST_NAMED:
        named.append(f"and {bad.size - _MOST_NAMED} ranks more")
    raise ValueError(
        f"{where}: ids that are neither -1 nor in [0, num_experts = {num_experts}): "
        f"{'; '.join(named)}. Ids count from 0, and num_experts is the width of the router"
    )


def _lower(ctx: Any, topk_idx: Any, **params: Any) -> Sequence[Any]:
    names, _, shape = compat.mesh_devices(compat.lowering_mesh(ctx))
    sizes = dict(zip(names, shape, strict=True))
    check = functools.partial(_check, **params)
    return compat.lower_on_axes(ctx, sizes, check, (topk_idx, ctx.avals_in[0]))


# A primitive, because vmap around shard_map may take a mesh axis (spmd_axis_name): what it traces
# can not gather over that.
_check_p = Primitive("jax_ep_check_ids")
_check_p.multiple_results = True
_check_p.def_abstract_eval(lambda topk_idx, **_: [topk_idx])
mlir.register_lowering(_check_p, _lower)
batching.primitive_batchers[_check_p] = functools.partial(map_calls, _check_p)
