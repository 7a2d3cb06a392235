"""What is timed: the package's verbs, and what a JAX user has without it.

Each is a per-shard function with its operands. Metadata that a baseline needs but JAX leaves to its
user is prepared outside, which favours the baseline, unless its name says that it is included.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

import jax_ep
from jax_ep import compat
from jax_ep.bench.traffic import (
    EXPERT_PREFIX,
    Movement,
    Point,
    Traffic,
    combine_movement,
    dispatch_movement,
)

RAGGED = "sort+ragged_all_to_all"
NOT_EXPANDED = ("dispatch expand=False", "dispatch+gradient expand=False")
AXIS = "ep"


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """A per-shard function and what it must move.

    Attributes:
        name: for the table.
        fn: takes the shards of ``args``.
        args: global arrays, each split over the ranks.
        movements: the passes over rows that the operation cannot do without, one after the other.
        fresh: which of ``args`` differs from call to call: an array, and a small one if there is.
        baseline: whether it is JAX's own.
    """

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    movements: tuple[Movement, ...]
    fresh: int = 0
    baseline: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """The operands of a point, on the mesh. Global shapes; R ranks.

    Attributes:
        ids: int32 [R * T, K].
        weights: float32 [R * T, K].
        x: [R * T, H], tokens.
        y: [R * C, H], what the experts return.
        row_weights: float32 [R * C].
        cotangent: [R * T, H], of combine's result.
    """

    ids: jax.Array
    weights: jax.Array
    x: jax.Array
    y: jax.Array
    row_weights: jax.Array
    cotangent: jax.Array


def make_data(point: Point, mesh: Mesh, ids: NDArray[np.int32], capacity: int, seed: int) -> Data:
    """Random operands, made on the devices."""
    num_ranks = mesh.size
    sharding = NamedSharding(mesh, P(AXIS))
    keys = iter(jax.random.split(jax.random.key(seed), 5))

    def normal(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        make = jax.jit(lambda key: jax.random.normal(key, shape, dtype), out_shardings=sharding)
        result: jax.Array = make(next(keys))
        return result

    rows = num_ranks * point.tokens
    return Data(
        ids=put(ids.reshape(rows, -1), mesh),
        weights=normal((rows, point.top_k), jnp.float32),
        x=normal((rows, point.hidden), point.dtype),
        y=normal((num_ranks * capacity, point.hidden), point.dtype),
        row_weights=normal((num_ranks * capacity,), jnp.float32),
        cotangent=normal((rows, point.hidden), point.dtype),
    )


def put(array: NDArray[Any], mesh: Mesh) -> jax.Array:
    """An array that all processes have, split over the ranks."""
    sharding = NamedSharding(mesh, P(AXIS))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _pack(tree: Any) -> Any:
    """Gives every array a leading axis of 1, so that it can leave and enter ``shard_map``."""
    return jax.tree.map(lambda a: a[None], tree)


def _unpack(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.reshape(a.shape[1:]), tree)


def jax_ep_operations(
    point: Point,
    mesh: Mesh,
    data: Data,
    traffic: Traffic,
    *,
    num_experts: int,
    room: dict[str, Any],
    alignment: int,
) -> list[Operation]:
    """The verbs alone and together, as a user calls them, with the room of ``traffic.room``."""
    fp8: dict[str, Any] = {}
    if point.fp8 != "none":
        fp8 = {"fp8": point.fp8.removesuffix("+dequantize"), "dequantize": point.dequantizes}

    options: dict[str, Any] = {
        "num_experts": num_experts,
        "axis_name": AXIS,
        "expert_alignment": alignment,
        "num_sms": point.num_sms,
        **room,
    }

    def make_layout(ids: jax.Array) -> jax_ep.Layout:
        return jax_ep.make_layout(ids, **options)

    def arrays(received: jax_ep.Dispatched) -> tuple[jax.Array, ...]:
        return tuple(a for a in received[:3] if a is not None)

    def layout_only(ids: jax.Array) -> Any:
        layout = make_layout(ids)
        return layout.send_row, layout.recv_src

    def dispatch(layout: Any, x: jax.Array, weights: jax.Array) -> Any:
        return arrays(jax_ep.dispatch(x, _unpack(layout), weights, **fp8))

    def dispatch_not_expanded(layout: Any, x: jax.Array, weights: jax.Array) -> Any:
        return arrays(jax_ep.dispatch(x, _unpack(layout), weights, expand=False, **fp8))

    def not_expanded_and_gradient(layout: Any, x: jax.Array, weights: jax.Array) -> Any:
        received, vjp = jax.vjp(functools.partial(dispatch_not_expanded, layout), x, weights)
        return vjp(received)

    def layout_dispatch(ids: jax.Array, x: jax.Array, weights: jax.Array) -> Any:
        return arrays(jax_ep.dispatch(x, make_layout(ids), weights, **fp8))

    def layout_and_dispatch(ids: jax.Array, x: jax.Array, weights: jax.Array) -> Any:
        layout, received = jax_ep.layout_and_dispatch(x, ids, weights, **options, **fp8)
        return layout.recv_src, *arrays(received)

    def combine(layout: Any, y: jax.Array, weights: jax.Array) -> jax.Array:
        return jax_ep.combine(y, _unpack(layout), weights)

    def forward(ids: jax.Array, x: jax.Array, weights: jax.Array) -> jax.Array:
        layout = make_layout(ids)
        received = jax_ep.dispatch(x, layout, weights, **fp8)
        return jax_ep.combine(received.tokens, layout, received.weights)

    def round_trip(ids: jax.Array, x: jax.Array, weights: jax.Array, *y: jax.Array) -> Any:
        """With ``y`` experts give that; else what they get."""
        layout, received = jax_ep.layout_and_dispatch(x, ids, weights, **options, **fp8)
        if not y:
            return jax_ep.combine(received.tokens, layout, received.weights)
        return jax_ep.combine(y[0], layout, received.weights), *arrays(received)

    def forward_backward(
        ids: jax.Array, x: jax.Array, weights: jax.Array, cotangent: jax.Array
    ) -> Any:
        out, vjp = jax.vjp(functools.partial(round_trip, ids), x, weights)
        return out, *vjp(cotangent)

    sent_once = dispatch_movement(point, traffic, expand=False)
    returned_once = combine_movement(point, traffic, expand=False)
    sent = dispatch_movement(point, traffic)
    returned = combine_movement(point, traffic)
    # The gradient of combine spreads the cotangent's rows in their own type, reads y beside them
    # and writes dy; that of dispatch collects rows as combine does.
    plain = dispatch_movement(dataclasses.replace(point, fp8="none"), traffic)
    combine_gradient = dataclasses.replace(
        plain,
        memory_bytes=plain.memory_bytes + traffic.kept_rows * point.row_bytes,
        read_bytes=plain.read_bytes + traffic.kept_rows * point.row_bytes,
    )
    layout_args = (data.ids,)
    send_args = (data.x, data.weights)
    operations = []
    if point.fp8 == "none":
        operations.append(Operation("make_layout", layout_only, layout_args, ()))
    layout = jax.jit(
        jax.shard_map(
            lambda ids: _pack(make_layout(ids)), mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)
        )
    )(data.ids)
    operations += [
        Operation("dispatch", dispatch, (layout, *send_args), (sent,), fresh=2),
        Operation(
            NOT_EXPANDED[0], dispatch_not_expanded, (layout, *send_args), (sent_once,), fresh=2
        ),
        Operation("make_layout+dispatch", layout_dispatch, (*layout_args, *send_args), (sent,)),
        Operation("layout_and_dispatch", layout_and_dispatch, (*layout_args, *send_args), (sent,)),
    ]
    if point.fp8 == "none":
        operations.append(
            Operation("combine", combine, (layout, data.y, data.row_weights), (returned,), fresh=2)
        )
    gives_back = point.fp8 == "none" or point.dequantizes  # what was received can be combined
    y = () if gives_back else (data.y,)
    operations.append(
        Operation("round trip", round_trip, (*layout_args, *send_args, *y), (sent, returned))
    )
    if gives_back:
        operations += [
            Operation(
                NOT_EXPANDED[1],
                not_expanded_and_gradient,
                (layout, *send_args),
                (sent_once, returned_once),
                fresh=2,
            ),
            Operation(
                "make_layout+dispatch+combine",
                forward,
                (*layout_args, *send_args),
                (sent, returned),
            ),
            Operation(
                "forward+backward",
                forward_backward,
                (*layout_args, *send_args, data.cotangent),
                (sent, returned, combine_gradient, returned),
            ),
        ]
    return operations


# What a user has without jax_ep -------------------------------------------------------------------


def take_rows(rows: jax.Array, index: jax.Array) -> jax.Array:
    """Rows in the order of ``index`` [C]; zero where it is beyond them."""
    taken: jax.Array = rows.at[index].get(mode="fill", fill_value=0)
    return taken


def exchange(send: jax.Array) -> jax.Array:
    """``lax.all_to_all`` of [R, n, H]: n rows for every rank."""
    received: jax.Array = lax.all_to_all(send, AXIS, 0, 0)
    return received


def exchange_and_order(send: jax.Array, index: jax.Array) -> jax.Array:
    """The same, then the gather that puts the rows in expert order; index [1, C]."""
    received = exchange(send)
    return take_rows(received.reshape(-1, received.shape[-1]), index.reshape(-1))


def gather_and_order(x: jax.Array, index: jax.Array) -> jax.Array:
    """Every rank gets all ranks' tokens, and picks its experts' rows."""
    return take_rows(lax.all_gather(x, AXIS, tiled=True), index.reshape(-1))


def sort_and_ragged(
    ids: jax.Array, x: jax.Array, *, num_experts: int, capacity: int, alignment: int
) -> jax.Array:
    """Dispatch by ``lax.ragged_all_to_all``: sort, counts from all ranks, offsets, rows.

    A segment per expert, so that rows arrive in expert order. A row crosses once per expert. The
    result is that of ``jax_ep.dispatch`` if no row is dropped (overrun is undefined).
    """
    num_ranks, rank = lax.axis_size(AXIS), lax.axis_index(AXIS)
    num_local = num_experts // num_ranks
    flat = ids.reshape(-1)
    rows = x[jnp.argsort(flat, stable=True) // ids.shape[1]]
    send_sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
    counts = lax.all_gather(send_sizes, AXIS)  # [R, E]
    padded = -(-counts.sum(axis=0) // alignment) * alignment
    padded = padded.reshape(num_ranks, num_local)
    starts = (jnp.cumsum(padded, axis=1) - padded).reshape(-1)
    before = jnp.sum(jnp.where(jnp.arange(num_ranks)[:, None] < rank, counts, 0), axis=0)
    own = lax.dynamic_slice_in_dim(counts, rank * num_local, num_local, axis=1)
    received: jax.Array = lax.ragged_all_to_all(
        rows,
        compat.vary_over(jnp.zeros((capacity, x.shape[1]), x.dtype), (AXIS,)),
        (jnp.cumsum(send_sizes) - send_sizes).astype(jnp.int32),
        send_sizes,
        (starts + before).astype(jnp.int32),
        own.reshape(-1).astype(jnp.int32),
        axis_name=AXIS,
    )
    return received


def _send_slots(traffic: Traffic) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """How to dispatch by all_to_all without sending a row twice to a rank.

    Returns:
        tokens [R, R, n], the tokens that a source sends to a destination (0 where there are fewer),
        and index [R, C], where a destination finds each of its rows among the R * n that it
        receives; R * n where it has none.
    """
    layout = traffic.layout
    num_ranks, num_tokens, top_k = layout.topk_idx.shape
    slot_of = np.full((num_ranks, num_ranks * num_tokens), -1, np.int64)
    lists = []
    for destination in range(num_ranks):
        source = layout.recv_src[destination]
        pairs = np.unique(source[source >= 0] // top_k)
        per_source = [pairs[pairs // num_tokens == rank] for rank in range(num_ranks)]
        for members in per_source:
            slot_of[destination, members] = np.arange(members.size)
        lists.append(per_source)
    most = max(1, max(members.size for per_source in lists for members in per_source))
    tokens = np.zeros((num_ranks, num_ranks, most), np.int32)
    index = np.full((num_ranks, layout.capacity), num_ranks * most, np.int32)
    for destination in range(num_ranks):
        for rank in range(num_ranks):
            members = lists[destination][rank]
            tokens[rank, destination, : members.size] = members % num_tokens
        source = layout.recv_src[destination]
        valid = source >= 0
        pair = source[valid] // top_k
        index[destination, valid] = pair // num_tokens * most + slot_of[destination, pair]
    return tokens, index


def baseline_operations(
    point: Point,
    mesh: Mesh,
    data: Data,
    traffic: Traffic,
    *,
    num_experts: int,
    alignment: int,
) -> list[Operation]:
    """JAX's own collectives for the rows of ``dispatch``."""
    num_ranks, num_tokens = mesh.size, point.tokens
    layout = traffic.layout
    row = point.row_bytes
    stored = layout.capacity * row

    # As many rows as dispatch sends to other ranks, spread evenly.
    even = -(-traffic.wire_rows // (num_ranks - 1)) if num_ranks > 1 else num_tokens
    even = max(1, even)
    tokens, index = _send_slots(traffic)

    def pick(which: NDArray[np.int32]) -> jax.Array:
        """[R * R, n, H]: the rows that each rank sends to each."""
        take = jax.jit(
            jax.shard_map(lambda x, which: x[which], mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS))
        )
        picked: jax.Array = take(data.x, put(which.reshape(num_ranks * num_ranks, -1), mesh))
        return picked

    def even_tokens(count: int) -> NDArray[np.int32]:
        numbers = np.arange(count, dtype=np.int32) % num_tokens
        return np.tile(numbers, (num_ranks, num_ranks, 1))

    def exchanged(rows: int, memory: int) -> tuple[Movement, ...]:
        return (Movement((num_ranks - 1) * rows * row, num_ranks * rows * row, memory),)

    source = layout.recv_src
    everywhere = np.where(source >= 0, source // point.top_k, num_ranks * num_tokens)
    most = tokens.shape[2]
    operations = [
        Operation(
            "all_to_all",
            exchange,
            (pick(even_tokens(even)),),
            exchanged(even, 2 * num_ranks * even * row),
            baseline=True,
        ),
        Operation(
            "all_to_all+gather",
            exchange_and_order,
            (pick(tokens), put(index, mesh)),
            exchanged(most, num_ranks * most * row + stored),
            baseline=True,
        ),
        Operation(
            "all_gather+gather",
            gather_and_order,
            (data.x, put(everywhere.astype(np.int32), mesh)),
            (
                Movement(
                    (num_ranks - 1) * num_tokens * row,
                    num_ranks * num_tokens * row,
                    num_ranks * num_tokens * row + stored,
                ),
            ),
            baseline=True,
        ),
    ]
    if traffic.dropped_rows == 0 and not point.capacity.startswith(EXPERT_PREFIX):
        kept, own = _row_counts(traffic)
        operations.append(
            Operation(
                RAGGED,
                lambda ids, x: sort_and_ragged(
                    ids,
                    x,
                    num_experts=num_experts,
                    capacity=layout.capacity,
                    alignment=alignment,
                ),
                (data.ids, data.x),
                (Movement((kept - own) * row, kept * row, num_tokens * row + stored),),
                baseline=True,
            )
        )
    return operations


def _row_counts(traffic: Traffic) -> tuple[int, int]:
    """Rows that the fullest rank keeps, and how many of them are its own tokens'."""
    layout = traffic.layout
    rank = int(np.argmax(layout.num_recv))
    source = layout.recv_src[rank]
    per_rank = layout.num_tokens * layout.top_k
    own = int(np.sum(source[source >= 0] // per_rank == rank))
    return int(layout.num_recv[rank]), own
