"""The specification in code: expert-parallel dispatch and combine in NumPy, all ranks at once.

Every backend of `jax_ep` must equal this module, bit for bit where it says so. It is written to be
read, takes the global view (each array has a leading axis over the ranks of the group), and uses
nothing but NumPy and `ml_dtypes` (for bfloat16 and float8_e4m3fn). It does not know how rows
travel.

Letters: R ranks, T tokens per rank, K experts per token (top-k), E experts in all, L = E / R
experts per rank (expert e lives on rank e // L), C receive capacity in rows, A expert alignment,
M room of an expert in rows, H hidden size, N ranks of the group on each node.

The flat source id of choice k of token t on rank r is `(r * T + t) * K + k`; sorting by it is
sorting by source rank, then token, then k.

All arithmetic follows the floating-point state of the calling thread. A Python thread has the IEEE
defaults (round to nearest even, subnormals kept); a thread that flushes subnormals gives other
results.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_ep.reference_checks import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INT32,
    check_dtype,
    check_positive,
    check_shape,
)
from jax_ep.reference_fp8 import QUANTIZATION_GROUP as QUANTIZATION_GROUP
from jax_ep.reference_fp8 import dequantize as dequantize
from jax_ep.reference_fp8 import quantize as quantize

MAX_ROWS = 2**31 - 2**20
"""What rows and padding of a group may come to, and a capacity: they are counted in int32."""

Part = tuple[NDArray[np.bool_], NDArray[Any]]
"""Of a sum: which tokens it has a part of, bool [R, T], and the parts, [R, T, H], rounded."""


# Layout -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ReferenceLayout:
    """Where every row goes, on all ranks. Arrays are int32.

    Attributes:
        topk_idx: [R, T, K] the expert ids as they were given, invalid ones included.
        send_row: [R, T, K] the row at the destination rank (expert // L) where this choice was
            placed; -1 where it is not routed, invalid or dropped.
        recv_src: [R, C] the flat source id of each receive row; -1 on padding and tail.
        recv_order: [R, C] the kept rows of each rank, sorted by flat source id; -1 from num_recv
            on.
        recv_offsets: [R, R * T + 1] where the rows of each (source rank, token) begin in
            recv_order; the last entry is num_recv.
        group_sizes: [R, L] rows of each local expert's group inside the capacity, padding included.
        expert_counts: [R, L] rows routed to each local expert, before drops and without padding.
        expert_load: [R, E] rows routed to each expert by the whole group, before drops; the same on
            every rank.
        num_recv: [R] kept rows, without padding.
        num_dropped: [R] rows routed to this rank that did not fit.
        num_invalid: [R] this rank's own ids that are neither -1 nor in [0, E).
        num_ranks: R.
        num_tokens: T.
        top_k: K.
        num_experts: E.
        capacity: C.
        expert_alignment: A.
        expert_capacity: M where every expert has the same room, else None.
        zero_tail: whether rows beyond the last group have a specified value, zero.
        ranks_per_node: N, a divisor of R: ranks n * N and so on are node n. R is one node.
    """

    topk_idx: NDArray[np.int32]
    send_row: NDArray[np.int32]
    recv_src: NDArray[np.int32]
    recv_order: NDArray[np.int32]
    recv_offsets: NDArray[np.int32]
    group_sizes: NDArray[np.int32]
    expert_counts: NDArray[np.int32]
    expert_load: NDArray[np.int32]
    num_recv: NDArray[np.int32]
    num_dropped: NDArray[np.int32]
    num_invalid: NDArray[np.int32]
    num_ranks: int
    num_tokens: int
    top_k: int
    num_experts: int
    capacity: int
    expert_alignment: int
    expert_capacity: int | None
    zero_tail: bool
    ranks_per_node: int

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Which choices have a row at their expert, bool [R, T, K]."""
        return self.send_row >= 0

    @property
    def row_valid(self) -> NDArray[np.bool_]:
        """Which receive rows hold a token (not padding, not tail), bool [R, C]."""
        return self.recv_src >= 0

    @property
    def row_token(self) -> NDArray[np.int32]:
        """The row of each receive row's token in `dispatch` with expand=False, int32 [R, C].

        Source rank * T + token; R * T, the row of zeros, on padding and tail.
        """
        no_token = self.num_ranks * self.num_tokens
        return np.where(self.row_valid, self.recv_src // self.top_k, np.int32(no_token))


def default_capacity(
    num_tokens: int, top_k: int, num_ranks: int, num_experts: int, expert_alignment: int
) -> int:
    """Returns the capacity that cannot overflow while the experts of each token are distinct.

    Args:
        num_tokens: T, tokens per rank.
        top_k: K, experts per token.
        num_ranks: R.
        num_experts: E, a multiple of R.
        expert_alignment: A.

    Returns:
        C = (R * T * min(K, L) + L * (A - 1)) // A * A, in rows.

    Raises:
        ValueError: a size is below 1, E is not a multiple of R, or K > E.
    """
    _check_sizes(num_tokens, top_k, num_ranks, num_experts, expert_alignment)
    num_local_experts = num_experts // num_ranks
    most_rows = num_ranks * num_tokens * min(top_k, num_local_experts)
    most_padding = num_local_experts * (expert_alignment - 1)
    return (most_rows + most_padding) // expert_alignment * expert_alignment


def make_layout(
    topk_idx: NDArray[np.int32],
    *,
    num_experts: int,
    capacity: int | None = None,
    expert_alignment: int = 1,
    expert_capacity: int | None = None,
    zero_tail: bool = True,
    ranks_per_node: int | None = None,
) -> ReferenceLayout:
    """Places every routed row.

    The rows of a rank are ordered by expert, then source rank, then token, then k. Expert e with
    n[e] rows gets p[e] = n[e] rounded up to a multiple of A, and starts at o[e] = the sum of p over
    the rank's experts before it. Row i of expert e sits at o[e] + i and is kept if that is below C.

    With `expert_capacity` M every expert has room of its own: p[e] = M whatever n[e] is, so
    o[e] = e * M and C = L * M, and row i is kept if i < M. There is no tail.

    Args:
        topk_idx: int32 [R, T, K]. Ids in [0, E), or -1 for "not routed". Any other id is not routed
            either, and is counted in `num_invalid`. An expert that stands twice in a token makes
            two rows.
        num_experts: E, a multiple of R.
        capacity: C, a multiple of A; None for `default_capacity`.
        expert_alignment: A.
        expert_capacity: M, a multiple of A; `capacity` must then be None.
        zero_tail: see `specified_rows`.
        ranks_per_node: N, a divisor of R, for the order in which `combine` and the gradient of
            `dispatch` sum; None for R. No row's place depends on it.

    Returns:
        The layout of all ranks.

    Raises:
        TypeError: topk_idx is not int32.
        ValueError: topk_idx is not [R, T, K] or has an empty axis; E is not a multiple of R; K > E;
            A < 1; C or M is not a positive multiple of A; both are given; R * T * K + E * A or C is
            above `MAX_ROWS`; R is not a multiple of N.
    """
    topk_idx = np.asarray(topk_idx)
    check_dtype("topk_idx", topk_idx.dtype, INT32)
    if topk_idx.ndim != 3:
        raise ValueError(f"topk_idx must be [R, T, K], got shape {topk_idx.shape}")
    num_ranks, num_tokens, top_k = topk_idx.shape
    _check_sizes(num_tokens, top_k, num_ranks, num_experts, expert_alignment)
    num_rows = topk_idx.size + num_experts * expert_alignment
    if num_rows > MAX_ROWS:
        raise ValueError(f"R * T * K + E * A must be at most {MAX_ROWS}, got {num_rows}")
    if ranks_per_node is None:
        ranks_per_node = num_ranks
    if ranks_per_node < 1 or num_ranks % ranks_per_node:
        raise ValueError(
            f"ranks_per_node must divide num_ranks ({num_ranks}), got {ranks_per_node}"
        )
    num_local_experts = num_experts // num_ranks
    if expert_capacity is not None:
        if capacity is not None:
            raise ValueError("capacity must be None with expert_capacity, which says what it is")
        if expert_capacity < 1 or expert_capacity % expert_alignment:
            raise ValueError(
                "expert_capacity must be a positive multiple of expert_alignment "
                f"({expert_alignment}), got {expert_capacity}"
            )
        capacity = num_local_experts * expert_capacity
    elif capacity is None:
        capacity = default_capacity(num_tokens, top_k, num_ranks, num_experts, expert_alignment)
    if capacity < 1 or capacity % expert_alignment:
        raise ValueError(
            "capacity must be a positive multiple of expert_alignment "
            f"({expert_alignment}), got {capacity}"
        )
    if capacity > MAX_ROWS:
        raise ValueError(f"capacity must be at most {MAX_ROWS}, got {capacity}")

    # All routed choices, ordered by (expert, flat source id): flat ids ascend, the sort is stable.
    flat_ids = topk_idx.reshape(-1)
    routed = np.flatnonzero((flat_ids >= 0) & (flat_ids < num_experts))
    source = routed[np.argsort(flat_ids[routed], kind="stable")]
    expert = flat_ids[source]

    # n, p and o of the contract, per rank and local expert.
    load = np.bincount(expert, minlength=num_experts)
    counts = load.reshape(num_ranks, num_local_experts)
    padded = -(-counts // expert_alignment) * expert_alignment
    if expert_capacity is not None:
        padded = np.full_like(counts, expert_capacity)
    offset = np.cumsum(padded, axis=1) - padded
    group_sizes = np.minimum(offset + padded, capacity) - np.minimum(offset, capacity)

    # Row i of expert e sits at o[e] + i, and fits if the group has more than i rows. Its place in
    # `source` is i + the sum of n before e.
    row_in_expert = np.arange(source.size) - (np.cumsum(load) - load)[expert]
    row = offset.reshape(-1)[expert] + row_in_expert
    fits = row_in_expert < group_sizes.reshape(-1)[expert]
    source, expert, row = source[fits], expert[fits], row[fits]

    send_row = np.full(topk_idx.size, -1, np.int32)
    send_row[source] = row
    recv_src = np.full((num_ranks, capacity), -1, np.int32)
    recv_src[expert // num_local_experts, row] = source

    recv_order = np.full((num_ranks, capacity), -1, np.int32)
    for rank in range(num_ranks):
        rows = np.flatnonzero(recv_src[rank] >= 0)
        recv_order[rank, : rows.size] = rows[np.argsort(recv_src[rank, rows])]

    num_recv = np.sum(recv_src >= 0, axis=1)

    # Kept rows of each rank per (source rank, token), summed up.
    recv_offsets = np.zeros((num_ranks, num_ranks * num_tokens + 1), np.int32)
    for rank in range(num_ranks):
        source_token = recv_src[rank, recv_src[rank] >= 0] // top_k
        rows_of_token = np.bincount(source_token, minlength=num_ranks * num_tokens)
        recv_offsets[rank, 1:] = np.cumsum(rows_of_token)

    invalid = (topk_idx < -1) | (topk_idx >= num_experts)
    return ReferenceLayout(
        topk_idx=topk_idx.copy(),
        send_row=send_row.reshape(topk_idx.shape),
        recv_src=recv_src,
        recv_order=recv_order,
        recv_offsets=recv_offsets,
        group_sizes=_int32(group_sizes),
        expert_counts=_int32(counts),
        expert_load=_int32(np.tile(load, (num_ranks, 1))),
        num_recv=_int32(num_recv),
        num_dropped=_int32(counts.sum(axis=1) - num_recv),
        num_invalid=_int32(np.sum(invalid, axis=(1, 2))),
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        top_k=top_k,
        num_experts=num_experts,
        capacity=capacity,
        expert_alignment=expert_alignment,
        expert_capacity=expert_capacity,
        zero_tail=zero_tail,
        ranks_per_node=ranks_per_node,
    )


def specified_rows(layout: ReferenceLayout, *, expand: bool = True) -> NDArray[np.bool_]:
    """Tells which rows of `dispatch`'s outputs and of `combine_vjp`'s dy have a specified value.

    The rows of the groups always have one (padding is zero). The tail beyond the last group is zero
    with `zero_tail=True`, and may hold anything with `zero_tail=False`. With `expand=False` the
    rows of tokens that have none here take the tail's place; the last row is always zero.

    Args:
        layout: the layout.
        expand: as in `dispatch`, for its tokens and scales.

    Returns:
        bool [R, C], with expand=False [R, R * T + 1].
    """
    if not expand:
        specified = np.full((layout.num_ranks, layout.num_ranks * layout.num_tokens + 1), True)
        specified[:, :-1] = (np.diff(layout.recv_offsets, axis=1) > 0) | layout.zero_tail
        return specified
    end_of_groups = layout.group_sizes.sum(axis=1, keepdims=True)
    in_a_group: NDArray[np.bool_] = np.arange(layout.capacity) < end_of_groups
    return in_a_group | layout.zero_tail


# The verbs ----------------------------------------------------------------------------------------


def dispatch(
    x: NDArray[Any],
    layout: ReferenceLayout,
    topk_weights: NDArray[Any] | None = None,
    *,
    expand: bool = True,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Copies each token to the rows of its experts, or, not expanded, to one row a rank.

    Padding and tail are zero here, the tail also with `zero_tail=False`. What a backend leaves
    there is then unspecified and callers must not look; `specified_rows` tells which rows can be
    compared.

    Scales [R, T, S] of rows that come quantised go where the rows go: they are an x of their own.

    Args:
        x: [R, T, H] of any dtype.
        layout: the layout.
        topk_weights: [R, T, K] float32, or bfloat16 or float16, which are cast. With float64 x also
            float64.
        expand: False for one row per (token, rank), where the token has kept rows on that rank: of
            token t of rank s row s * T + t, all others zero. `layout.row_token` then says which of
            them each receive row is: tokens[r][layout.row_token[r]] are the rows of expand=True.

    Returns:
        tokens: [R, C, H] of x's dtype, copies bit for bit; with expand=False [R, R * T + 1, H].
        weights: float32 [R, C] (float64 if x is float64), or None without topk_weights.

    Raises:
        TypeError: topk_weights has another dtype.
        ValueError: an array has a shape that does not belong to the layout.
    """
    x = np.asarray(x)
    hidden = _hidden_size("x", x)
    check_shape("x", x, (layout.num_ranks, layout.num_tokens, hidden))
    valid = layout.row_valid
    source = layout.recv_src[valid]

    if expand:
        tokens = np.zeros((layout.num_ranks, layout.capacity, hidden), x.dtype)
        tokens[valid] = x.reshape(-1, hidden)[source // layout.top_k]
    else:
        num_rows = layout.num_ranks * layout.num_tokens + 1
        tokens = np.zeros((layout.num_ranks, num_rows, hidden), x.dtype)
        rank, _ = np.nonzero(valid)
        tokens[rank, layout.row_token[valid]] = x.reshape(-1, hidden)[source // layout.top_k]
    if topk_weights is None:
        return tokens, None

    topk_weights = np.asarray(topk_weights)
    compute = _compute_dtype(x.dtype)
    check_dtype("topk_weights", topk_weights.dtype, BFLOAT16, FLOAT16, FLOAT32, compute)
    check_shape("topk_weights", topk_weights, layout.topk_idx.shape)
    weights = np.zeros((layout.num_ranks, layout.capacity), compute)
    weights[valid] = topk_weights.reshape(-1)[source].astype(compute)
    return tokens, weights


def combine(
    y: NDArray[Any], layout: ReferenceLayout, weights: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Sums the rows of each token, first on each expert rank, then on each node, then over nodes.

    out[t] = round( sum over nodes, ascending, of round( sum over the node's ranks, ascending, of
    round( sum over the kept rows of t on that rank, in k order, of weights * y ) ) ), where round
    is to y's dtype. Products and sums are float32, each rounded to nearest even, with subnormals
    and without fused multiply-add. All sums start at +0.0; a rank or node without a kept row of t
    adds nothing; a token with no kept row gives +0. Rows that are not `row_valid` are never read.

    One node (N = R) is the sum over all ranks, and so is N = 1, to the bit: a sum of numbers of y's
    dtype that starts at +0.0 is never -0 nor below that dtype's subnormals, so that to round it, to
    add it to +0.0 and to round again changes nothing.

    Float64 y is for numeric gradient checks: all arithmetic is then float64, in the same order, and
    the roundings to y's dtype do nothing.

    Args:
        y: [R, C, H] bfloat16, float16, float32 or float64.
        layout: the layout.
        weights: float32 [R, C] (with float64 y also float64); None for 1.

    Returns:
        [R, T, H] of y's dtype.

    Raises:
        TypeError: y is not one of these dtypes, or weights is not float32.
        ValueError: an array has a shape that does not belong to the layout.
    """
    y = np.asarray(y)
    _check_rows("y", y, layout)
    compute = _compute_dtype(y.dtype)
    weights = _check_weights(weights, y.dtype, layout)

    kept = layout.kept
    expert_rank = layout.topk_idx // (layout.num_experts // layout.num_ranks)

    def on_rank(rank: int) -> Part:
        here = kept & (expert_rank == rank)
        total = np.zeros((layout.num_ranks, layout.num_tokens, y.shape[-1]), compute)
        for k in range(layout.top_k):
            chosen = here[:, :, k]
            rows = layout.send_row[:, :, k][chosen]
            addend = y[rank, rows].astype(compute)
            if weights is not None:
                addend = weights[rank, rows][:, None].astype(compute) * addend
            total[chosen] += addend
        return here.any(axis=-1), total.astype(y.dtype)

    with np.errstate(all="ignore"):
        return _sum_over_nodes(on_rank, layout)


def _sum_over_nodes(on_rank: Callable[[int], Part], layout: ReferenceLayout) -> NDArray[Any]:
    """The parts of all ranks, summed on each node, and what comes of it summed over nodes."""

    def on_node(node: int) -> Part:
        first = node * layout.ranks_per_node
        return _sum_parts(on_rank(rank) for rank in range(first, first + layout.ranks_per_node))

    num_nodes = layout.num_ranks // layout.ranks_per_node
    return _sum_parts(on_node(node) for node in range(num_nodes))[1]


def _sum_parts(parts: Iterable[Part]) -> Part:
    """The sum of the parts in their order, from +0.0, rounded to their dtype."""
    parts = iter(parts)
    has_sum, first = next(parts)
    total = np.zeros(first.shape, _compute_dtype(first.dtype))
    for adds, part in itertools.chain([(has_sum, first)], parts):
        total[adds] += part[adds].astype(total.dtype)
        has_sum = has_sum | adds
    return has_sum, total.astype(first.dtype)


def collect(values: NDArray[Any], layout: ReferenceLayout) -> NDArray[Any]:
    """Brings one number per receive row back to the choice that the row came from.

    Args:
        values: float32 [R, C] (float64 stays float64).
        layout: the layout.

    Returns:
        [R, T, K] of values' dtype, 0 where the choice has no row.

    Raises:
        TypeError: values is neither float32 nor float64.
        ValueError: values is not [R, C].
    """
    values = np.asarray(values)
    check_dtype("values", values.dtype, FLOAT32, FLOAT64)
    check_shape("values", values, layout.recv_src.shape)
    collected = np.zeros(layout.topk_idx.size, values.dtype)
    collected[layout.recv_src[layout.row_valid]] = values[layout.row_valid]
    return collected.reshape(layout.topk_idx.shape)


# Gradients ----------------------------------------------------------------------------------------


def dispatch_vjp(
    layout: ReferenceLayout,
    d_tokens: NDArray[Any],
    d_weights: NDArray[Any] | None = None,
    *,
    expand: bool = True,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The gradient of `dispatch`: `combine` without weights, and `collect`.

    With expand=False, dx[t] = round( sum over nodes, ascending, of round( sum over the node's ranks
    r, ascending, that have a kept row of t, of the row of t in d_tokens[r] ) ), sums in float32
    from +0.0. All other rows are never read.

    Args:
        layout: the layout.
        d_tokens: [R, C, H] cotangent of tokens, with expand=False [R, R * T + 1, H], of a dtype
            that `combine` takes.
        d_weights: float32 [R, C] cotangent of weights, or None.
        expand: as in `dispatch`.

    Returns:
        dx: [R, T, H] of d_tokens' dtype, with the rounding of `combine`.
        d_topk_weights: float32 [R, T, K], 0 where the choice has no row; None without d_weights.

    Raises:
        TypeError: d_tokens or d_weights has a dtype that `combine` or `collect` does not take.
        ValueError: an array has a shape that does not belong to the layout.
    """
    d_tokens = np.asarray(d_tokens)
    if expand:
        _check_rows("d_tokens", d_tokens, layout)
        d_x = combine(d_tokens, layout)
    else:
        d_x = _combine_once_per_rank(d_tokens, layout)
    if d_weights is None:
        return d_x, None
    d_weights = np.asarray(d_weights)
    check_dtype("d_weights", d_weights.dtype, FLOAT32, FLOAT64)
    check_shape("d_weights", d_weights, layout.recv_src.shape)
    return d_x, collect(d_weights, layout)


def _combine_once_per_rank(d_tokens: NDArray[Any], layout: ReferenceLayout) -> NDArray[Any]:
    """`combine` without weights of one row per (token, rank), [R, R * T + 1, H]."""
    shape = (layout.num_ranks, layout.num_tokens)
    _check_rows("d_tokens", d_tokens, layout, layout.num_ranks * layout.num_tokens + 1)

    def on_rank(rank: int) -> Part:
        has_rows = np.diff(layout.recv_offsets[rank]) > 0
        return has_rows.reshape(shape), d_tokens[rank, :-1].reshape(*shape, -1)

    with np.errstate(all="ignore"):
        return _sum_over_nodes(on_rank, layout)


def combine_vjp(
    y: NDArray[Any], layout: ReferenceLayout, weights: NDArray[Any] | None, g: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The gradient of `combine`.

    dy[row] = weights[row] * g[token of row], a float32 product rounded to y's dtype. d_weights[row]
    is the dot product of y[row] and g[token of row]: here summed in float64 and rounded once to
    float32. A backend sums in float32 in an order of its own, so (while nothing overflows or
    underflows) it may differ by H * 2**-24 * sum(|y * g|), to first order. Both are zero where the
    row is not `row_valid`; in dy the tail has a specified value only with `zero_tail=True` (see
    `specified_rows`), in d_weights always.

    Args:
        y: [R, C, H] bfloat16, float16, float32 or float64 (then everything is float64).
        layout: the layout.
        weights: float32 [R, C] (with float64 y also float64); None for 1.
        g: [R, T, H] cotangent of combine's output, of y's dtype.

    Returns:
        dy: [R, C, H] of y's dtype.
        d_weights: float32 [R, C] (float64 with float64 y); None without weights.

    Raises:
        TypeError: y is not one of these dtypes, g has another dtype than y, or weights is not
            float32.
        ValueError: an array has a shape that does not belong to the layout.
    """
    y, g = np.asarray(y), np.asarray(g)
    _check_rows("y", y, layout)
    compute = _compute_dtype(y.dtype)
    weights = _check_weights(weights, y.dtype, layout)
    check_dtype("g", g.dtype, y.dtype)
    check_shape("g", g, (layout.num_ranks, layout.num_tokens, y.shape[-1]))

    g_rows, _ = dispatch(g, layout)
    if weights is None:
        return g_rows, None
    valid = layout.row_valid
    d_y = np.zeros_like(y)
    d_weights = np.zeros(weights.shape, compute)
    with np.errstate(all="ignore"):
        scaled = weights[valid][:, None].astype(compute) * g_rows[valid].astype(compute)
        d_y[valid] = scaled.astype(y.dtype)
        products = y[valid].astype(np.float64) * g_rows[valid].astype(np.float64)
        d_weights[valid] = products.sum(axis=-1).astype(compute)
    return d_y, d_weights


# The dense layer ----------------------------------------------------------------------------------


def moe_dense(
    x: NDArray[Any],
    topk_idx: NDArray[np.int32],
    topk_weights: NDArray[Any],
    expert_fn: Callable[[int, NDArray[np.float64]], NDArray[Any]],
    num_experts: int,
) -> NDArray[np.float64]:
    """What a MoE layer means, with no dispatch, in float64.

    out[r, t] = sum over k of topk_weights[r, t, k] * expert_fn(topk_idx[r, t, k], x[r, t]). Ids
    outside [0, E) contribute nothing. Nothing is dropped.

    Args:
        x: [R, T, H] of any float dtype.
        topk_idx: int32 [R, T, K].
        topk_weights: [R, T, K] of any float dtype.
        expert_fn: maps an expert id and its rows, float64 [N, H], to [N, H']; N may be 0.
        num_experts: E.

    Returns:
        float64 [R, T, H'].

    Raises:
        TypeError: topk_idx is not int32.
        ValueError: the shapes do not agree, or E < 1.
    """
    x, topk_idx, topk_weights = np.asarray(x), np.asarray(topk_idx), np.asarray(topk_weights)
    check_dtype("topk_idx", topk_idx.dtype, INT32)
    check_positive("num_experts", num_experts)
    hidden = _hidden_size("x", x)
    if topk_idx.ndim != 3 or topk_idx.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"topk_idx must be [R, T, K] with x's R and T {x.shape[:2]}, got shape {topk_idx.shape}"
        )
    check_shape("topk_weights", topk_weights, topk_idx.shape)
    num_ranks, num_tokens, top_k = topk_idx.shape
    flat_x = x.astype(np.float64).reshape(-1, hidden)
    flat_weights = topk_weights.astype(np.float64).reshape(-1, top_k)
    flat_ids = topk_idx.reshape(-1, top_k)

    out: NDArray[np.float64] | None = None
    for expert in range(num_experts):
        token, k = np.nonzero(flat_ids == expert)
        result = np.asarray(expert_fn(expert, flat_x[token]), np.float64)
        if out is None:
            out = np.zeros((num_ranks * num_tokens, result.shape[-1]))
        np.add.at(out, token, flat_weights[token, k][:, None] * result)
    assert out is not None
    return out.reshape(num_ranks, num_tokens, -1)


# Checks -------------------------------------------------------------------------------------------


def _int32(array: NDArray[Any]) -> NDArray[np.int32]:
    return array.astype(np.int32)


def _compute_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Products, sums and weights are float32, except in the float64 mode."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def _check_sizes(
    num_tokens: int, top_k: int, num_ranks: int, num_experts: int, expert_alignment: int
) -> None:
    check_positive("num_ranks", num_ranks)
    check_positive("num_tokens", num_tokens)
    check_positive("top_k", top_k)
    check_positive("num_experts", num_experts)
    check_positive("expert_alignment", expert_alignment)
    if num_experts % num_ranks:
        raise ValueError(
            f"num_experts must be a multiple of num_ranks ({num_ranks}), got {num_experts}"
        )
    if top_k > num_experts:
        raise ValueError(f"top_k must be at most num_experts ({num_experts}), got {top_k}")


def _hidden_size(name: str, array: NDArray[Any]) -> int:
    if array.ndim != 3:
        raise ValueError(f"{name} must have three axes, got shape {array.shape}")
    return int(array.shape[-1])


def _check_rows(
    name: str, rows: NDArray[Any], layout: ReferenceLayout, num_rows: int | None = None
) -> None:
    """Rows that arithmetic is done on: float [R, C, H], or another number of them for each rank."""
    check_dtype(name, rows.dtype, BFLOAT16, FLOAT16, FLOAT32, FLOAT64)
    hidden = _hidden_size(name, rows)
    check_shape(name, rows, (layout.num_ranks, num_rows or layout.capacity, hidden))


def _check_weights(
    weights: NDArray[Any] | None, row_dtype: np.dtype[Any], layout: ReferenceLayout
) -> NDArray[Any] | None:
    if weights is None:
        return None
    weights = np.asarray(weights)
    check_dtype("weights", weights.dtype, FLOAT32, _compute_dtype(row_dtype))
    check_shape("weights", weights, layout.recv_src.shape)
    return weights
