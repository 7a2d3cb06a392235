"""Expert ids that make no sense as an error: ``make_layout(..., check_ids=True)``."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_ep import compat, group

_MOST_NAMED = 4  # ranks, in a message


def require_valid_ids(
    where: str, topk_idx: jax.Array, num_experts: int, axis_name: tuple[str, ...]
) -> jax.Array:
    """``topk_idx`` [T, K] as it is, if all ids on the whole mesh are -1 or in [0, E).

    Else a callback raises on every device, before any of them uses the ids: nobody is left to wait
    for a rank that has failed.
    """
    invalid = (topk_idx < -1) | (topk_idx >= num_experts)
    own = jnp.stack([jnp.sum(invalid, dtype=jnp.int32), jnp.min(topk_idx), jnp.max(topk_idx)])
    axes = (*group.other_axes(axis_name), *axis_name)
    table = lax.all_gather(compat.vary_over(own, axes), axes)
    report = functools.partial(
        _report,
        where,
        num_ranks=math.prod(compat.manual_mesh().shape[name] for name in axis_name),
        num_ids=topk_idx.size,
        num_experts=num_experts,
    )
    # Zero: what is computed from the sum waits for the callback.
    zero: jax.Array = jax.pure_callback(
        report,
        jax.ShapeDtypeStruct((), jnp.int32),
        table,
        vmap_method="sequential",  # so that it is the primitives that refuse vmap
    )
    return topk_idx + zero


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
