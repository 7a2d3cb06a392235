"""Groups across nodes on CUDA: what they do not take, and what is done beside their calls."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from jax_ep import limits


def check(
    verb: str, is_layout: bool, in_slots: bool, ranks_per_node: int, params: dict[str, Any]
) -> None:
    """What kernels over the network do not take.

    Args:
        verb: for messages.
        is_layout: whether the call is ``make_layout``'s.
        in_slots: whether it may go through slots; what turns out not to fit the handler refuses.
        ranks_per_node: of the group.
        params: of the call.

    Raises:
        ValueError: if something of it is beyond a limit.
    """
    num_ranks = params["num_ranks"]
    where = f"{verb}: for a group across nodes ({num_ranks} ranks, {ranks_per_node} on each)"
    if num_ranks > limits.MAX_NETWORK_RANKS:
        raise ValueError(f"{where} the ranks must be at most {limits.MAX_NETWORK_RANKS}")
    if params["num_experts"] % 2:
        raise ValueError(f"{where} num_experts must be even; got {params['num_experts']}")
    if is_layout:
        return
    if "ranks_per_node" not in params:  # it sums nothing
        return
    order = params["ranks_per_node"]
    if order != ranks_per_node:
        raise ValueError(
            f"{where} sums are in that order on CUDA; the layout has ranks_per_node={order}"
        )
    num_nodes = num_ranks // ranks_per_node
    if num_nodes > limits.MAX_COMBINE_NODES and not in_slots:
        raise ValueError(
            f"{where} the nodes must be at most {limits.MAX_COMBINE_NODES}; got {num_nodes}"
        )


def quantize(
    ctx: Any, x_type: Any, x: Any, num_sms: int, power_of_two: bool
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Lowers ``jax_ep_quantize``: rows [T, H] as float8 with their scales, on this device alone.

    Args:
        ctx: of a lowering.
        x_type: of the rows.
        x: the rows.
        num_sms: that it may use; 0: all.
        power_of_two: of the scales.

    Returns:
        Types and values: float8_e4m3fn [T, H], float32 [T, S].
    """
    num_tokens, num_channels = x_type.shape
    scales_shape = (num_tokens, limits.num_block_scales(num_channels))
    types = (
        x_type.update(dtype=jnp.dtype(jnp.float8_e4m3fn), weak_type=False),
        x_type.update(shape=scales_shape, dtype=jnp.dtype(jnp.float32), weak_type=False),
    )
    rule = jax.ffi.ffi_lowering("jax_ep_quantize")
    values: Sequence[Any] = rule(
        ctx.replace(avals_in=[x_type], avals_out=types),
        x,
        num_sms=np.int64(num_sms),
        power_of_two_scales=np.int64(power_of_two),
    )
    return types, values


def dequantize(ctx: Any, values: Any, scales: Any) -> Sequence[Any]:
    """Lowers the products of float8 rows [N, H] with their scales [N, S], of the result's type."""
    (result,) = ctx.avals_out

    def products(values: jax.Array, scales: jax.Array) -> jax.Array:
        of_channels = jnp.repeat(scales, limits.SCALE_BLOCK, axis=1)[:, : values.shape[1]]
        return (values.astype(jnp.float32) * of_channels).astype(result.dtype)

    lowered: Sequence[Any] = mlir.lower_fun(products, multiple_results=False)(ctx, values, scales)
    return lowered
