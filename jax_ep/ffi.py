"""The custom calls as JAX primitives: result shapes, attributes, lowering.

Each primitive is one target: ``jax_ep_layout``, ``jax_ep_dispatch`` and ``jax_ep_combine`` on every
platform, ``jax_ep_combine_gradient`` on CUDA, in whose place CPU, and groups across nodes, have a
dispatch and XLA's arithmetic. Across nodes a dispatch that quantises is ``jax_ep_quantize``, which
no other rank takes part in, and one of such rows. ``jax_ep_layout_and_dispatch`` is a call on CPU,
and on CUDA where slots may take it; else it is lowered to the two there. With ``overlap=True`` the
targets for CUDA are called ``jax_ep_layout_overlapped`` and so on.
Operand and result order is that of xla_ffi/calls.h; on CPU the device's coordinates
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

from jax_ep import (
    _cpu,
    across_nodes,
    compat,
    group,
    limits,
    nodes,
    nvshmem,
    overlap,
    runtime,
    unsplit,
)
from jax_ep.batching import map_calls
from jax_ep.layout import Layout

FP8 = jnp.float8_e4m3fn

Rows = tuple[jax.Array, jax.Array | None, jax.Array | None]  # tokens, scales and weights

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


class LayoutSizes(NamedTuple):
    """Static sizes of a layout: fields of ``jax_ep.Layout``, and attributes of the call."""

    axis_name: tuple[str, ...]
    num_ranks: int
    num_experts: int
    capacity: int
    expert_alignment: int
    expert_capacity: int  # 0: the experts share the capacity
    num_sms: int
    overlap: bool


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

# The last of these, and those that programs may leave unused: all of one axis.
_JOINED_TABLES = range(len(OPERAND_TABLES) - 1, len(LayoutTables._fields))


def bind_layout(topk_idx: jax.Array, sizes: LayoutSizes) -> LayoutTables:
    """Calls ``jax_ep_layout`` on this shard's ids, int32 [T, K]."""
    num_tokens, top_k = topk_idx.shape
    return LayoutTables(
        *_layout_p.bind(topk_idx, num_tokens=num_tokens, top_k=top_k, **sizes._asdict())
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
        "overlap": layout.overlap,
    }


def _given(*operands: jax.Array | None) -> list[jax.Array]:
    return [operand for operand in operands if operand is not None]


def _rows(results: Sequence[jax.Array], form: RowForm, has_weights: bool) -> Rows:
    """A dispatch's results by what they are."""
    scales = results[1] if form.has_scales else None
    return results[0], scales, results[-1] if has_weights else None


def bind_dispatch(
    x: jax.Array,
    layout: Layout,
    x_scales: jax.Array | None,
    topk_weights: jax.Array | None,
    form: RowForm,
) -> Rows:
    """Calls ``jax_ep_dispatch``; returns tokens [C, H], scales [C, S] and weights [C].

    Without ``form.expand`` tokens and scales have a row per (rank, token), and one of zeros.
    """
    has_weights = topk_weights is not None
    results = _dispatch_p.bind(
        x,
        *_tables(layout),
        *_given(x_scales, topk_weights),
        **_sizes(layout),
        zero_tail=layout.zero_tail,
        has_weights=has_weights,
        **form._asdict(),
    )
    return _rows(results, form, has_weights)


def bind_layout_and_dispatch(
    x: jax.Array,
    topk_idx: jax.Array,
    x_scales: jax.Array | None,
    topk_weights: jax.Array | None,
    sizes: LayoutSizes,
    form: RowForm,
    *,
    zero_tail: bool,
) -> tuple[LayoutTables, Rows]:
    """Calls ``jax_ep_layout_and_dispatch``; returns what the two calls do."""
    num_tokens, top_k = topk_idx.shape
    has_weights = topk_weights is not None
    results = _layout_and_dispatch_p.bind(
        x,
        topk_idx,
        *_given(x_scales, topk_weights),
        **sizes._asdict(),
        num_tokens=num_tokens,
        top_k=top_k,
        zero_tail=zero_tail,
        has_weights=has_weights,
        **form._asdict(),
    )
    num_tables = len(LayoutTables._fields)
    return LayoutTables(*results[:num_tables]), _rows(results[num_tables:], form, has_weights)


def bind_received(
    x: jax.Array,
    layout: Layout,
    x_scales: jax.Array | None,
    topk_weights: jax.Array | None,
    form: RowForm,
    rows: Rows,
) -> Rows:
    """``rows``, which came with ``layout``; where they are recomputed and it is saved, a dispatch.

    The other arguments are those of ``bind_dispatch``.
    """
    has_weights = topk_weights is not None
    results = _received_p.bind(
        x,
        *_tables(layout),
        *_given(x_scales, topk_weights),
        *_given(*rows),
        **_sizes(layout),
        zero_tail=layout.zero_tail,
        has_weights=has_weights,
        **form._asdict(),
    )
    return _rows(results, form, has_weights)


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
        *_given(weights, values),
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


def _layout_and_dispatch_shapes(x: Any, topk_idx: Any, *rest: Any, **params: Any) -> Sequence[Any]:
    tables = _layout_shapes(topk_idx, **params)
    operands = (topk_idx, *tables[: len(OPERAND_TABLES)], *rest)
    return [*tables, *_dispatch_shapes(x, *operands, **params)]


def _received_shapes(*operands: Any, **params: Any) -> Sequence[Any]:
    return operands[_num_dispatch_operands(**params) :]


def _num_dispatch_operands(*, has_weights: bool, quantization: int, **_: Any) -> int:
    return 2 + len(OPERAND_TABLES) + has_weights + (quantization == GIVEN_SCALES)


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


def _weighted_dispatch(
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


_combine_gradient_by_dispatch = mlir.lower_fun(_weighted_dispatch, multiple_results=True)


def _combine_gradient_on_cuda(ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    """One kernel on one node; across nodes as on CPU."""
    target, num_ranks = _combine_gradient_p.name, params["num_ranks"]
    if _ranks_per_node(target, ctx, params["axis_name"], params) < num_ranks:
        lowered: Sequence[Any] = _combine_gradient_by_dispatch(ctx, *operands, **params)
        return lowered
    return _lower(target, "cuda", ctx, *operands, **params)


def _params_of_two(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a layout_and_dispatch, what the layout and the dispatch have of its parameters."""
    of_rows = {*RowForm._fields, "has_weights", "zero_tail"}
    of_layout = {"expert_alignment", "expert_capacity"}
    return (
        {name: value for name, value in params.items() if name not in of_rows},
        {name: value for name, value in params.items() if name not in of_layout},
    )


def _in_slots(params: dict[str, Any], crosses_nodes: bool) -> bool:
    """Whether a call for CUDA may go through slots: static, and the same on all ranks.

    Its handler still goes another way, or for layout_and_dispatch makes two calls of it, where the
    slots are too small; across nodes it refuses to quantise rows then.
    """
    sizes = {name: params[name] for name in ("num_ranks", "num_tokens", "top_k")}
    quantization = params.get("quantization", NO_QUANTIZATION)
    has_slots = runtime.has_slots()
    if crosses_nodes:
        quantises = quantization not in (NO_QUANTIZATION, GIVEN_SCALES)
        has_slots = runtime.has_network_slots(quantises)
    return has_slots and limits.may_fit_slots(**sizes)


def _layout_and_dispatch_on_cuda(ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    target, num_ranks = _layout_and_dispatch_p.name, params["num_ranks"]
    crosses_nodes = _ranks_per_node(target, ctx, params["axis_name"], params) < num_ranks
    if _in_slots(params, crosses_nodes):
        return _lower(target, "cuda", ctx, *operands, **params)
    checked = _checked(_layout_and_dispatch_p.name, "cuda", ctx, operands, params)
    x, topk_idx, *rest = checked
    x_type, topk_idx_type, *rest_types = ctx.avals_in
    of_layout, of_dispatch = _params_of_two(params)
    num_tables = len(LayoutTables._fields)
    table_types, row_types = ctx.avals_out[:num_tables], ctx.avals_out[num_tables:]
    layout_ctx = ctx.replace(avals_in=[topk_idx_type], avals_out=table_types)
    tables = _lower_call(_layout_p.name, "cuda", layout_ctx, topk_idx, **of_layout)
    num_tables = len(OPERAND_TABLES)
    dispatch_ctx = ctx.replace(
        avals_in=[x_type, topk_idx_type, *table_types[:num_tables], *rest_types],
        avals_out=row_types,
    )
    on_layout = (topk_idx, *tables[:num_tables])
    rows = _lower_dispatch_on_cuda(dispatch_ctx, x, *on_layout, *rest, **of_dispatch)
    return [*tables, *rows]


def _dispatch_on_cuda(ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    checked = _checked(_dispatch_p.name, "cuda", ctx, operands, params)
    return _lower_dispatch_on_cuda(ctx, *checked, **params)


def _lower_dispatch_on_cuda(ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    """One call; across nodes rows that it would quantise come to it, and from it, with scales."""
    target, num_ranks = _dispatch_p.name, params["num_ranks"]
    call = functools.partial(_lower_call, target, "cuda")
    form = RowForm(*(params[name] for name in RowForm._fields))
    if form.quantization in (NO_QUANTIZATION, GIVEN_SCALES):
        return call(ctx, *operands, **params)
    if _ranks_per_node(target, ctx, params["axis_name"], params) == num_ranks:
        return call(ctx, *operands, **params)
    num_first = 2 + len(OPERAND_TABLES)  # x, topk_idx and the tables
    x, *on_layout = operands[:num_first]
    x_type, *layout_types = ctx.avals_in[:num_first]
    power_of_two = form.quantization == QUANTIZATIONS["power_of_two"]
    types, quantized = across_nodes.quantize(ctx, x_type, x, params["num_sms"], power_of_two)
    given = params | {"quantization": GIVEN_SCALES, "dequantize": False}
    arguments = (quantized[0], *on_layout, quantized[1], *operands[num_first:])
    argument_types = [types[0], *layout_types, types[1], *ctx.avals_in[num_first:]]
    row_types = _dispatch_shapes(*argument_types, **given)
    rows = call(ctx.replace(avals_in=argument_types, avals_out=row_types), *arguments, **given)
    if not form.dequantize:
        return rows
    tokens = across_nodes.dequantize(
        ctx.replace(avals_in=row_types[:2], avals_out=ctx.avals_out[:1]), *rows[:2]
    )
    return [*tokens, *rows[2:]]


def _map_layout_and_dispatch(
    operands: Sequence[Any], dims: Sequence[int | None], **params: Any
) -> tuple[Sequence[Any], Sequence[int | None]]:
    """The batching rule: ids that are not mapped have one layout for all rows."""
    (x, topk_idx, *rest), (x_dim, topk_idx_dim, *rest_dims) = operands, dims
    if topk_idx_dim is not None:
        return map_calls(_layout_and_dispatch_p, operands, dims, **params)
    of_layout, of_dispatch = _params_of_two(params)
    tables = _layout_p.bind(topk_idx, **of_layout)
    on_layout = (topk_idx, *tables[: len(OPERAND_TABLES)])
    rows, row_dims = map_calls(
        _dispatch_p,
        (x, *on_layout, *rest),
        (x_dim, *(None for _ in on_layout), *rest_dims),
        **of_dispatch,
    )
    return [*tables, *rows], [None] * len(tables) + row_dims


def _as_layout(equation: Any, used: Sequence[bool]) -> Any:
    """Of an equation of ``_layout_and_dispatch_p``, the layout alone if no rows are used."""
    num_tables = len(LayoutTables._fields)
    if any(used[num_tables:]):
        return equation
    _, topk_idx, *_ = equation.invars
    of_layout, _ = _params_of_two(equation.params)
    return equation.replace(
        primitive=_layout_p,
        invars=[topk_idx],
        outvars=equation.outvars[:num_tables],
        params=of_layout,
    )


def _as_dispatch(equation: Any) -> Any:
    """Of an equation of ``_received_p``, the dispatch that gives the same rows."""
    operands = equation.invars[: _num_dispatch_operands(**equation.params)]
    return equation.replace(primitive=_dispatch_p, invars=operands)


def _lower(target: str, platform: str, ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    checked = _checked(target, platform, ctx, operands, params)
    return _lower_call(target, platform, ctx, *checked, **params)


def _checked(
    target: str, platform: str, ctx: Any, operands: Sequence[Any], params: dict[str, Any]
) -> Sequence[Any]:
    """The operands of a call that is lowered, if it may be."""
    if platform == "cuda":
        _check_limits_of_cuda(target, ctx.avals_in, params)
    automatic = compat.automatic_axes(ctx)
    return unsplit.require(ctx, _VERBS[target], automatic, operands) if automatic else operands


def _lower_call(
    target: str, platform: str, ctx: Any, *operands: Any, **params: Any
) -> Sequence[Any]:
    axis_name, overlaps = params.pop("axis_name"), params.pop("overlap")
    overlap.require_agreement(ctx, _VERBS[target], overlaps)
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
        _check_nodes_of_cuda(target, ctx, axis_name, params)
        runtime.require_cuda(target, overlaps)
        results += _scratch(target, ctx.avals_in, params)
    attributes = {name: np.int64(value) for name, value in params.items()}
    asynchronous = overlaps and platform == "cuda"
    rule = jax.ffi.ffi_lowering(overlap.target(target) if asynchronous else target)
    handler_ctx = ctx.replace(avals_in=operand_types, avals_out=results)

    def call(*operands: Any) -> Sequence[Any]:
        lowered: Sequence[Any] = rule(handler_ctx, *operands, **members.attributes, **attributes)
        return lowered[: len(ctx.avals_out)]

    if not asynchronous:
        return call(*values)
    joined = _JOINED_TABLES if target in (_layout_p.name, _layout_and_dispatch_p.name) else ()
    return overlap.lower(ctx, target, call, values, joined)


_VERBS = {
    "jax_ep_layout": "jax_ep.make_layout",
    "jax_ep_dispatch": "jax_ep.dispatch",
    "jax_ep_layout_and_dispatch": "jax_ep.layout_and_dispatch",
    "jax_ep_combine": "jax_ep.combine",
    "jax_ep_combine_gradient": "jax_ep.combine's gradient",
}


def _ranks_per_node(
    target: str, ctx: Any, axis_name: tuple[str, ...], params: dict[str, Any]
) -> int:
    """Of the group that a call for CUDA is lowered for; R where nothing crosses the network."""
    num_ranks: int = params["num_ranks"]
    if not nvshmem.is_running() and nodes.chosen() is not None:
        return num_ranks  # it is for the order of sums alone
    return nodes.ranks_per_node(ctx, axis_name, num_ranks, _VERBS[target])


def _check_nodes_of_cuda(
    target: str, ctx: Any, axis_name: tuple[str, ...], params: dict[str, Any]
) -> None:
    verb, num_ranks = _VERBS[target], params["num_ranks"]
    ranks_per_node = _ranks_per_node(target, ctx, axis_name, params)
    order = params.get("ranks_per_node", ranks_per_node)
    if ranks_per_node < num_ranks and nvshmem.is_running():
        has_slots = target in (_layout_and_dispatch_p.name, _combine_p.name)
        in_slots = has_slots and _in_slots(params, crosses_nodes=True)
        across_nodes.check(verb, target == _layout_p.name, in_slots, ranks_per_node, params)
    elif order != num_ranks or ranks_per_node != num_ranks:
        raise NotImplementedError(
            f"{verb}: a group of {num_ranks} ranks with {min(order, ranks_per_node)} on each node "
            "is for CPU only, where there is no network (jax_ep.initialize(network=True)): on CUDA "
            "the group then lies on one node. Make the mesh axes of axis_name smaller, or, where "
            f"the ranks are on one node, pass ranks_per_node={num_ranks} to jax_ep.initialize, or "
            "to dataclasses.replace where the layout has its own"
        )


def _check_limits_of_cuda(target: str, avals: Sequence[Any], params: dict[str, Any]) -> None:
    quantization = params.get("quantization", NO_QUANTIZATION)
    num_channels, scaled_row_bytes = None, None
    if quantization == GIVEN_SCALES:
        first = 0 if target == "jax_ep_layout_and_dispatch" else len(OPERAND_TABLES)
        scaled_row_bytes = avals[0].shape[1] + 4 * avals[2 + first].shape[1]
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
    y = avals[0]
    if params["ranks_per_node"] < params["num_ranks"]:
        sizes = {n: params[n] for n in ("num_ranks", "ranks_per_node", "num_tokens", "top_k")}
        row_bytes, has_values = y.shape[1] * y.dtype.itemsize, params["has_values"]
        num_bytes = _cpu.combine_scratch_bytes(**sizes, row_bytes=row_bytes, has_values=has_values)
        return [y.update(shape=(num_bytes,), dtype=jnp.dtype(jnp.uint8), weak_type=False)]
    # A row per (rank, token).
    return [y.update(shape=(params["num_ranks"], params["num_tokens"], y.shape[1]))]


def _make_primitive(
    target: str,
    shapes: Callable[..., Sequence[Any]],
    **others: Callable[..., Any],
) -> Primitive:
    """A primitive that is a custom call on each platform, but for those with a rule in ``others``.

    ``others`` are lowering rules by platform.
    """
    primitive = Primitive(target)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    # Outside jit (an eager shard_map) the primitive is compiled on its own.
    primitive.def_impl(lambda *args, **params: _compiled(primitive, tuple(params.items()))(*args))
    for platform in ("cpu", "cuda"):
        rule = others.get(platform) or functools.partial(_lower, target, platform)
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = functools.partial(map_calls, primitive)
    return primitive


@functools.cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


_layout_p = _make_primitive("jax_ep_layout", _layout_shapes)
_dispatch_p = _make_primitive("jax_ep_dispatch", _dispatch_shapes, cuda=_dispatch_on_cuda)
_combine_p = _make_primitive("jax_ep_combine", _combine_shapes)
_combine_gradient_p = _make_primitive(
    "jax_ep_combine_gradient",
    _combine_gradient_shapes,
    cpu=_combine_gradient_by_dispatch,
    cuda=_combine_gradient_on_cuda,
)
_layout_and_dispatch_p = _make_primitive(
    "jax_ep_layout_and_dispatch", _layout_and_dispatch_shapes, cuda=_layout_and_dispatch_on_cuda
)
batching.primitive_batchers[_layout_and_dispatch_p] = _map_layout_and_dispatch
compat.replace_where_unused(_layout_and_dispatch_p, _as_layout)


def _pass_on(_ctx: Any, *operands: Any, **params: Any) -> Sequence[Any]:
    return operands[_num_dispatch_operands(**params) :]


_received_p = _make_primitive("jax_ep_received", _received_shapes, cpu=_pass_on, cuda=_pass_on)
compat.replace_where_recomputed(_received_p, "jax_ep_layout", _as_dispatch)
runtime.register_cuda()
compat.register_cpu_targets("jax_ep_cpu_site", _cpu.state_type(), _cpu.handlers())
compat.after_each_compilation(_cpu.end_program)
