"""What is measured: a point of the parameter space, its expert ids, and what they make move."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

import jax_ep
from jax_ep import reference, routing

SCALE_BLOCK = reference.QUANTIZATION_GROUP
_MOST_COPIES = 8  # of a row: from here on the rate of a copy is that of its stores alone

ROUTINGS = ("uniform", "zipf", "group-limited")
NUM_GROUPS, TOP_GROUPS = 8, 4  # DeepSeek-V3's, of "group-limited"
EXPERT_PREFIX = "expert-"  # of a capacity that each expert has for itself
FP8_MODES = (
    "none",
    "float32",
    "power_of_two",
    "float32+dequantize",
    "power_of_two+dequantize",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of the parameter space.

    Attributes:
        tokens: T, per rank.
        hidden: H, channels of a row.
        top_k: K, experts per token.
        routing: one of ROUTINGS.
        capacity: "tight" (exactly what the fullest rank receives), "default", or a factor of the
            mean load as text; with "expert-" before it ("expert-tight", "expert-1.25") the room of
            each expert.
        dtype: of the rows.
        fp8: one of FP8_MODES, how dispatch sends rows.
        num_sms: SMs an operation may use; None leaves it to the operation.
    """

    tokens: int
    hidden: int
    top_k: int
    routing: str
    capacity: str
    dtype: str
    fp8: str
    num_sms: int | None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in ``dtype``."""
        return self.hidden * int(jnp.dtype(self.dtype).itemsize)

    @property
    def dequantizes(self) -> bool:
        """Whether fp8 rows come out in ``dtype`` again."""
        return self.fp8.endswith("+dequantize")

    @property
    def wire_row_bytes(self) -> int:
        """Bytes of a row as dispatch sends it.

        fp8 rows carry a float32 scale per 128 channels, filled up to 16 bytes:
        cuda/core/wire_row.h.
        """
        if self.fp8 == "none":
            return self.row_bytes
        return self.hidden + -(-self._scale_bytes // 16) * 16

    @property
    def received_row_bytes(self) -> int:
        """Bytes of a row, with its scales, as dispatch hands it out."""
        if self.fp8 == "none" or self.dequantizes:
            return self.row_bytes
        return self.hidden + self._scale_bytes

    @property
    def _scale_bytes(self) -> int:
        return -(-self.hidden // SCALE_BLOCK) * 4


def expert_ids(
    point: Point, num_ranks: int, num_experts: int, seed: int, zipf_exponent: float
) -> NDArray[np.int32]:
    """Distinct experts for every token, int32 [R, T, K].

    "uniform": every set of K experts is as likely as any other. "zipf": the experts' popularity is
    1, 1 / 2**s, 1 / 3**s, .. in a random order that all ranks share, and a token's K experts are
    drawn by it without replacement (the K largest of log popularity plus Gumbel noise).
    "group-limited": ``jax_ep.routing.group_limited`` of random logits, the best 4 of 8 groups of
    experts.

    Raises:
        ValueError: "group-limited" asks for more experts, as ``group_limited`` says.
    """
    rng = np.random.default_rng(seed)
    if point.routing == "group-limited":
        choose = jax.jit(
            functools.partial(
                routing.group_limited,
                top_k=point.top_k,
                num_groups=NUM_GROUPS,
                top_groups=TOP_GROUPS,
            )
        )
        shape = (point.tokens, num_experts)
        chosen = [choose(rng.standard_normal(shape, np.float32))[0] for _ in range(num_ranks)]
        return np.stack(chosen)
    log_popularity = np.zeros(num_experts, np.float32)
    if point.routing == "zipf":
        order = rng.permutation(num_experts)
        log_popularity[order] = -zipf_exponent * np.log(np.arange(1, num_experts + 1))
    ids = np.empty((num_ranks, point.tokens, point.top_k), np.int32)
    for rank in range(num_ranks):
        noise = rng.gumbel(size=(point.tokens, num_experts)).astype(np.float32)
        ids[rank] = np.argsort(-(log_popularity + noise), axis=1)[:, : point.top_k]
    return ids


def room(point: Point, ids: NDArray[np.int32], num_experts: int, alignment: int) -> dict[str, int]:
    """The room that ``point`` asks for, as arguments of ``make_layout``: none for its default."""
    num_ranks = ids.shape[0]
    kind = point.capacity.removeprefix(EXPERT_PREFIX)
    is_of_each_expert = kind != point.capacity
    name = "expert_capacity" if is_of_each_expert else "capacity"
    if kind == "default":
        return {}
    if kind == "tight":
        load = np.bincount(ids.ravel(), minlength=num_experts)
        padded = -(-load // alignment) * alignment
        if not is_of_each_expert:
            padded = padded.reshape(num_ranks, -1).sum(axis=1)
        return {name: max(int(padded.max()), alignment)}
    compute = jax_ep.expert_capacity if is_of_each_expert else jax_ep.capacity
    rows = compute(
        point.tokens,
        point.top_k,
        num_ranks,
        float(kind),
        num_experts=num_experts,
        expert_alignment=alignment,
    )
    return {name: rows}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Rows that must move, of the rank that has most. Computed from the oracle's layout.

    Attributes:
        layout: the oracle's layout.
        kept_rows: rows that a rank keeps.
        distinct_rows: (source rank, token) pairs that a rank receives from anywhere: its logical
            traffic.
        wire_rows: the same from other ranks, or sent to other ranks if that is more.
        source_tokens: tokens of a rank that have a kept row anywhere.
        dropped_rows: of the whole group.
    """

    layout: reference.ReferenceLayout
    kept_rows: int
    distinct_rows: int
    wire_rows: int
    source_tokens: int
    dropped_rows: int

    @property
    def copies(self) -> int:
        """F, rows written per distinct row that arrives, rounded."""
        return max(1, round(self.kept_rows / max(1, self.distinct_rows)))


def measure_traffic(
    ids: NDArray[np.int32], num_experts: int, room: dict[str, int], alignment: int
) -> Traffic:
    """Counts the rows of these ids."""
    layout = reference.make_layout(
        ids,
        num_experts=num_experts,
        capacity=room.get("capacity"),
        expert_capacity=room.get("expert_capacity"),
        expert_alignment=alignment,
    )
    num_ranks, num_tokens, top_k = ids.shape
    pairs = np.zeros((num_ranks, num_ranks, num_tokens), bool)  # destination, source rank, token
    for rank in range(num_ranks):
        source = layout.recv_src[rank]
        pairs[rank].reshape(-1)[source[source >= 0] // top_k] = True
    between = pairs.sum(axis=2)
    remote = between - np.diag(np.diag(between))
    return Traffic(
        layout=layout,
        kept_rows=int(layout.num_recv.max()),
        distinct_rows=int(between.sum(axis=1).max()),
        wire_rows=int(max(remote.sum(axis=1).max(), remote.sum(axis=0).max())),
        source_tokens=int(pairs.any(axis=0).sum(axis=1).max()),
        dropped_rows=int(layout.num_dropped.sum()),
    )


@dataclasses.dataclass(frozen=True)
class NodeTraffic:
    """What crosses a network, if nothing is dropped: a row once for each node but its own.

    Attributes:
        nodes_per_token: on which a token has an expert, the mean.
        rows: (token, other node) pairs, of the rank that sends most or whose index on its node
            receives most.
    """

    nodes_per_token: float
    rows: int


def measure_node_traffic(
    ids: NDArray[np.int32], num_experts: int, ranks_per_node: int
) -> NodeTraffic:
    """Counts rows between nodes of so many ranks, one after the other."""
    num_ranks, num_tokens, _ = ids.shape
    nodes = ids // (num_experts // num_ranks * ranks_per_node)
    has = (nodes[..., None] == np.arange(num_ranks // ranks_per_node)).any(axis=2)  # [R, T, nodes]
    to_node = has.sum(axis=1)  # [R, nodes]
    own = np.arange(num_ranks) // ranks_per_node
    crossing = to_node.copy()
    crossing[np.arange(num_ranks), own] = 0
    # A row goes to the rank of the same index there, which hands it on.
    arriving = crossing.reshape(-1, ranks_per_node, crossing.shape[1]).sum(axis=0)
    return NodeTraffic(
        nodes_per_token=float(to_node.sum() / (num_ranks * num_tokens)),
        rows=int(max(crossing.sum(axis=1).max(), arriving.max())),
    )


@dataclasses.dataclass(frozen=True)
class Movement:
    """What one pass over the rows must move, of the rank that has most.

    Attributes:
        wire_bytes: to or from other ranks, one direction.
        logical_bytes: the same with the rank's own rows.
        memory_bytes: read from and written to device memory at least: each row that dispatch
            hands out is written once, zeroed ones too, and each token's row read once where it
            lives; combine reads each kept row once and writes each token's row once.
        read_bytes: loaded by SMs at least, from a memory or a cache; 0 where nothing is known.
        stored_bytes: written by SMs in the rank's own memory at least; likewise.
        copies: F, how often a row that is loaded once is stored: what the rate of stores depends
            on.
    """

    wire_bytes: int
    logical_bytes: int
    memory_bytes: int
    read_bytes: int = 0
    stored_bytes: int = 0
    copies: int = 1


def dispatch_movement(point: Point, traffic: Traffic, *, expand: bool = True) -> Movement:
    """Of dispatch, or of combine's gradient without fp8."""
    layout = traffic.layout
    rows = layout.capacity if expand else layout.num_ranks * layout.num_tokens + 1
    stored = rows * point.received_row_bytes
    return Movement(
        wire_bytes=traffic.wire_rows * point.wire_row_bytes,
        logical_bytes=traffic.distinct_rows * point.wire_row_bytes,
        memory_bytes=stored + traffic.source_tokens * point.row_bytes,
        read_bytes=traffic.source_tokens * point.row_bytes,
        stored_bytes=stored,
        copies=traffic.copies if expand else 1,
    )


def combine_movement(point: Point, traffic: Traffic, *, expand: bool = True) -> Movement:
    """Of combine, or of dispatch's gradient: rows in ``dtype`` whatever dispatch sent.

    SMs read each kept row and each sum that a peer has sent, and store each token's row. What they
    store at peers counts on the wire alone: whether it shares a limit with the other stores has not
    been measured.
    """
    rows = traffic.kept_rows if expand else traffic.distinct_rows
    return Movement(
        wire_bytes=traffic.wire_rows * point.row_bytes,
        logical_bytes=traffic.distinct_rows * point.row_bytes,
        memory_bytes=(rows + point.tokens) * point.row_bytes,
        read_bytes=(rows + traffic.wire_rows) * point.row_bytes,
        stored_bytes=point.tokens * point.row_bytes,
        copies=_MOST_COPIES,
    )


def point_fields(point: Point) -> dict[str, Any]:
    """The point as a JSON object."""
    return dataclasses.asdict(point)
