"""The time of dispatch or combine, from a routing's counts and what a machine can do.

In two hops a row crosses the network once per destination node, to the rank of the same index
there, which forwards it over NVLink to each other rank that wants it. The network's part is
simulated chunk by chunk, with credits; NVLink and SMs are loads, as if all overlapped perfectly,
and the longest part is the time. Combine goes the same ways back and is computed as if it went
there: jobs that pass a line of stations backwards take as long.

Directly (low latency) a row goes straight to each rank, and all is loads.
"""

import dataclasses
import heapq
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_ep.simulate.routed import Problem, Routed

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a rank can do; rates in bytes per second, times in seconds.

    Attributes:
        nvlink: to and from the other ranks of its node, each direction.
        nic: to and from other nodes, each direction.
        nic_latency: from the last byte that leaves to the last that has come; also of a credit.
        start: of a call in two hops, beside all that grows with rows.
        start_direct: the same of a direct call.
        sm_push: what one SM sends over NVLink.
        sm_store: what one SM stores in its own memory, of rows that it has read.
    """

    nvlink: float
    nic: float
    nic_latency: float
    start: float
    start_direct: float
    sm_push: float
    sm_store: float


@dataclasses.dataclass(frozen=True)
class Design:
    """How an operation in two hops goes about it.

    Attributes:
        chunk_rows: that cross the network together.
        credits: chunks from a rank to a node that are under way or not yet forwarded.
        num_sms: of each rank.
        expands: whether a received row is stored once per choice, in expert order, or once.
    """

    chunk_rows: int = 16
    credits: int = 8
    num_sms: int = 24
    expands: bool = True


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds of a call on the slowest rank, and of its parts, which overlap."""

    seconds: float
    parts: Mapping[str, float]

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def two_hops(routed: Routed, row_bytes: float, machine: Machine, design: Design) -> Time:
    """Dispatch, or combine, of rows with so many bytes."""
    num_nodes, size = routed.problem.num_nodes, routed.problem.ranks_per_node
    node, index = np.arange(num_nodes), np.arange(size)
    # [source node, source index, destination node, destination index]; a row for the rank that has
    # it, or to which it comes from the network, crosses no NVLink.
    over_nvlink = routed.to_rank.reshape(num_nodes, size, num_nodes, size) * row_bytes
    over_nvlink[:, index, :, index] = 0
    forwarded = over_nvlink.sum(axis=3)  # by the rank of the source's index on the destination node
    network = routed.to_node.reshape(num_nodes, size, num_nodes) * row_bytes
    network[node, :, node] = 0

    stored = (routed.choices if design.expands else routed.to_rank).sum(axis=0) * row_bytes
    staged = network.sum(axis=2).reshape(-1)
    sent, received = forwarded.sum(axis=0).T.reshape(-1), over_nvlink.sum(axis=(0, 1)).reshape(-1)
    on_sms = sent / machine.sm_push + (stored + staged) / machine.sm_store
    parts = {
        "NVLink": float(max(sent.max(), received.max())) / machine.nvlink,
        "SMs": float(on_sms.max()) / design.num_sms,
    }
    if num_nodes > 1:
        chunk_bytes = design.chunk_rows * row_bytes
        parts["network"] = max(
            _network(network[:, i], forwarded[:, i], chunk_bytes, machine, design.credits)
            for i in index
        )
    return Time(machine.start + max(parts.values()), parts)


_SENT, _ARRIVED, _CREDIT = range(3)


def _network(
    sent: Array, forwarded: Array, chunk_bytes: float, machine: Machine, credits: int
) -> float:
    """Seconds until ranks of one index, one a node, have sent and forwarded what crosses.

    Args:
        sent: [source, destination] bytes over the network, 0 on the diagonal.
        forwarded: [source, destination] bytes that come of them over NVLink.
        chunk_bytes: of a chunk; the last of a destination may be smaller.
        machine: the rates.
        credits: chunks of a source and destination that are not yet forwarded.
    """
    num_nodes = len(sent)
    left = sent.tolist()
    fan_out = (forwarded / np.maximum(sent, 1)).tolist()
    room = [[credits] * num_nodes for _ in range(num_nodes)]
    is_sending, last = [False] * num_nodes, list(range(num_nodes))  # whom it served last
    came, forwarded_at = [0.0] * num_nodes, [0.0] * num_nodes  # when each station is free again
    events: list[tuple[Any, ...]] = []

    def send(source: int, now: float) -> None:
        """Starts a chunk to the next node in turn that has some left and room for it."""
        for step in range(1, num_nodes + 1):
            to = (last[source] + step) % num_nodes
            if left[source][to] > 0 and room[source][to] > 0 and not is_sending[source]:
                num_bytes = min(chunk_bytes, left[source][to])
                left[source][to] -= num_bytes
                room[source][to] -= 1
                last[source], is_sending[source] = to, True
                end = now + num_bytes / machine.nic
                heapq.heappush(events, (end, _SENT, source, to, 0.0))
                heapq.heappush(events, (end + machine.nic_latency, _ARRIVED, source, to, num_bytes))

    for source in range(num_nodes):
        send(source, 0.0)
    while events:
        now, kind, source, to, num_bytes = heapq.heappop(events)
        if kind == _ARRIVED:
            came[to] = max(now, came[to] + num_bytes / machine.nic)
            seconds = num_bytes * fan_out[source][to] / machine.nvlink
            forwarded_at[to] = max(came[to], forwarded_at[to]) + seconds
            back = forwarded_at[to] + machine.nic_latency
            heapq.heappush(events, (back, _CREDIT, source, to, 0.0))
        elif kind == _SENT:
            is_sending[source] = False
            send(source, now)
        else:
            room[source][to] += 1
            send(source, now)
    return max(forwarded_at)


def directly(
    routed: Routed, row_bytes: float, machine: Machine, *, once_per_choice: bool = False
) -> Time:
    """A call that sends each row straight to its rank, or once for each choice."""
    rows = (routed.choices if once_per_choice else routed.to_rank) * row_bytes
    rank = np.arange(routed.problem.num_ranks)
    node = rank // routed.problem.ranks_per_node
    is_near = node[:, None] == node
    near, far = np.where(is_near & (rank[:, None] != rank), rows, 0), np.where(is_near, 0, rows)

    def largest(moved: Array) -> float:
        return float(max(moved.sum(axis=0).max(), moved.sum(axis=1).max()))

    parts = {"NVLink": largest(near) / machine.nvlink, "network": largest(far) / machine.nic}
    return Time(machine.start_direct + max(parts.values()), parts)


def memory_bytes(
    problem: Problem, row_bytes: int, design: Design, direct_tokens: int
) -> dict[str, int]:
    """Of a rank, beside what goes in and comes out.

    staging: the chunks of all credits, to and from each other node. slots: for each token of each
    rank in a direct call. tables: the counts of all ranks and experts.
    """
    chunks = 2 * (problem.num_nodes - 1) * design.credits
    return {
        "staging": chunks * design.chunk_rows * row_bytes,
        "slots": problem.num_ranks * direct_tokens * row_bytes,
        "tables": 4 * problem.num_ranks * problem.num_experts,
    }
