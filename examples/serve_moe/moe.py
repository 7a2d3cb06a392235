"""The MoE layer of a server: every token reaches its experts, and none is dropped.

Letters: T tokens of this device, R devices of the EP group, H hidden size, K experts of a token,
L experts of this device, M rows that an expert has room for.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import model

import jax_ep

Array = jax.Array


def moe_jax_ep(x: Array, layer: dict, is_token: Array, config: model.Config) -> tuple[Array, dict]:
    """The layer through jax_ep, for x [T, H] of which is_token bool [T] are tokens.

    Each expert has room for all tokens of its group: its rows are the operand of a batched product,
    whose shape does not depend on the routing. With a grouped product of your own leave
    expert_capacity out, and give it the packed rows and recv.group_sizes. JAX's, ragged_dot, is no
    gain here: XLA applies every expert to every packed row, K times the products of fixed room.
    """
    _, weights, ids = model.route(x, layer["router"], config)
    ids = jnp.where(is_token[:, None], ids, -1)  # what is no token goes nowhere
    weights = model.normalised(weights, config)
    room = jax_ep.expert_capacity(
        *ids.shape, jax.lax.axis_size("ep"), None, num_experts=config.num_experts
    )
    layout, recv = jax_ep.layout_and_dispatch(
        x,
        ids,
        weights,
        num_experts=config.num_experts,
        axis_name="ep",
        expert_capacity=room,
    )
    rows = recv.tokens.reshape(-1, room, x.shape[1])
    y = model.batched_experts(rows, layer["experts"]).reshape(recv.tokens.shape)
    out = jax_ep.combine(y, layout, recv.weights)
    return out, {"expert_rows": layout.expert_counts, "dropped": layout.num_dropped[None]}


def moe_all_to_all(
    x: Array, layer: dict, is_token: Array, config: model.Config
) -> tuple[Array, dict]:
    """The same layer by jax.lax.all_to_all, to compare with: every device gets every token.

    A device applies all its experts to all tokens, the very products of `moe_jax_ep`, and sends
    each token's sum back.
    """
    _, weights, ids = model.route(x, layer["router"], config)
    ids = jnp.where(is_token[:, None], ids, -1)
    weights = model.normalised(weights, config)
    num_ranks, num_local = jax.lax.axis_size("ep"), layer["experts"]["down"].shape[0]
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name="ep", split_axis=0, concat_axis=0, tiled=True
    )
    x, ids, weights = (exchange(jnp.tile(a, (num_ranks, 1))) for a in (x, ids, weights))

    local = ids - jax.lax.axis_index("ep") * num_local
    local = jnp.where((local >= 0) & (local < num_local) & (ids >= 0), local, num_local)
    expert_rows = jnp.bincount(local.reshape(-1), length=num_local + 1)[:num_local]
    y = model.batched_experts(jnp.broadcast_to(x, (num_local, *x.shape)), layer["experts"])
    of_expert = jax.nn.one_hot(local, num_local, dtype=jnp.float32)  # [R * T, K, L]
    part = jnp.einsum("tkl,tk,lth->th", of_expert, weights, y)
    parts = exchange(part.astype(x.dtype)).reshape(num_ranks, -1, x.shape[1])
    dropped = jnp.zeros_like(expert_rows, shape=(1,))
    return jnp.sum(parts, axis=0), {"expert_rows": expert_rows, "dropped": dropped}


LAYERS: dict[str, Callable[..., tuple[Array, dict]]] = {
    "jax_ep": moe_jax_ep,
    "all_to_all": moe_all_to_all,
}
