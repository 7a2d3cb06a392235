"""When each block of a kernel did what: read from a timeline build, summed up, and drawn.

A build with JAX_EP_TIMELINE notes for each block and role of an operation's newest call when an
event happened first and last, by the device's own clock (cuda/memory/timeline.h names them). Times
here are relative to the first block's start on the same device, so that devices' clocks need not
agree.
"""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_ep.bench import measure
from jax_ep.bench.operations import Operation

BUILD_COMMAND = "pip install -e . -C cmake.define.JAX_EP_CUDA=ON -C cmake.define.JAX_EP_TIMELINE=ON"
_FENCE = ("fence begin", "fence end")
_EVENT_COLOURS = [f"C{i}" for i in range(10)] + ["black", "gold", "navy", "deeppink"]
_CALLS = 5  # in a chain, so that the newest one begins on all ranks at about the same time


@dataclasses.dataclass(frozen=True)
class Mark:
    """An event of a role in a block.

    Attributes:
        device: CUDA device.
        operation: the kernel.
        block: of its grid.
        role: of the block's warps, those that do the same.
        event: what happened.
        first_ns: when it did so first, since the kernel's start on this device.
        last_ns: and last.
        total_ns: all of its times since the block's start added up, modulo 2**32.
        count: how often it happened.
    """

    device: int
    operation: str
    block: int
    role: str
    event: str
    first_ns: int
    last_ns: int
    total_ns: int
    count: int


def is_built(cuda: Any) -> bool:
    """Whether this ``jax_ep._cuda`` (None: there is none) is of a timeline build."""
    return hasattr(cuda, "timeline")


def run(operation: Operation, mesh: Mesh, cuda: Any) -> list[Mark]:
    """Runs the operation until it is warm; what its newest call has noted."""
    program = measure.compile_calls(operation.fn, mesh, operation.args, _CALLS, operation.fresh)
    program.run(_CALLS)
    return read(cuda, [device.local_hardware_id for device in mesh.devices.flat])


def read(cuda: Any, ordinals: Sequence[int]) -> list[Mark]:
    """The newest call of each operation on these devices, which must be done.

    Args:
        cuda: the module ``jax_ep._cuda`` of a timeline build.
        ordinals: CUDA devices of this process.
    """
    marks = []
    for device in ordinals:
        rows = cuda.timeline(device)
        start: dict[str, int] = {}
        for operation, _, _, _, first_ns, *_ in rows:
            start[operation] = min(first_ns, start.get(operation, first_ns))
        for operation, block, role, event, first_ns, last_ns, total_ns, count in rows:
            since = start[operation]
            times = (first_ns - since, last_ns - since, total_ns, count)
            marks.append(Mark(device, operation, block, role, event, *times))
    return marks


def _grouped(marks: Iterable[Mark]) -> dict[tuple[str, str, str], list[Mark]]:
    """By operation, role and event: in the order in which they come first."""
    groups: dict[tuple[str, str, str], list[Mark]] = {}
    for mark in marks:
        groups.setdefault((mark.operation, mark.role, mark.event), []).append(mark)
    return groups


def _fences(begins: Sequence[Mark], ends: Sequence[Mark]) -> tuple[list[int], list[int]]:
    """Nanoseconds that each block has spent in all of its fences, and in the last one."""
    ended = {(mark.device, mark.block): mark for mark in ends}
    pairs = [(begin, ended.get((begin.device, begin.block))) for begin in begins]
    both = [(begin, end) for begin, end in pairs if end is not None and end.count == begin.count]
    return (
        [(end.total_ns - begin.total_ns) % 2**32 for begin, end in both],
        [end.last_ns - begin.last_ns for begin, end in both],
    )


def summary(marks: Sequence[Mark]) -> list[str]:
    """Median and maximum over blocks and devices of when each event happened, in microseconds."""

    def both(nanoseconds: Iterable[int]) -> str:
        values = list(nanoseconds)
        return f"{statistics.median(values) / 1e3:10.1f}{max(values) / 1e3:9.1f}"

    lines: list[str] = []
    groups = _grouped(marks)
    for operation in dict.fromkeys(mark.operation for mark in marks):
        blocks = {(m.device, m.block) for m in marks if m.operation == operation}
        devices = {device for device, _ in blocks}
        lines += [
            "",
            f"{operation}: {len(blocks)} blocks on {len(devices)} device(s); us since its first "
            "block's start on the device",
            f"{'role':12}{'event':13}{'first: median':>10}{'max':>6}{'last: median':>13}{'max':>6}"
            f"{'times':>7}",
        ]
        for (of, role, event), group in groups.items():
            if of != operation:
                continue
            times = int(statistics.median(mark.count for mark in group))
            lines.append(
                f"{role:12}{event:13}{both(m.first_ns for m in group)}"
                f"{both(m.last_ns for m in group)}{times:7d}"
            )
            begins = groups.get((operation, role, _FENCE[0]), [])
            in_all, in_last = _fences(begins, group) if event == _FENCE[1] else ([], [])
            if in_all:
                lines.append(
                    f"{role:12}{'in fences':13}{both(in_all)}  (the last: {both(in_last)})"
                )
    return lines


def plot(path: Path, marks: Sequence[Mark], title: str) -> None:
    """A PNG: for each operation and device a row per block, a bar per role, and its events.

    Args:
        path: the file to write.
        marks: what ``read`` returns, not empty.
        title: for the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    operations = list(dict.fromkeys(mark.operation for mark in marks))
    devices = sorted({mark.device for mark in marks})
    roles = list(dict.fromkeys(mark.role for mark in marks))
    events = list(dict.fromkeys(mark.event for mark in marks))
    # Roles pale, events strong.
    pale = dict(zip(roles, plt.get_cmap("Set3").colors, strict=False))  # type: ignore[attr-defined]
    strong = dict(zip(events, _EVENT_COLOURS, strict=False))
    num_blocks = {o: 1 + max(m.block for m in marks if m.operation == o) for o in operations}
    figure, grid = plt.subplots(
        len(operations),
        len(devices),
        figsize=(9 * len(devices), 2 + sum(max(2, 0.08 * n) for n in num_blocks.values())),
        height_ratios=[max(2, 0.08 * n) for n in num_blocks.values()],
        layout="constrained",
        squeeze=False,
    )
    legend: dict[str, Any] = {}
    for operation, row in zip(operations, grid, strict=True):
        here = [
            role for role in roles if any(m.role == role for m in marks if m.operation == operation)
        ]
        for device, axes in zip(devices, row, strict=True):
            shown = [m for m in marks if (m.operation, m.device) == (operation, device)]
            for lane, role in enumerate(here):
                # The roles of a block lie one above the other within its row.
                offset = (lane + 0.5) / len(here) - 0.5
                spans: dict[int, tuple[int, int]] = {}
                for mark in shown:
                    if mark.role == role:
                        begin, end = spans.get(mark.block, (mark.first_ns, mark.last_ns))
                        spans[mark.block] = min(begin, mark.first_ns), max(end, mark.last_ns)
                legend[role] = axes.hlines(
                    [block + 0.9 * offset for block in spans],
                    [begin / 1e3 for begin, _ in spans.values()],
                    [end / 1e3 for _, end in spans.values()],
                    color=pale[role],
                    linewidth=6 / len(here),
                    zorder=1,
                )
                for event in events:
                    of_event = [m for m in shown if (m.role, m.event) == (role, event)]
                    times = [m.first_ns / 1e3 for m in of_event] + [
                        m.last_ns / 1e3 for m in of_event
                    ]
                    if times:
                        points = axes.scatter(
                            times,
                            2 * [m.block + 0.9 * offset for m in of_event],
                            marker="|",
                            color=strong[event],
                            s=60 / len(here),
                            linewidths=0.8,
                            zorder=2,
                        )
                        legend.setdefault(f"[{event}]", points)
            axes.set(
                title=f"{operation}, device {device}",
                xlabel="us since its first block's start",
                ylabel="block",
                ylim=(num_blocks[operation] - 0.4, -0.6),
            )
            axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.legend(
        legend.values(), legend.keys(), fontsize=8, markerscale=2, loc="outside right upper"
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)
