"""Calls that are made up, made and checked on the devices, thousands in one program.

Every number of a call comes from hashes of the call's number, so every rank knows all ranks' ids
and rows without having been told, and compares what it received with them where it is. The
layout's tables are computed a second time, by comparing ids with each other. What comes out of
a program is how many calls were wrong, in what, and which was the first.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from backends import AXIS
from jax import lax
from late import after, stall
from numpy.typing import NDArray
from routings import Case

import jax_ep

NOT_YET = 2**31 - 1  # the number of the first wrong call while there is none

LAYOUT_CHECKS = (
    "send_row",
    "recv_src",
    "recv_order",
    "recv_offsets",
    "group_sizes",
    "expert_counts",
    "expert_load",
    "num_recv",
    "num_dropped",
    "num_invalid",
)
CHECKS = (*LAYOUT_CHECKS, "tokens", "scales", "weights", "out")


@dataclasses.dataclass(frozen=True)
class Form:
    """How dispatch is asked for rows.

    Attributes:
        expand: as in `dispatch`.
        num_scales: S of float8 rows, a divisor of H; 0 for int32 rows without scales.
        in_one: by `layout_and_dispatch`, not by `make_layout` and `dispatch`.
    """

    expand: bool = True
    num_scales: int = 0
    in_one: bool = False

    def __str__(self) -> str:
        """A short name, for test ids."""
        name = "expanded" if self.expand else "not_expanded"
        name += f"_{self.num_scales}_scales" if self.num_scales > 0 else ""
        return f"{name}_in_one" if self.in_one else name


EXPANDED = Form()


@dataclasses.dataclass(frozen=True)
class Kind:
    """Calls of one kind.

    Attributes:
        case: the sizes; its ranks are those of a group.
        form: how dispatch is asked for rows.
        num_sms: of a call, where that can be said.
        axes: of the mesh, along which the groups are.
        name: for those who read what was run.
    """

    case: Case
    form: Form = EXPANDED
    num_sms: int | None = None
    axes: tuple[str, ...] = (AXIS,)
    name: str = ""


def mix(*values: Any) -> jax.Array:
    """A hash of integers, uint32, broadcast."""
    h: jax.Array = jnp.uint32(0x9E3779B9)
    for value in values:
        h = (h ^ jnp.asarray(value).astype(jnp.uint32)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        h = h ^ (h >> 16)
    return h


def below(bits: jax.Array, bound: int) -> jax.Array:
    """int32 in [0, bound), from a hash."""
    return (bits % jnp.uint32(bound)).astype(jnp.int32)


def sms(num_sms: int | None, verb: Callable[..., Any]) -> dict[str, int]:
    """`num_sms` as an argument of the verb, if it is asked for and the verb takes it."""
    if num_sms is None or "num_sms" not in inspect.signature(verb).parameters:
        return {}
    return {"num_sms": num_sms}


# What a call sends ----------------------------------------------------------------------------


def all_ids(case: Case, call: jax.Array) -> jax.Array:
    """int32 [R, T, K]: the ids of all ranks. Every kind of routing comes up."""
    shape = (case.num_ranks, case.num_tokens, case.top_k)
    rank, token, choice = (lax.broadcasted_iota(jnp.int32, shape, i) for i in range(3))
    first, second = mix(call, rank, token, choice, 1), mix(call, rank, token, choice, 2)
    uniform = below(first, case.num_experts)
    kind = below(mix(call, 3), 8)
    ids = jnp.where(kind < 4, uniform, jnp.minimum(uniform, below(second, case.num_experts)))
    ids = jnp.where(kind == 5, below(mix(call, 4), case.num_experts), ids)  # one expert for all
    ids = jnp.where((kind == 6) & (below(mix(call, rank, 5), 2) == 0), -1, ids)  # silent ranks
    ids = jnp.where(kind == 7, -1, ids)  # nobody has a token
    rare = below(second >> 8, 32)
    ids = jnp.where(rare < 2, -1, ids)
    ids = jnp.where(rare == 2, case.num_experts + below(first >> 8, 1000), ids)
    return jnp.where(rare == 3, -2 - below(first >> 8, 1000), ids)


def all_rows(case: Case, call: jax.Array, flat_token: jax.Array) -> jax.Array:
    """int32 [.., H]: the rows of these tokens (source rank * T + token)."""
    channel = jnp.arange(case.hidden, dtype=jnp.int32)
    return lax.bitcast_convert_type(mix(call, flat_token[..., None], channel, 6), jnp.int32)


def all_scales(call: jax.Array, flat_token: jax.Array, num_scales: int) -> jax.Array:
    """float32 [.., S], whole numbers: the scales of these tokens."""
    number = jnp.arange(num_scales, dtype=jnp.int32)
    return below(mix(call, flat_token[..., None], number, 10), 1 << 20).astype(jnp.float32)


def all_weights(call: jax.Array, flat: jax.Array) -> jax.Array:
    """float32: the weights, -3 .. 3, of these choices (flat token * K + k)."""
    return (below(mix(call, flat, 7), 7) - 3).astype(jnp.float32)


def expert(rows: jax.Array, flat: jax.Array) -> jax.Array:
    """float32 [.., H], whole numbers -4 .. 3: of the row and of which choice it stands for.

    Weighted sums of K <= 16 of them are below 256 in magnitude, so exact in bfloat16, in any order.
    """
    bits = lax.bitcast_convert_type(rows, jnp.uint32) ^ mix(flat, 8)[..., None]
    return ((bits & 7).astype(jnp.int32) - 4).astype(jnp.float32)


# What must come of it -------------------------------------------------------------------------


def expected_layout(case: Case, ids: jax.Array, rank: jax.Array) -> dict[str, jax.Array]:
    """This rank's tables, from all ranks' ids."""
    num_local, alignment = case.num_local_experts, case.expert_alignment
    capacity, room = case.num_rows, case.expert_capacity
    flat = ids.reshape(-1)
    number = jnp.arange(flat.size, dtype=jnp.int32)
    routed = (flat >= 0) & (flat < case.num_experts)
    safe = jnp.where(routed, flat, 0)
    experts = jnp.arange(case.num_experts, dtype=jnp.int32)
    of_rank = flat.reshape(case.num_ranks, -1)
    sent = (of_rank[..., None] == experts).sum(axis=1, dtype=jnp.int32)  # [R, E]
    load = sent.sum(axis=0)
    # Rows of lower ranks come first, then those that stand before it in its own rank's ids.
    of_lower = jnp.cumsum(sent, axis=0) - sent
    place = jnp.arange(of_rank.shape[1], dtype=jnp.int32)
    same_before = (of_rank[:, :, None] == of_rank[:, None, :]) & (place[:, None] > place)
    of_expert = jnp.take_along_axis(of_lower, safe.reshape(of_rank.shape), axis=1)
    row_in_expert = (of_expert + same_before.sum(axis=2, dtype=jnp.int32)).reshape(-1)
    padded = -(-load // alignment) * alignment if room is None else jnp.full_like(load, room)
    padded = padded.reshape(case.num_ranks, num_local)
    offset = jnp.cumsum(padded, axis=1) - padded
    row = offset.reshape(-1)[safe] + row_in_expert
    fits = row < capacity if room is None else row_in_expert < room
    row = jnp.where(routed & fits, row, -1)
    here = (row >= 0) & (safe // num_local == rank)
    slot = jnp.cumsum(here.astype(jnp.int32)) - here
    nowhere = jnp.full(capacity, -1, jnp.int32)
    per_token = here.reshape(-1, case.top_k).sum(axis=1, dtype=jnp.int32)
    own_end, own_offset = offset[rank] + padded[rank], offset[rank]
    own = ids[rank]
    num_recv = here.sum(dtype=jnp.int32)
    counts = load.reshape(case.num_ranks, num_local)[rank]
    return {
        "send_row": row.reshape(ids.shape)[rank],
        "recv_src": nowhere.at[jnp.where(here, row, capacity)].set(number, mode="drop"),
        "recv_order": nowhere.at[jnp.where(here, slot, capacity)].set(row, mode="drop"),
        "recv_offsets": jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(per_token)]),
        "group_sizes": jnp.minimum(own_end, capacity) - jnp.minimum(own_offset, capacity),
        "expert_counts": counts,
        "expert_load": load,
        "num_recv": num_recv,
        "num_dropped": counts.sum(dtype=jnp.int32) - num_recv,
        "num_invalid": ((own != -1) & ((own < 0) | (own >= case.num_experts))).sum(dtype=jnp.int32),
    }


# Ranks that come late -------------------------------------------------------------------------


def lateness(call: jax.Array, rank: jax.Array, stage: int) -> jax.Array:
    """Turns: mostly none, sometimes a few, rarely so many that the other ranks stand and wait."""
    bits = mix(call, rank, stage, 9)
    few = jnp.where(below(bits, 4) == 0, below(bits >> 8, 4), 0)
    return jnp.where(below(bits >> 16, 400) == 0, 100, few)


# Programs -------------------------------------------------------------------------------------


def one_call(
    kind: Kind, call: jax.Array, state: jax.Array, late: bool
) -> tuple[jax.Array, jax.Array]:
    """Makes and checks a call: which CHECKS failed, bool, and the new state of `stall`.

    Layout, dispatch of int32 rows or, with scales, of float8 ones, combine of bfloat16, all random;
    with `late`, ranks come to each of the calls at different times.
    """
    case, form = kind.case, kind.form
    rank = lax.axis_index(kind.axes)
    # Rows are int32 here; the low byte of each number is what crosses as float8.
    mask = 0xFF if form.num_scales > 0 else -1

    def rows_of(flat_token: jax.Array) -> jax.Array:
        return all_rows(case, call, flat_token) & mask

    def to_payload(rows: jax.Array) -> jax.Array:
        if form.num_scales == 0:
            return rows
        return lax.bitcast_convert_type(rows.astype(jnp.uint8), jnp.float8_e4m3fn)

    def from_payload(tokens: jax.Array) -> jax.Array:
        if form.num_scales == 0:
            return tokens
        return lax.bitcast_convert_type(tokens, jnp.uint8).astype(jnp.int32)

    ids = all_ids(case, call)
    expected = expected_layout(case, ids, rank)
    flat_tokens = rank * case.num_tokens + jnp.arange(case.num_tokens, dtype=jnp.int32)
    flat = flat_tokens[:, None] * case.top_k + jnp.arange(case.top_k, dtype=jnp.int32)
    x, topk_weights = rows_of(flat_tokens), all_weights(call, flat)
    scales = all_scales(call, flat_tokens, form.num_scales)

    own_ids = ids[rank]
    if late:
        state = stall(lateness(call, rank, 0), state)
        own_ids = after(state, own_ids)
    of_layout = {
        "num_experts": case.num_experts,
        "axis_name": kind.axes,
        "capacity": case.capacity,
        "expert_alignment": case.expert_alignment,
        "expert_capacity": case.expert_capacity,
        **sms(kind.num_sms, jax_ep.make_layout),
    }
    of_rows = {"expand": form.expand, "scales": scales if form.num_scales > 0 else None}
    if form.in_one:
        sent = to_payload(after(state, x) if late else x)
        layout, recv = jax_ep.layout_and_dispatch(
            sent, own_ids, topk_weights, **of_layout, **of_rows
        )
    else:
        layout = jax_ep.make_layout(own_ids, **of_layout)
        sent = x
        if late:
            state = stall(lateness(call, rank, 1), state)
            sent = after(state, x)
        recv = jax_ep.dispatch(
            to_payload(sent), layout, topk_weights, **of_rows, **sms(kind.num_sms, jax_ep.dispatch)
        )

    src, valid = expected["recv_src"], expected["recv_src"] >= 0
    token, holds = src // case.top_k, valid  # of each row of tokens
    if not form.expand:
        token = jnp.arange(case.num_ranks * case.num_tokens + 1, dtype=jnp.int32)
        holds = jnp.append(jnp.diff(expected["recv_offsets"]) > 0, False)
    recv_tokens = from_payload(recv.tokens)
    tokens = jnp.where(holds[:, None], rows_of(token), 0)
    right_scales = jnp.bool_(True)
    if form.num_scales > 0:
        all_of_rows = all_scales(call, token, form.num_scales)
        right_scales = jnp.all(recv.scales == jnp.where(holds[:, None], all_of_rows, 0))
    weights = jnp.where(valid, all_weights(call, src), 0)
    rows = recv_tokens if form.expand else recv_tokens[layout.row_token]
    y = jnp.where(valid[:, None], expert(rows, src), jnp.nan).astype(jnp.bfloat16)
    if late:
        state = stall(lateness(call, rank, 2), state)
        y = after(state, y)
    out = jax_ep.combine(y, layout, recv.weights, **sms(kind.num_sms, jax_ep.combine))
    each = expert(jnp.repeat(x[:, None], case.top_k, axis=1), flat)
    kept = expected["send_row"] >= 0
    expected_out = (jnp.where(kept, topk_weights, 0)[..., None] * each).sum(axis=1)

    right = [jnp.all(getattr(layout, name) == expected[name]) for name in LAYOUT_CHECKS]
    right += [
        jnp.all(recv_tokens == tokens),
        right_scales,
        jnp.all(recv.weights == weights),
        jnp.all(out.astype(jnp.float32) == expected_out),
    ]
    return ~jnp.stack(right), state


@functools.cache
def stress(
    kinds: tuple[Kind, ...], num_calls: int, late: bool, mesh_axes: tuple[str, ...] = (AXIS,)
) -> Any:
    """A function of one rank: (first call) -> calls and wrong calls by kind, first wrong call.

    Without `late` calls are queued as fast as it goes, one of each kind in turn; with it ranks come
    at different times, and the kind of each call is random.
    """

    def of_kind(number: int, call: Any, carry: Any) -> Any:
        calls, wrong, first_wrong, state = carry
        kind = kinds[number]
        # Groups side by side, and kinds of the same sizes, have different data.
        others = tuple(axis for axis in mesh_axes if axis not in kind.axes)
        group = lax.axis_index(others) if others else 0
        is_wrong, state = one_call(kind, mix(call, number, group), state, late)
        first_wrong = jnp.minimum(first_wrong, jnp.where(is_wrong.any(), call, NOT_YET))
        return calls.at[number].add(1), wrong.at[number].add(is_wrong), first_wrong, state

    branches = [functools.partial(of_kind, number) for number in range(len(kinds))]

    def of_any_kind(call: Any, carry: Any) -> Any:
        if len(kinds) == 1:
            return branches[0](call, carry)
        return lax.switch(below(mix(call, 11), len(kinds)), branches, call, carry)

    def of_each_kind(turn: Any, first_call: Any, carry: Any) -> Any:
        for number, branch in enumerate(branches):
            carry = branch(first_call + turn * len(kinds) + number, carry)
        return carry

    def function(first_call: jax.Array) -> dict[str, jax.Array]:
        # Zeros that may differ between ranks as far as JAX knows, as a loop's carry must at once.
        zero = lax.axis_index(mesh_axes) * 0
        carry = (
            jnp.zeros(len(kinds), jnp.int32) + zero,
            jnp.zeros((len(kinds), len(CHECKS)), jnp.int32) + zero,
            NOT_YET + zero,
            zero,
        )
        if late:
            carry = lax.fori_loop(
                0, num_calls, lambda i, carry: of_any_kind(first_call + i, carry), carry
            )
        else:
            carry = lax.fori_loop(
                0,
                -(-num_calls // len(kinds)),
                lambda i, carry: of_each_kind(i, first_call, carry),
                carry,
            )
        calls, wrong, first_wrong, state = carry
        return {"calls": calls, "wrong": wrong, "first_wrong": first_wrong, "state": state}

    return function


@dataclasses.dataclass(frozen=True)
class Race:
    """Sizes of the race: see `race`.

    Attributes:
        num_tokens: T.
        hidden: H.
        top_k: K. A token goes to K experts of one rank: it crosses once, straight to its first row,
            and from there the receiver stores it on to the others.
        in_one: rows go by `layout_and_dispatch`, the second time too.
    """

    num_tokens: int
    hidden: int
    top_k: int
    in_one: bool = False


@functools.cache
def race(num_ranks: int, sizes: Race, num_calls: int) -> Any:
    """A function of one rank: (rows, first call) -> rows for the next time, counts of wrong rows.

    In each call all tokens of all ranks go to one rank, in turn, and they go twice, by the same
    layout or, with `in_one`, by two that are equal. In between one rank, in turn too, comes late
    with its new rows: without an order the receiving rank would go on with those of the first time.
    After the second time the rows are rewritten at once, in place (in the loop's buffer): a rank
    whose rows were still on their way would send numbers of the next call. Ids come late too, and
    the rows that combine brings back, which it reads as soon as it is told of them, are compared.
    """
    num_tokens, hidden, top_k = sizes.num_tokens, sizes.hidden, sizes.top_k
    total = num_ranks * num_tokens
    capacity = total * top_k

    def rows(time: Any, flat_token: Any) -> jax.Array:
        return _race_rows(hidden, time, flat_token)

    def one_call(i: Any, carry: Any, first_call: Any) -> Any:
        x, wrong, state = carry
        call = first_call + i
        rank = lax.axis_index(AXIS)
        turn = call % num_ranks
        late = (call // num_ranks) % num_ranks
        state = stall(jnp.where(rank == late, 2, 0), state)
        experts = turn * top_k + jnp.arange(top_k, dtype=jnp.int32)  # those of one rank
        ids = after(state, jnp.broadcast_to(experts, (num_tokens, top_k)))
        options = {
            "num_experts": num_ranks * top_k,
            "axis_name": AXIS,
            "capacity": capacity,
            "zero_tail": False,
        }
        if sizes.in_one:
            layout, first = jax_ep.layout_and_dispatch(x, ids, **options)
        else:
            layout = jax_ep.make_layout(ids, **options)
            first = jax_ep.dispatch(x, layout)
        # Each time the new rows need the results of the old ones, so they are written after those,
        # and can be written over them. No row has a -77.
        state = stall(jnp.where(rank == late, 2, 0), state)
        x = after(state, x + jnp.where(first.tokens[0, 0] == -77, 2, 1))
        if sizes.in_one:
            layout, second = jax_ep.layout_and_dispatch(x, after(state, ids), **options)
        else:
            second = jax_ep.dispatch(x, layout)
        x = x + jnp.where(second.tokens[0, 0] == -77, 2, 1)
        out = jax_ep.combine(second.tokens.astype(jnp.float32), layout)

        receives = rank == turn
        row = jnp.arange(capacity, dtype=jnp.int32)
        token, choice = row % total, row // total  # the rows of an expert are in the tokens' order
        flat_tokens = rank * num_tokens + jnp.arange(num_tokens, dtype=jnp.int32)
        bad_first = receives & (first.tokens != rows(2 * call, token)).any(axis=1)
        bad_second = receives & (second.tokens != rows(2 * call + 1, token)).any(axis=1)
        # Sums of K rows are below 2**24, so exact in float32.
        sums = (top_k * rows(2 * call + 1, flat_tokens)).astype(jnp.float32)
        bad = [
            layout.recv_src != jnp.where(receives, token * top_k + choice, -1),
            (choice == 0) & bad_first,
            (choice == 0) & bad_second,
            (choice > 0) & (bad_first | bad_second),
            (out != sums).any(axis=1),
        ]
        return x, wrong + jnp.stack([b.sum(dtype=jnp.int32) for b in bad]), state

    def function(x: jax.Array, first_call: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        zero = lax.axis_index(AXIS) * 0
        carry: tuple[jax.Array, jax.Array, jax.Array] = lax.fori_loop(
            0,
            num_calls,
            lambda i, carry: one_call(i, carry, first_call),
            (x, jnp.zeros(len(RACE_CHECKS), jnp.int32) + zero, zero),
        )
        return carry

    return function


@functools.cache
def ahead(num_ranks: int, sizes: Race, num_turns: int) -> Any:
    """A function of one rank: (first turn, what its rows are too new by) -> how many were wrong.

    In a turn one rank has all the tokens. Their rows come back to it in many combines, to each of
    which it comes late, and it sends nothing: the others have no rows to wait for. (A layout needs
    the ids of all.) Who ran ahead would write over what that rank has yet to read.
    """
    num_tokens, hidden = sizes.num_tokens, sizes.hidden
    total = num_ranks * num_tokens

    def one_turn(i: Any, carry: Any, first_turn: Any, too_new: Any) -> Any:
        receiver = (first_turn + i) % num_ranks
        rank = lax.axis_index(AXIS)
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        elsewhere = (receiver + 1 + token % (num_ranks - 1)) % num_ranks  # an expert a rank
        ids = jnp.where(rank == receiver, elsewhere, -1)[:, None]
        layout = jax_ep.make_layout(ids, num_experts=num_ranks, axis_name=AXIS, capacity=total)
        row_token = layout.row_token % num_tokens

        def one_call(call: Any, carry: Any) -> Any:
            wrong, state = carry
            state = stall(jnp.where(rank == receiver, 6, 0), state)
            time = CALLS_OF_A_TURN * (first_turn + i) + call
            y = after(state, _race_rows(hidden, time + too_new, row_token)).astype(jnp.float32)
            out = jax_ep.combine(y, layout)
            right = _race_rows(hidden, time, token).astype(jnp.float32)
            bad = (out != jnp.where(rank == receiver, right, 0)).any(axis=1)
            return wrong + bad.sum(dtype=jnp.int32), state

        return lax.fori_loop(0, CALLS_OF_A_TURN, one_call, carry)

    def function(first_turn: jax.Array, too_new: jax.Array) -> jax.Array:
        zero = lax.axis_index(AXIS) * 0
        wrong, state = lax.fori_loop(
            0, num_turns, lambda i, carry: one_turn(i, carry, first_turn, too_new), (zero, zero)
        )
        return after(state, wrong)

    return function


def _race_rows(hidden: int, time: Any, flat_token: Any) -> jax.Array:
    """int32 [.., H]: the rows of these tokens, source rank * T + token, of that time."""
    return time + 3 * jnp.arange(hidden, dtype=jnp.int32) + 64 * flat_token[:, None]


CALLS_OF_A_TURN = 16
STORED_ON = "rows stored on"  # by the receiver; there are none if K is 1
RACE_CHECKS = (
    "recv_src",
    "rows of the first time",
    "rows of the second time",
    STORED_ON,
    "combined rows",
)


def race_rows(num_ranks: int, sizes: Race) -> NDArray[np.int32]:
    """int32 [R, T, H]: what the ranks begin with, before call 0."""
    flat_token = np.arange(num_ranks * sizes.num_tokens, dtype=np.int32)[:, None]
    rows = 3 * np.arange(sizes.hidden, dtype=np.int32) + 64 * flat_token
    return rows.reshape(num_ranks, sizes.num_tokens, sizes.hidden)
