"""The receive layout: static sizes and the arrays that say where every row goes."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from jax_ep import limits


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each (token, k) of this shard goes, and what each received row is.

    A pytree: arrays are leaves, sizes are static. It has no gradient. Made by ``make_layout``
    or ``layout_and_dispatch``, used by ``dispatch`` and ``combine`` in forward and backward passes
    alike. All arrays are per shard (varying over the EP axes) and int32.

    Letters: T tokens, K experts per token, E experts, R ranks, L = E / R experts per rank, C
    capacity in rows.

    Attributes:
        topk_idx: [T, K], the ids as given.
        send_row: [T, K], the row at its expert's rank; -1 if not routed, invalid or dropped.
        recv_src: [C], source of each row as ``(src_rank * T + token) * K + k``; -1 on padding and
            tail.
        recv_order: [C], the kept rows by ascending ``recv_src``, then -1.
        recv_offsets: [R * T + 1], where the rows of each (source rank, token) begin in
            ``recv_order``; the last entry is ``num_recv``.
        group_sizes: [L], rows of each local expert with padding, cut at the capacity: multiples
            of ``expert_alignment`` with sum <= C. What ``jax.lax.ragged_dot`` takes. With
            ``expert_capacity`` all are M.
        expert_counts: [L], rows routed to each local expert, unpadded, before drops.
        expert_load: [E], rows of the whole group routed to each expert, before drops.
        num_recv: [], rows kept here, without padding.
        num_dropped: [], rows routed here that did not fit.
        num_invalid: [], ids of this shard that are neither -1 nor in [0, E); 0 in a sound program.
        axis_name: the EP axes.
        num_ranks: R.
        num_experts: E.
        capacity: C.
        expert_alignment: A.
        expert_capacity: M where each expert has M rows, so that rows reshape to [L, M, H]; None
            where experts share the capacity.
        zero_tail: whether rows beyond the last group are zeroed.
        num_sms: streaming multiprocessors that each operation on this layout, backward passes
            included, may use on a GPU; 0 is all of them. ``dataclasses.replace(layout, num_sms=n)``
            gives the same layout with another number.
        overlap: whether calls on this layout, backward passes included, may run beside computation
            on a GPU that does not depend on them; see ``make_layout``.
        ranks_per_node: how many ranks, one after the other, count as a node in the order in which
            ``combine`` and the gradient of ``dispatch`` sum (see ``combine``); a divisor of R.
            ``dataclasses.replace(layout, ranks_per_node=n)`` gives the same layout with that
            order, R that of one node. None: as the devices lie, or as ``initialize`` was told.
    """

    topk_idx: jax.Array
    send_row: jax.Array
    recv_src: jax.Array
    recv_order: jax.Array
    recv_offsets: jax.Array
    group_sizes: jax.Array
    expert_counts: jax.Array
    expert_load: jax.Array
    num_recv: jax.Array
    num_dropped: jax.Array
    num_invalid: jax.Array
    axis_name: tuple[str, ...]
    num_ranks: int
    num_experts: int
    capacity: int
    expert_alignment: int
    expert_capacity: int | None
    zero_tail: bool
    num_sms: int
    overlap: bool = False
    ranks_per_node: int | None = None

    @property
    def kept(self) -> jax.Array:
        """Bool [T, K]: the row of (token, k) arrived (to renormalise weights after drops)."""
        return self.send_row >= 0

    @property
    def row_valid(self) -> jax.Array:
        """Bool [C]: the row holds a token, not padding or tail."""
        return self.recv_src >= 0

    @property
    def row_token(self) -> jax.Array:
        """Int32 [C]: which row of ``dispatch(..., expand=False)`` each expert row is.

        ``src_rank * T + token``; on padding and tail ``R * T``, the row that is always zero.
        """
        num_tokens, top_k = self.topk_idx.shape
        return jnp.where(self.row_valid, self.recv_src // top_k, self.num_ranks * num_tokens)

    def stats(self) -> dict[str, jax.Array]:
        """The scalars as int32 [1], so that they can leave ``shard_map`` along the EP axes."""
        return {
            name: getattr(self, name)[None] for name in ("num_recv", "num_dropped", "num_invalid")
        }


_STATIC_FIELDS = (
    "axis_name",
    "num_ranks",
    "num_experts",
    "capacity",
    "expert_alignment",
    "expert_capacity",
    "zero_tail",
    "num_sms",
    "overlap",
    "ranks_per_node",
)
jax.tree_util.register_dataclass(
    Layout,
    data_fields=[f.name for f in dataclasses.fields(Layout) if f.name not in _STATIC_FIELDS],
    meta_fields=list(_STATIC_FIELDS),
)


def default_capacity(
    num_tokens: int, top_k: int, num_ranks: int, num_experts: int, expert_alignment: int = 1
) -> int:
    """The least capacity that cannot overflow while a token's experts are distinct."""
    num_local_experts = num_experts // num_ranks
    rows = num_ranks * num_tokens * min(top_k, num_local_experts)
    rows += num_local_experts * (expert_alignment - 1)
    return rows // expert_alignment * expert_alignment


def capacity(
    num_tokens: int,
    top_k: int,
    num_ranks: int,
    factor: float | None = 1.25,
    *,
    num_experts: int,
    expert_alignment: int = 1,
) -> int:
    """Rows to reserve per rank: ``factor`` times what arrives when experts are equally loaded.

    ``ceil(factor * T * K)`` rows, plus the most that alignment padding can take, ``L * (A - 1)``,
    rounded up to a multiple of A, and never more than cannot overflow. Memory and zeroing grow
    with it; rows beyond it are dropped and counted (``Layout.num_dropped``).

    Args:
        num_tokens: T, tokens per rank.
        top_k: K, experts per token.
        num_ranks: R, ranks of the EP group.
        factor: above 0; None for the capacity that cannot overflow.
        num_experts: E, a multiple of R.
        expert_alignment: A, rows.

    Returns:
        The capacity C in rows, a multiple of A.

    Raises:
        TypeError: if a size is no int.
        ValueError: if a size is below 1, E is no multiple of R, K > E, or ``factor`` is not
            positive.
    """
    num_tokens, top_k, num_ranks, num_experts, expert_alignment = _check_sizes(
        "jax_ep.capacity", num_tokens, top_k, num_ranks, num_experts, expert_alignment, factor
    )
    most = default_capacity(num_tokens, top_k, num_ranks, num_experts, expert_alignment)
    if factor is None:
        return most
    rows = -int(-factor * num_tokens * top_k // 1)
    rows += num_experts // num_ranks * (expert_alignment - 1)
    return min(most, -(-rows // expert_alignment) * expert_alignment)


def expert_capacity(
    num_tokens: int,
    top_k: int,
    num_ranks: int,
    factor: float | None = 1.25,
    *,
    num_experts: int,
    expert_alignment: int = 1,
) -> int:
    """Rows to reserve per expert: ``factor`` times what each gets when all are equally loaded.

    ``ceil(factor * R * T * K / E)``, and no more than R * T, which cannot overflow while a token's
    experts are distinct; rounded up to a multiple of A. For ``make_layout(expert_capacity=)``: an
    expert's rows beyond it are dropped and counted (``Layout.num_dropped``).

    Args:
        num_tokens: T, tokens per rank.
        top_k: K, experts per token.
        num_ranks: R, ranks of the EP group.
        factor: above 0; None for the room that cannot overflow.
        num_experts: E, a multiple of R.
        expert_alignment: A, rows.

    Returns:
        The room M of an expert in rows, a multiple of A.

    Raises:
        TypeError: if a size is no int.
        ValueError: if a size is below 1, E is no multiple of R, K > E, or ``factor`` is not
            positive.
    """
    num_tokens, top_k, num_ranks, num_experts, expert_alignment = _check_sizes(
        "jax_ep.expert_capacity",
        num_tokens,
        top_k,
        num_ranks,
        num_experts,
        expert_alignment,
        factor,
    )
    rows = num_ranks * num_tokens
    if factor is not None:
        rows = min(rows, -int(-factor * num_ranks * num_tokens * top_k / num_experts // 1))
    return -(-rows // expert_alignment) * expert_alignment


def _check_sizes(
    where: str,
    num_tokens: int,
    top_k: int,
    num_ranks: int,
    num_experts: int,
    expert_alignment: int,
    factor: float | None,
) -> tuple[int, ...]:
    """The sizes as Python's ints: NumPy's would overflow."""
    sizes = {
        "num_tokens": num_tokens,
        "top_k": top_k,
        "num_ranks": num_ranks,
        "num_experts": num_experts,
        "expert_alignment": expert_alignment,
    }
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral):
            raise TypeError(f"{where}: {name} must be an int; got {value!r}")
        if value < 1:
            raise ValueError(f"{where}: {name} must be at least 1; got {value}")
    limits.check_experts(where, int(num_experts), int(num_ranks), f"num_ranks = {num_ranks}")
    if top_k > num_experts:
        raise ValueError(f"{where}: top_k must be at most num_experts = {num_experts}; got {top_k}")
    if factor is not None and not 0 < factor < float("inf"):
        raise ValueError(f"{where}: factor must be positive and finite; got {factor}")
    return tuple(map(int, sizes.values()))
