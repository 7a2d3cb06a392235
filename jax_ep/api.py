"""The verbs: make_layout, dispatch, the two in one call, combine, and moe, all of a layer.

All are per-shard functions: call them inside ``jax.shard_map`` over a mesh that has ``axis_name``.
Letters: T tokens on this rank, H hidden size, K experts per token, E experts, R ranks of the EP
group, L = E / R experts per rank (expert e lives on rank e // L), C capacity in rows, A expert
alignment, M room of an expert in rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jax_ep import autodiff, batching, checks, compat, ffi, id_check
from jax_ep.checks import ScaleFormat
from jax_ep.group import AxisName
from jax_ep.layout import Layout

Array = jax.Array


class _Unweighted:
    """The default of ``combine``'s weights, which is not None: that stands for forgotten ones."""

    def __repr__(self) -> str:
        return "<none>"


_UNWEIGHTED: Any = _Unweighted()


class Dispatched(NamedTuple):
    """What a rank received, in expert order, or tokens in source order (``expand=False``).

    Attributes:
        tokens: [C, H], the rows. Alignment padding is zero; the tail beyond the last group is zero
            unless the layout says ``zero_tail=False``. With ``expand=False`` [R * T + 1, H].
        weights: float32 [C], the routing weight of each expert row (0 on padding), or None.
        scales: float32 [C, S], a row for each of tokens, if ``dispatch`` quantised them (then S is
            ceil(H / 128)) or was given some; else None. Zero where tokens are.
        group_sizes: int32 [L], rows per local expert: the layout's.
    """

    tokens: Array
    weights: Array | None
    scales: Array | None
    group_sizes: Array


def make_layout(
    topk_idx: Array,
    *,
    num_experts: int,
    axis_name: AxisName,
    capacity: int | None = None,
    expert_alignment: int = 1,
    expert_capacity: int | None = None,
    zero_tail: bool = True,
    num_sms: int | None = None,
    overlap: bool = False,
    check_ids: bool = False,
) -> Layout:
    """Exchanges the routing and says where every row goes.

    Rows are ordered by expert, then source rank, token, k: results are bitwise reproducible. Local
    expert e with n[e] rows takes p[e] = n[e] rounded up to A, from o[e] = p[0] + .. + p[e - 1]
    on; its row i is kept if o[e] + i < C. What does not fit is dropped and counted: it adds nothing
    to ``combine`` and has zero gradient.

    With ``expert_capacity`` M each expert has M rows of its own instead: o[e] = e * M, row i is
    kept if i < M, C = L * M and all group sizes are M. ``recv.tokens.reshape(L, M, H)`` is then the
    operand of a batched matrix product; rows that no token has are zero, as padding always is.

    Works under jit, scan and checkpoint (its arrays carry the name ``jax_ep_layout``: a policy that
    saves it spares recomputation the exchange). Integers only, so no gradient. vmap maps calls one
    after the other. No operand is donated.

    Args:
        topk_idx: int32 [T, K], expert ids. -1 routes nowhere; any other id outside [0, E) routes
            nowhere and is counted in ``num_invalid``, which is 0 in a sound program; a process
            says so once on stderr. The same expert twice in a token makes two rows. Ids that are
            the same on all ranks (tokens replicated over the EP axes, which every rank then sends
            and computes) give a UserWarning, where ``shard_map`` has ``check_vma=True``.
        num_experts: E, the width of the router: a multiple of R and at least K. Where the router's
            width is not, the experts are padded: the error says by how many.
        axis_name: the mesh axis of the EP group, or a tuple of axes (row-major).
        capacity: C, rows to receive at most, a multiple of A. Default:
            ``(R*T*min(K, L) + L*(A-1)) // A * A``, which cannot overflow while a token's experts
            are distinct; ``jax_ep.capacity`` computes tighter ones.
        expert_alignment: A; each expert's rows start at a multiple of it.
        expert_capacity: M, a multiple of A, in place of ``capacity``: the same room for every
            expert. ``jax_ep.expert_capacity`` computes one.
        zero_tail: zero the rows beyond the last group (in ``dispatch``, and in the gradient of
            ``combine``). False leaves them unspecified, for experts that never read them.
        num_sms: streaming multiprocessors that this call and every operation on the layout may use
            on a GPU, so that other work can run beside them; the same on all ranks. None: all,
            with ``overlap`` 24. Results do not depend on it, and on CPU it has no effect.
        overlap: on GPUs, let this call and every operation on the layout, backward passes included,
            run beside computation that does not depend on them: of another micro-batch, say.
            Results do not depend on it, and on CPU it has no effect. All layouts of a program
            have the same; ``num_sms`` is then at most 64. See docs/overlap.md.
        check_ids: for debugging: ids that are neither -1 nor in [0, E) end the program with a
            JaxRuntimeError whose text names the ranks, how many ids and what range. It costs a
            collective over the whole mesh and a callback to the host in every call; a program with
            callbacks is not kept in the persistent compilation cache and cannot be exported.

    Returns:
        The layout, for ``dispatch`` and ``combine`` over the same axes.

    Raises:
        ValueError: a size or the axis does not fit, or both capacities are given; the message names
            it. R * T * K + E * A and C are at most 2**31 - 2**20. For CUDA, when it is lowered: K
            is at most 32, E 1024, R 72. When it is lowered: another layout of the program has
            another ``overlap``. When it is compiled: the compiler has split an operand.
        TypeError: ``topk_idx`` is not int32.
        NotImplementedError: ``shard_map`` leaves an Explicit axis, or with ``check_ids`` or over an
            abstract mesh any axis, to the compiler.
    """
    where = "jax_ep.make_layout"
    topk_idx, sizes = checks.routing(
        where,
        topk_idx,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        expert_alignment=expert_alignment,
        expert_capacity=expert_capacity,
        num_sms=num_sms,
        overlap=overlap,
    )
    zero_tail = checks.static_bool(where, "zero_tail", zero_tail)
    with jax.named_scope(where):
        topk_idx = _ids_of_ranks(where, topk_idx, sizes, check_ids=check_ids)
        return _layout_of(topk_idx, sizes, ffi.bind_layout(topk_idx, sizes), zero_tail)


def dispatch(
    x: Array,
    layout: Layout,
    topk_weights: Array | None = None,
    *,
    fp8: ScaleFormat | None = None,
    dequantize: bool = False,
    expand: bool = True,
    scales: Array | None = None,
) -> Dispatched:
    """Sends each token's row to the ranks of its experts.

    Rows are copies, bit for bit. A row crosses a link once per destination rank, not once per
    expert. Gradients: dx[t] is the sum of the cotangents of t's kept rows (``combine`` without
    weights); d topk_weights[t, k] is the cotangent of that row's weight, 0 if dropped. Works under
    jit, grad (of any order), scan and checkpoint (tokens and weights carry the name
    ``jax_ep_dispatch``). vmap maps calls one after the other.

    Args:
        x: [T, H], bfloat16, float16, float32; or float8_e4m3fn, float8_e5m2 or an integer type of
            at least 8 bits, which have no gradient (that of ``topk_weights`` is as ever). A row
            must be a multiple of 16 bytes. Narrower types go two or more to a byte, see
            docs/guide.md.
        layout: from ``make_layout`` over the same axes, on T tokens.
        topk_weights: [T, K], cast to float32; they travel with the rows.
        fp8: quantise rows to float8_e4m3fn on the way, with one float32 scale per 128 channels (the
            last block may be shorter): "float32" scales are amax / 448, "power_of_two" ones are
            rounded up to a power of two. amax is at least 2**-100; H must be a multiple of 16, on
            GPUs at most 32768. Tokens and scales come out as they are, for inference:
            differentiating through them raises TypeError.
        dequantize: with ``fp8``: tokens come out in x's type again, multiplied by their scales,
            and the gradient is that of the exact dispatch (straight through).
        expand: False for one row per (token, rank) instead of one per (token, k), for grouped
            GEMMs that gather their rows: tokens [R * T + 1, H], in which row s * T + t is token t
            of rank s if any of its rows was kept here; ``tokens[layout.row_token]`` are the rows
            of ``expand=True``. The last row is zero, which padding and tail point to; so are rows
            of tokens that have none here, unless the layout says ``zero_tail=False``. Then dx[t]
            is the sum of the cotangents of t's rows over ranks; weights are by expert row as ever.
        scales: of x that is float8 already: float32 [T, S], S a divisor of H or ceil(H / 128). Rows
            and scales are passed on bit for bit, the scales as ``Dispatched.scales``; on GPUs
            H + 4 * S is at most 49152. For inference: differentiating through x or scales raises
            TypeError, which says how to train.

    Returns:
        Tokens [C, H], weights [C], scales [C, S] and the layout's group sizes; with
        ``expand=False`` tokens [R * T + 1, H] and scales [R * T + 1, S].

    Raises:
        ValueError: a shape, the layout's group or an option does not fit. When it is compiled: the
            compiler has split an operand over an axis that ``shard_map`` leaves to it.
        TypeError: a dtype is not supported, or rows without a gradient were differentiated.
        NotImplementedError: as in ``make_layout``.
    """
    where = "jax_ep.dispatch"
    num_tokens, top_k = checks.check_layout(where, layout)
    x, scales, topk_weights, form = checks.rows_to_send(
        where,
        x,
        topk_weights,
        ids_shape=(num_tokens, top_k),
        made_of=f"the layout ({checks.describe(layout)}) was made",
        fp8=fp8,
        dequantize=dequantize,
        expand=expand,
        scales=scales,
    )
    with jax.named_scope(where):
        varying, x, scales, topk_weights = _vary_together(layout, x, scales, topk_weights)
        rows = autodiff.dispatch(varying, x, scales, topk_weights, form)
        return _dispatched(layout, rows)


def layout_and_dispatch(
    x: Array,
    topk_idx: Array,
    topk_weights: Array | None = None,
    *,
    num_experts: int,
    axis_name: AxisName,
    capacity: int | None = None,
    expert_alignment: int = 1,
    expert_capacity: int | None = None,
    zero_tail: bool = True,
    num_sms: int | None = None,
    overlap: bool = False,
    check_ids: bool = False,
    fp8: ScaleFormat | None = None,
    dequantize: bool = False,
    expand: bool = True,
    scales: Array | None = None,
) -> tuple[Layout, Dispatched]:
    """``make_layout`` and ``dispatch`` in one call: ids and rows cross together.

    What comes is what the two give in a row, to the bit. Where a rank has few tokens, as in
    decoding, calls cost what it takes to meet the other ranks: here they meet once, not twice. On
    GPUs that is so where the call fits slots (``initialize``); else it is the two calls.

    Gradients are those of ``dispatch``, and need no exchange but rows. Works under jit, grad (of
    any order), scan and checkpoint; the arrays carry the names that they have from the two calls,
    and under a policy that saves ``jax_ep_layout`` recomputation is a ``dispatch`` with the layout,
    under one that saves ``jax_ep_dispatch`` alone a ``make_layout``. vmap maps calls one after the
    other. No operand is donated.

    Args:
        x: [T, H], as in ``dispatch``.
        topk_idx: int32 [T, K], as in ``make_layout``. Every rank takes part in each call: one
            without tokens passes -1.
        topk_weights: [T, K], as in ``dispatch``.
        num_experts: as in ``make_layout``.
        axis_name: as in ``make_layout``.
        capacity: as in ``make_layout``.
        expert_alignment: as in ``make_layout``.
        expert_capacity: as in ``make_layout``.
        zero_tail: as in ``make_layout``.
        num_sms: as in ``make_layout``.
        overlap: as in ``make_layout``.
        check_ids: as in ``make_layout``.
        fp8: as in ``dispatch``.
        dequantize: as in ``dispatch``.
        expand: as in ``dispatch``.
        scales: as in ``dispatch``.

    Returns:
        The layout, for ``combine`` and further ``dispatch``; and what was received. What
        ``dataclasses.replace`` changes of the layout is not so for the gradient of these rows.

    Raises:
        ValueError: as the two do.
        TypeError: as the two do.
        NotImplementedError: as the two do.
    """
    where = "jax_ep.layout_and_dispatch"
    topk_idx, sizes = checks.routing(
        where,
        topk_idx,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        expert_alignment=expert_alignment,
        expert_capacity=expert_capacity,
        num_sms=num_sms,
        overlap=overlap,
    )
    x, scales, topk_weights, form = checks.rows_to_send(
        where,
        x,
        topk_weights,
        ids_shape=topk_idx.shape,
        made_of="topk_idx has ids",
        fp8=fp8,
        dequantize=dequantize,
        expand=expand,
        scales=scales,
    )
    zero_tail = checks.static_bool(where, "zero_tail", zero_tail)
    with jax.named_scope(where):
        topk_idx = _ids_of_ranks(where, topk_idx, sizes, check_ids=check_ids)
        # The ids, and so the layout, may vary over fewer axes than the rows.
        _, x, scales, topk_weights = _vary_together(topk_idx, x, scales, topk_weights)
        tables, rows = autodiff.layout_and_dispatch(
            topk_idx, x, scales, topk_weights, sizes, form, zero_tail=zero_tail
        )
        layout = _layout_of(topk_idx, sizes, tables, zero_tail)
        varying, x, scales, topk_weights = _vary_together(layout, x, scales, topk_weights)
        rows = autodiff.received(varying, x, scales, topk_weights, rows, form)
        return layout, _dispatched(layout, rows)


def combine(y: Array, layout: Layout, weights: Array | None = _UNWEIGHTED) -> Array:
    """Brings the experts' rows back to their tokens and adds them up.

    out[t] = round(sum over ranks r ascending of round(sum over t's kept rows on r, in k order, of
    weights * y)). Products and sums are float32, each rounded on its own; round is to y's type. A
    token without a kept row gives 0. The inner sum is formed on the expert's rank, so a row crosses
    a link once per (token, rank), and results are the same bits on every backend.

    Where ranks lie on several nodes, a node's ranks are summed and rounded before
    nodes are, both ascending; one node, or a rank on each, is as above, to the bit. How many ranks
    a node has is settled when the program is lowered, since a trace does not know the devices:
    ``layout.ranks_per_node``, if it is set, else what ``initialize`` was told, else the hosts of
    the mesh's devices, on each of which every group must have as many ranks, one after the other
    along ``axis_name``. The program carries the number, like the groups' devices: jit keeps it, a
    persistent cache finds only its like, an exported program has the same order, so the same bits,
    wherever it is loaded (over an abstract mesh that of one node, if nothing else was said), and
    processes that differ in it get an error. See docs/multi_node.md.

    Gradients: dy[row] = weights[row] * g[t(row)]; d weights[row] = <y[row], g[t(row)]> in float32,
    both 0 on padding. On GPUs one call forms both while rows arrive. On CPU, and where a row of y
    is longer than 40 KiB, they are XLA's own arithmetic, which on CPU flushes subnormal products to
    zero. Without weights y is not kept for the backward pass. Works under jit, grad (of any order),
    scan and checkpoint (the result carries the name ``jax_ep_combine``). vmap maps calls one after
    the other.

    Args:
        y: [C, H'], bfloat16, float16 or float32; its type and width may differ from x's. A row must
            be a multiple of 16 bytes. Padding and tail are never read.
        layout: the layout that dispatched the rows. One of axes that the enclosing
            shard_map does not have, of another number of ranks or another capacity is refused; y
            of another layout that agrees in these, also over other axes of the mesh, is not
            recognised, for rows do not say where they come from.
        weights: [C], cast to float32, what ``dispatch`` returned as ``Dispatched.weights``. Left
            out, rows are summed as they are. None, which ``dispatch`` returns if it was not given
            ``topk_weights``, is an error: the router would get no gradient.

    Returns:
        [T, H'] in y's type.

    Raises:
        ValueError: a shape or the layout's group does not fit. When it is lowered: the ranks do not
            lie on nodes evenly. When it is compiled: as in ``dispatch``.
        TypeError: a dtype is not supported.
        NotImplementedError: as in ``make_layout``; for CUDA, what docs/multi_node.md says is not
            there for a group on several nodes.
    """
    where = "jax_ep.combine"
    checks.check_layout(where, layout)
    y = _experts_rows(where, "y", y, layout)
    if weights is None:
        raise ValueError(
            f"{where}: weights is None, which dispatch returns if it was not given topk_weights: "
            "pass them to dispatch, or leave weights out for a sum without weights"
        )
    if weights is _UNWEIGHTED:
        weights = None
    else:
        weights = checks.as_float32(
            where,
            "weights",
            weights,
            (layout.capacity,),
            "pass recv.weights, what dispatch returned",
        )
    with jax.named_scope(where):
        layout, y, weights = _vary_together(layout, y, weights)
        out = autodiff.combine(layout, y, weights)
        named: Array = checkpoint_name(out, "jax_ep_combine")
        return named


def moe(
    x: Array,
    topk_idx: Array,
    topk_weights: Array,
    expert_fn: Callable[[Array, Array], Array],
    *,
    num_experts: int,
    axis_name: AxisName,
    capacity: int | None = None,
    expert_alignment: int = 1,
    expert_capacity: int | None = None,
    zero_tail: bool = True,
    num_sms: int | None = None,
    overlap: bool = False,
    check_ids: bool = False,
    fp8: ScaleFormat | None = None,
) -> tuple[Array, Layout]:
    """A mixture-of-experts layer: ``layout_and_dispatch``, ``expert_fn``, ``combine``.

    Args:
        x: [T, H], the tokens of this shard.
        topk_idx: int32 [T, K], as in ``make_layout``.
        topk_weights: [T, K], the routing weights, applied in ``combine``.
        expert_fn: takes tokens [C, H] and group_sizes int32 [L], returns [C, H']. With
            ``expert_capacity`` M it may work on ``tokens.reshape(L, M, H)``. What it raises gets a
            note that tells what it was given.
        num_experts: as in ``make_layout``.
        axis_name: as in ``make_layout``.
        capacity: as in ``make_layout``.
        expert_alignment: as in ``make_layout``.
        expert_capacity: as in ``make_layout``.
        zero_tail: as in ``make_layout``.
        num_sms: as in ``make_layout``.
        overlap: as in ``make_layout``.
        check_ids: as in ``make_layout``.
        fp8: as in ``dispatch``, with ``dequantize=True``: fp8 on the wire, x's type for experts.

    Returns:
        out [T, H'], and the layout (for its loads, drops and statistics).

    Raises:
        ValueError: as the three verbs do.
        TypeError: as the three verbs do.
        NotImplementedError: as the three verbs do.
    """
    where = "jax_ep.moe"
    if topk_weights is None:
        raise ValueError(
            f"{where}: topk_weights must be an array [tokens, k]; got None. For a sum without "
            "weights call layout_and_dispatch and combine"
        )
    layout, received = layout_and_dispatch(
        x,
        topk_idx,
        topk_weights,
        num_experts=num_experts,
        axis_name=axis_name,
        capacity=capacity,
        expert_alignment=expert_alignment,
        expert_capacity=expert_capacity,
        zero_tail=zero_tail,
        num_sms=num_sms,
        overlap=overlap,
        check_ids=check_ids,
        fp8=fp8,
        dequantize=fp8 is not None,
    )
    tokens, group_sizes = received.tokens, received.group_sizes
    with jax.named_scope("jax_ep.experts"):
        try:
            y = expert_fn(tokens, group_sizes)
        except Exception as error:
            split = (
                f". Are the experts' weights split over {', '.join(layout.axis_name)}, so that a "
                f"rank has those of {group_sizes.shape[0]} experts?"
            )
            is_about_sizes = any(word in str(error) for word in ("dimension", "shape", "size"))
            error.add_note(
                f"{where}: expert_fn was given tokens {tokens.dtype}{list(tokens.shape)} and "
                f"group_sizes {group_sizes.dtype}{list(group_sizes.shape)}, of a layout with "
                f"{checks.describe(layout)}{split if is_about_sizes else ''}"
            )
            raise
    y = _experts_rows(where, "expert_fn's result", y, layout)
    return combine(y, layout, received.weights), layout


def _experts_rows(where: str, name: str, value: Any, layout: Layout) -> Array:
    """``value``, if it can be what the experts make of the rows of ``layout``."""
    y = checks.as_array(where, name, value)
    if y.dtype.name not in checks.FLOATS:
        raise TypeError(f"{where}: {name} must be one of {', '.join(checks.FLOATS)}; got {y.dtype}")
    rows, _ = checks.matrix_shape(where, name, y, "[capacity, hidden]")
    if rows != layout.capacity:
        remedy = "experts give a row for each row of dispatch with this layout"
        if rows == layout.num_ranks * layout.topk_idx.shape[0] + 1:
            remedy = (
                "these may be a row per token, of expand=False. Experts take and give a row for "
                "each entry of layout.row_token"
            )
        raise ValueError(
            f"{where}: {name} has {rows} rows, but the layout ({checks.describe(layout)}) has "
            f"capacity {layout.capacity}: {remedy}"
        )
    checks.check_row(where, name, y)
    return y


def _ids_of_ranks(where: str, topk_idx: Array, sizes: ffi.LayoutSizes, *, check_ids: bool) -> Array:
    """The ids as they are exchanged: they vary over the EP axes, and are checked if need be."""
    checks.warn_if_replicated(where, topk_idx, sizes.axis_name)
    topk_idx = compat.vary_over(topk_idx, sizes.axis_name)
    if checks.static_bool(where, "check_ids", check_ids):
        topk_idx = id_check.require_valid_ids(where, topk_idx, sizes.num_experts, sizes.axis_name)
    return topk_idx


def _layout_of(
    topk_idx: Array, sizes: ffi.LayoutSizes, tables: ffi.LayoutTables, zero_tail: bool
) -> Layout:
    """The layout that a call has made, under its name for ``jax.checkpoint``."""
    num_recv, num_dropped, num_invalid = (tables.counters[i] for i in range(3))
    layout = Layout(
        topk_idx=topk_idx,
        send_row=tables.send_row,
        recv_src=tables.recv_src,
        recv_order=tables.recv_order,
        recv_offsets=tables.recv_offsets,
        group_sizes=tables.group_sizes,
        expert_counts=tables.expert_counts,
        expert_load=tables.expert_load,
        num_recv=num_recv,
        num_dropped=num_dropped,
        num_invalid=num_invalid,
        axis_name=sizes.axis_name,
        num_ranks=sizes.num_ranks,
        num_experts=sizes.num_experts,
        capacity=sizes.capacity,
        expert_alignment=sizes.expert_alignment,
        expert_capacity=sizes.expert_capacity or None,
        zero_tail=zero_tail,
        num_sms=sizes.num_sms,
        overlap=sizes.overlap,
    )
    named: Layout = jax.tree.map(lambda a: checkpoint_name(a, "jax_ep_layout"), layout)
    return named


def _dispatched(layout: Layout, rows: ffi.Rows) -> Dispatched:
    """What a call has brought, under its name for ``jax.checkpoint``."""
    tokens, scales, weights = jax.tree.map(lambda a: checkpoint_name(a, "jax_ep_dispatch"), rows)
    return Dispatched(tokens, weights, scales, layout.group_sizes)


def _vary_together(others: Any, *arrays: Array | None) -> tuple[Any, ...]:
    """Marks all arrays as varying over the axes of any of them, ``others``' among them.

    Outside the gradient rules, so that JAX itself sums the cotangents of replicated inputs.
    """
    axes = frozenset[str]().union(*map(compat.varying_axes, jax.tree.leaves((others, arrays))))
    others, arrays = jax.tree.map(lambda a: compat.vary_over(a, sorted(axes)), (others, arrays))
    leaves, structure = jax.tree.flatten(arrays)
    mapped = batching.map_together(leaves, jax.tree.leaves(others))
    return others, *jax.tree.unflatten(structure, mapped)
