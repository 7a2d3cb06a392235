"""Which ranks of a group are on one node: the order of ``combine``'s sums, and what is a network's.

What ``initialize`` was told counts, or the environment; else the hosts that the processes told each
other there. It is settled when a program is lowered, for a trace does not know the devices.
"""

import functools
import itertools
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_ep import compat, environment, group
from jax_ep._checks import checked_count

_MOST_RUNS = 4  # of ranks on a node, in a message

_usual = environment.ranks_per_node()
_chosen = _usual  # ranks per node; None: as the devices lie
_hosts: tuple[str, ...] | None = None  # by process, while they are joined


# What is known of this job ------------------------------------------------------------------------


def checked(value: int | None) -> int | None:
    """The argument of ``initialize``, or what holds without it."""
    if value is None:
        return _usual
    return checked_count("jax_ep.initialize: ranks_per_node", value)


def choose(ranks_per_node: int | None) -> None:
    """Takes what `checked` gave."""
    global _chosen
    _chosen = ranks_per_node


def as_told(ranks_per_node: int | None) -> str:
    """What a process tells the others."""
    return f"{ranks_per_node or 0} {socket.gethostname()}"


def learn(told: Sequence[str]) -> None:
    """Takes what all processes tell, in their order.

    Raises:
        RuntimeError: if they do not agree in how many ranks a node has.
    """
    global _chosen, _hosts
    counts, hosts = zip(*(text.split(" ", 1) for text in told), strict=True)
    for process, count in enumerate(counts):
        if count != counts[0]:
            first, other = ("None" if c == "0" else c for c in (counts[0], count))
            raise RuntimeError(
                "jax_ep.initialize: ranks_per_node (or JAX_EP_RANKS_PER_NODE) must be the same in "
                f"all processes; it is {first} in process 0 and {other} in process {process}"
            )
    _chosen, _hosts = int(counts[0]) or None, hosts


def on_this_host(process: int) -> list[bool]:
    """By process, whether it is on the host of this one, as they have told each other."""
    assert _hosts is not None
    return [host == _hosts[process] for host in _hosts]


def hosts() -> tuple[str, ...]:
    """The host's name of each process, as they have told each other."""
    assert _hosts is not None
    return _hosts


def chosen() -> int | None:
    """What counts in place of hosts, if something does."""
    return _chosen


def forget() -> None:
    """Leaves what `choose` and `learn` took."""
    global _chosen, _hosts
    _chosen, _hosts = _usual, None


# Of a program -------------------------------------------------------------------------------------


def ranks_per_node(ctx: Any, axis_name: tuple[str, ...], num_ranks: int, where: str) -> int:
    """How many ranks of each group, one after the other, are on one node, in a program.

    ``ctx`` is of its lowering; the rest as `of_mesh`.
    """
    return of_mesh(compat.lowering_mesh(ctx), axis_name, num_ranks, where)


def of_mesh(mesh: Any, axis_name: tuple[str, ...], num_ranks: int, where: str) -> int:
    """How many ranks of each group, one after the other, are on one node.

    Args:
        mesh: concrete, or abstract.
        axis_name: the EP axes.
        num_ranks: R.
        where: for the message.

    Returns:
        A divisor of R. R where nothing is known of hosts, as over an abstract mesh.

    Raises:
        ValueError: if what was chosen does not divide R, or as `on_each_node` does.
    """
    if _chosen is not None:
        if _chosen < num_ranks and num_ranks % _chosen:
            raise ValueError(
                f"{where}: jax_ep.initialize(ranks_per_node={_chosen}), or JAX_EP_RANKS_PER_NODE, "
                f"must divide the ranks of every group that has more; got a group of {num_ranks}"
            )
        return min(_chosen, num_ranks)
    if _hosts is None:
        return num_ranks
    return _by_hosts(mesh, axis_name, _hosts, where)


@functools.lru_cache(maxsize=256)  # not once a call: it looks at every device
def _by_hosts(mesh: Any, axis_name: tuple[str, ...], hosts: tuple[str, ...], where: str) -> int:
    processes = group.numbers_by_group(mesh, axis_name) >> 32
    if processes.max() >= len(hosts):  # not of this job: it is refused where it runs
        return int(processes.shape[1])
    return on_each_node(np.array(hosts)[processes], where)


def on_each_node(nodes: np.ndarray, where: str) -> int:
    """How many ranks, one after the other, lie on each node: N.

    Args:
        nodes: [groups, R], what the node of each rank is called.
        where: for the message.

    Raises:
        ValueError: if a group has not N ranks, one after the other, on each of its nodes.
    """
    num_ranks = nodes.shape[1]
    size = next((r for r in range(num_ranks) if nodes[0, r] != nodes[0, 0]), num_ranks)

    def is_even(ranks: np.ndarray) -> bool:
        blocks = [set(ranks[r : r + size]) for r in range(0, num_ranks, size)]
        return (
            num_ranks % size == 0
            and all(len(block) == 1 for block in blocks)
            and len(set().union(*blocks)) == len(blocks)
        )

    uneven = next((i for i, ranks in enumerate(nodes) if not is_even(ranks)), None)
    if uneven is None:
        return size
    groups = "; ".join(f"group {i} has {_runs(nodes[i])}" for i in sorted({0, uneven}))
    raise ValueError(
        f"{where}: each group must have as many ranks, one after the other, on each of its nodes, "
        f"the same number in all groups; {groups}. Order the devices of the mesh like that, as "
        "jax.make_mesh does, or say how many ranks count as a node: "
        "jax_ep.initialize(ranks_per_node=...)"
    )


def _runs(nodes: np.ndarray) -> str:
    """Which ranks lie on which node, for a message."""
    begins = [0, *(np.flatnonzero(nodes[1:] != nodes[:-1]) + 1).tolist(), len(nodes)]
    named = [
        f"{begin}{f' to {end - 1}' if end - begin > 1 else ''} on {nodes[begin]!s}"
        for begin, end in itertools.pairwise(begins)
    ]
    more = f" and {len(named) - _MOST_RUNS} runs more" if len(named) > _MOST_RUNS else ""
    return f"ranks {', '.join(named[:_MOST_RUNS])}{more}"
