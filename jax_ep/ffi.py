"""The custom calls as JAX primitives: result shapes, attributes, lowering.

Each primitive is one target: ``jax_ep_layout``, ``jax_ep_dispatch`` and ``jax_ep_combine`` on every
platform, ``jax_ep_combine_gradient`` on CUDA, in whose place CPU has a dispatch and XLA's
arithmetic. Operand and result order is that of xla_ffi/calls.h; on CPU the device's coordinates
come before all operands, and combine has no scratch. Result types derive from the operands' types,
so that shardings and varying axes carry over.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jax_ep import _cpu, compat, group, limits, nodes, runtime, unsplit
from jax_ep.batching import map_calls
from jax_ep.layout import Layout

FP8 = jnp.float8_e4m3fn

# Values of the attribute `quantization`: by the format of the scales, and where x comes with them.
NO_QUANTIZATION = 0
QUANTIZATIONS = {None: NO_QUANTIZATION, "float32": 1, "power_of_two": 2}
GIVEN_SCALES = 3


class RowForm(NamedTuple):
    """How the rows of a dispatch cross and come out: attributes of the call."""

    quantization: int = NO_QUANTIZATION
    dequantize: bool = False
    expand: bool = True

    @property
    def has_scales(self) -> bool:
        """Whether rows come out with scales."""
        return self.quantization != NO_QUANTIZATION and not self.dequantize

    @property
    def becomes_fp8(self) -> bool:
        """Whether rows come out quantised, and x is wider."""
        return self.has_scales and self.quantization != GIVEN_SCALES


class LayoutTables(NamedTuple):
    """Results of ``jax_ep_layout``; meaning and shapes in ``jax_ep.Layout``."""

    send_row: jax.Array
    recv_src: jax.Array
    recv_order: jax.Array
    recv_offsets: jax.Array
    group_sizes: jax.Array
    expert_counts: jax.Array
    expert_load: jax.Array
    counters: jax.Array  # int32 [3]: num_recv, num_dropped, num_invalid


# Those that the operations on a layout take, in this order: cuda/core/tables.h.
OPERAND_TABLES = LayoutTables._fields[:5]


def bind_layout(
    topk_idx: jax.Array,
    *,
    axis_name: tuple[str, ...],
    num_ranks: int,
    num_experts: int,
    capacity: int,
    expert_alignment: int,
    expert_capacity: int,
    num_sms: int,
) -> LayoutTables:
    """Calls ``jax_ep_layout`` on this shard's ids, int32 [T, K].

    ``expert_capacity`` 0: the experts share the capacity.
    """
    num_tokens, top_k = topk_idx.shape
    return LayoutTables(
        *_layout_p.bind(
            topk_idx,
            axis_name=axis_name,
            num_ranks=num_ranks,
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=num_experts,
            capacity=capacity,
            expert_alignment=expert_alignment,
            expert_capacity=expert_capacity,
            num_sms=num_sms,
        )
    )


def _tables(layout: Layout) -> tuple[jax.Array, ...]:
    """What every operation on a layout takes after its rows."""
    return (layout.topk_idx, *(getattr(layout, name) for name in OPERAND_TABLES))


def _sizes(layout: Layout) -> dict[str, Any]:
    """What every operation on a layout has as attributes."""
    num_tokens, top_k = layout.topk_idx.shape
    return {
        "axis_name": layout.axis_name,
        "num_ranks": layout.num_ranks,
        "num_tokens": num_tokens,
        "top_k": top_k,
        "num_experts": layout.num_experts,
        "capacity": layout.capacity,
        "num_sms": layout.num_sms,
    }


def bind_dispatch(
    x: jax.Array,
    layout: Layout,
    x_scales: jax.Array | None,
    topk_weights: jax.Array | None,
    form: RowForm,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Calls ``jax_ep_dispatch``; returns tokens [C, H], scales [C, S] and weights [C].

    Without ``form.expand`` tokens and scales have a row per (rank, token), and one of zeros.
    """
    results = _dispatch_p.bind(
        x,
        *_tables(layout),
        *(() if x_scales is None else (x_scales,)),
        *(() if topk_weights is None else (topk_weights,)),
        **_sizes(layout),
        zero_tail=layout.zero_tail,
        has_weights=topk_weights is not None,
        **form._asdict(),
    )
    return (
        results[0],
        results[1] if form.has_scales else None,
        results[-1] if topk_weights is not None else None,
    )


def bind_combine(
    y: jax.Array,
    layout: Layout,
    weights: jax.Array | None,
    values: jax.Array | None,
    *,
    expand: bool = True,
) -> tuple[jax.Array, jax.Array | None]:
    """Calls ``jax_ep_combine``; returns out [T, H] and ``values`` at each (token, k), [T, K].

    Without ``expand`` y has the rows of a dispatch without it, and there are no weights.
    """
    results = _combine_p.bind(
        y,
        *_tables(layout),
        *(() if weights is None else (weights,)),
        *(() if values is None else (values,)),
        **_sizes(layout),
        ranks_per_node=layout.ranks_per_node or 0,
        has_weights=weights is not None,
        has_values=values is not None,
        expand=expand,
    )
    return results[0], results[1] if values is not None else None


def bind_combine_gradient(
    g: jax.Array, layout: Layout, y: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Calls ``jax_ep_combine_gradient``; returns d_y [C, H] and d_weights [C] of ``combine``.

    A row of y has at most ``limits.MAX_WEIGHTED_ROW_BYTES`` bytes. With ``zero_tail=False`` the
    tail of d_y may be anything; d_weights is 0 there.
    """
    d_y, d_weights = _combine_gradient_p.bind(
        g, *_tables(layout), y, weights, **_sizes(layout), zero_tail=layout.zero_tail
    )
    return d_y, d_weights


def weigh_rows(
    rows: jax.Array, recv_src: jax.Array, y: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of ``combine`` from its cotangent's rows [C, H]: XLA's arithmetic."""
    rows = rows.astype(jnp.float32)
    valid = recv_src >= 0
    # Padding and tail are masked, not multiplied: y and weights may hold anything there.
    d_y = jnp.where(valid[:, None], weights[:, None] * rows, 0).astype(y.dtype)
    d_weights = jnp.where(valid, jnp.sum(y.astype(jnp.float32) * rows, axis=1), 0)
    return d_y, d_weights


def _layout_shapes(
    topk_idx: Any, *, num_ranks: int, num_experts: int, capacity: int, **_: Any
) -> Sequence[Any]:
    num_local_experts = num_experts // num_ranks
    shapes = {
        "send_row": topk_idx.shape,
        "recv_src": (capacity,),
        "recv_order": (capacity,),
        "recv_offsets": (num_ranks * topk_idx.shape[0] + 1,),
        "group_sizes": (num_local_experts,),
        "expert_counts": (num_local_experts,),
        "expert_load": (num_experts,),
        "counters": (3,),
    }
    return [topk_idx.update(shape=shapes[name]) for name in LayoutTables._fields]


def _dispatch_shapes(
    x: Any,
    *operands: Any,
    num_ranks: int,
    capacity: int,
    has_weights: bool,
    quantization: int,
    dequantize: bool,
    expand: bool,
    **_: Any,
) -> Sequence[Any]:
    num_tokens, num_channels = x.shape
    num_rows = capacity if expand else num_ranks * num_tokens + 1
    form = RowForm(quantization, dequantize, expand)
    tokens_dtype = jnp.dtype(FP8) if form.becomes_fp8 else x.dtype
    results = [x.update(shape=(num_rows, num_channels), dtype=tokens_dtype, weak_type=False)]
    f32 = functools.partial(x.update, dtype=jnp.dtype(jnp.float32), weak_type=False)
    if form.has_scales:
        num_scales = limits.num_block_scales(num_channels)
        if quantization == GIVEN_SCALES:
            num_scales = _x_scales(operands).shape[1]
        results.append(f32(shape=(num_rows, num_scales)))
    if has_weights:
        results.append(f32(shape=(capacity,)))
    return results


def _x_scales(operands: Sequence[Any]) -> Any:
    """Of dispatch's operands after x: its scales, which come after topk_idx and the tables."""
    return operands[1 + len(OPERAND_TABLES)]


def _combine_shapes(
    y: Any, topk_idx: Any, *_operands: Any, has_values: bool, **_: Any
) -> Sequence[Any]:
    results = [y.update(shape=(topk_idx.shape[0], y.shape[1]), weak_type=False)]
    if has_values:
        f32 = jnp.dtype(jnp.float32)
        results.append(y.update(shape=topk_idx.shape, dtype=f32, weak_type=False))
    return results


def _combine_gradient_shapes(g: Any, *operands: Any, **_: Any) -> Sequence[Any]:
    y, weights = operands[-2:]
    return [y.update(weak_type=False), weights.update(weak_type=False)]


def _combine_gradient_on_cpu(
    g: jax.Array, *operands: jax.Array, **params: Any
) -> tuple[jax.Array, jax.Array]:
    *tables, y, weights = operands
    (rows,) = _dispatch_p.bind(
        g,
        *tables,
        has_weights=False,
        quantization=NO_QUANTIZATION,
        dequantize=False,
        expand=True,
        **params,
    )
    recv_src = tables[1 + OPERAND_TABLES.index("recv_src")]  # after topk_idx
    return weigh_rows(rows, recv_src, y, weights)


def _lower(target: str, platform: str, ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    axis_name = params.pop("axis_name")
    automatic = compat.automatic_axes(ctx)
    if automatic:
        operands = tuple(unsplit.require(ctx, _VERBS[target], automatic, operands))
    members = group.members(ctx, axis_name)
    if "ranks_per_node" in params:
        params["ranks_per_node"] = params["ranks_per_node"] or nodes.ranks_per_node(
            ctx, axis_name, params["num_ranks"], _VERBS[target]
        )
    operand_types, results = list(ctx.avals_in), list(ctx.avals_out)
    values = list(operands)
    if platform == "cpu":
        runtime.require_cpu(target, members.across_processes)
        _cpu.end_program()
        # A GPU knows its place by its number; on CPU a program runs on any devices.
        operand_types.insert(0, jax.core.ShapedArray((2,), np.int32))
        values.insert(0, group.coordinates(ctx, axis_name))
    else:
        _check_limits_of_cuda(target, ctx.avals_in, params)
        _check_nodes_of_cuda(target, params)
        runtime.require_cuda(target)
        results += _scratch(target, ctx.avals_in, params)
    attributes = {name: np.int64(value) for name, value in params.items()}
    rule = jax.ffi.ffi_lowering(target)
    handler_ctx = ctx.replace(avals_in=operand_types, avals_out=results)
    lowered: Sequence[Any] = rule(handler_ctx, *values, **members.attributes, **attributes)
    return lowered[: len(ctx.avals_out)]


_VERBS = {
    "jax_ep_layout": "jax_ep.make_layout",
    "jax_ep_dispatch": "jax_ep.dispatch",
    "jax_ep_combine": "jax_ep.combine",
    "jax_ep_combine_gradient": "jax_ep.combine's gradient",
}


def _check_nodes_of_cuda(target: str, params: dict[str, Any]) -> None:
    num_ranks = params["num_ranks"]
    ranks_per_node = params.get("ranks_per_node", num_ranks)
    if ranks_per_node != num_ranks:
        raise NotImplementedError(
            f"{_VERBS[target]}: a group of {num_ranks} ranks with {ranks_per_node} on each node is "
            "for CPU only so far: on CUDA a group lies on one node. Make the mesh axes of "
            "axis_name smaller, or, where the ranks are on one node, pass "
            f"jax_ep.initialize(ranks_per_node={num_ranks})"
        )


def _check_limits_of_cuda(target: str, avals: Sequence[Any], params: dict[str, Any]) -> None:
    quantization = params.get("quantization", NO_QUANTIZATION)
    num_channels, scaled_row_bytes = None, None
    if quantization == GIVEN_SCALES:
        scaled_row_bytes = avals[0].shape[1] + 4 * _x_scales(avals[1:]).shape[1]
    elif quantization != NO_QUANTIZATION:
        num_channels = avals[0].shape[1]
    limits.check_cuda(
        _VERBS[target],
        num_ranks=params["num_ranks"],
        num_tokens=params["num_tokens"],
        top_k=params["top_k"],
        num_sms=0 if target == "jax_ep_layout" else params["num_sms"],
        num_experts=params["num_experts"],
        num_fp8_channels=num_channels,
        scaled_row_bytes=scaled_row_bytes,
    )


def _scratch(target: str, avals: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Memory that a CUDA kernel wants XLA to find for the time of the call."""
    if target != "jax_ep_combine":
        return []
    y = avals[0]  # a row per (rank, token)
    return [y.update(shape=(params["num_ranks"], params["num_tokens"], y.shape[1]))]


def _make_primitive(
    target: str,
    shapes: Callable[..., Sequence[Any]],
    on_cpu: Callable[..., Sequence[jax.Array]] | None = None,
) -> Primitive:
    """A primitive that is a custom call; on CPU ``on_cpu``, if it is given."""
    primitive = Primitive(target)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    # Outside jit (an eager shard_map) the primitive is compiled on its own.
    primitive.def_impl(lambda *args, **params: _compiled(primitive, tuple(params.items()))(*args))
    for platform in ("cpu", "cuda"):
        rule: Callable[..., Any] = functools.partial(_lower, target, platform)
        if platform == "cpu" and on_cpu is not None:
            rule = mlir.lower_fun(on_cpu, multiple_results=True)
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(map_calls, primitive)
    return primitive


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


_layout_p = _make_primitive("jax_ep_layout", _layout_shapes)
_dispatch_p = _make_primitive("jax_ep_dispatch", _dispatch_shapes)
_combine_p = _make_primitive("jax_ep_combine", _combine_shapes)
_combine_gradient_p = _make_primitive(
    "jax_ep_combine_gradient", _combine_gradient_shapes, _combine_gradient_on_cpu
)
runtime.register_cuda()
compat.register_cpu_targets("jax_ep_cpu_site", _cpu.state_type(), _cpu.handlers())
compat.after_each_compilation(_cpu.end_program)
