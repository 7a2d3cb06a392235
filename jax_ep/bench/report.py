"""Rows of the result: from timings to figures, a table, a JSON file and a plot."""

import json
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_ep.bench.link import Link
from jax_ep.bench.measure import HostCopy, Timing
from jax_ep.bench.operations import Operation
from jax_ep.bench.traffic import Point, Traffic, point_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

HEADER = (
    f"{'operation':31}{'T':>7}{'median':>12}{'p10':>10}{'p90':>10}{'bound':>10}{'ratio':>8}"
    f"{'wire GB/s':>11}{'of W':>7}{'logical':>9}{'SMs':>6}{'temp MB':>9}"
)

_LEGEND = """\
T: tokens per rank; times in us (microseconds) of the slowest rank: median, 10th and 90th percentile
bound: the least time that {bound}; ratio: median / bound
wire GB/s: bytes from and to other ranks, one direction, over the median; of W: that over the link's
logical: the same with the rank's own rows counted too, GB/s, as others publish it
SMs: that the operation may use; temp MB: what XLA allocates beside operands and results, a device
-: does not apply; n/a: not measured, and why"""

_GPU_LEGEND = """
A time is that of one of many calls that follow one another in a program, so it has in it what lies
between two of them, which does not count where calls are long."""


def legend(on_gpu: bool) -> str:
    """What the columns of the table mean."""
    bound = "wire and memory take for the bytes" if on_gpu else "copying the rows takes, all cores"
    return _LEGEND.format(bound=bound) + (_GPU_LEGEND if on_gpu else "")


def _base_row(operation_name: str, baseline: bool, point: Point, traffic: Traffic) -> Row:
    return {
        "operation": operation_name,
        "baseline": baseline,
        **point_fields(point),
        "capacity": traffic.layout.capacity,
        "capacity_kind": point.capacity,
        "kept_rows": traffic.kept_rows,
        "dropped_rows": traffic.dropped_rows,
    }


def failed_row(
    operation_name: str, baseline: bool, point: Point, traffic: Traffic, error: Exception
) -> Row:
    """The row of an operation that could not be measured."""
    lines = str(error).strip().splitlines() or [""]
    row = _base_row(operation_name, baseline, point, traffic)
    row["error"] = f"{type(error).__name__}: {lines[0]}"
    return row


def result_row(
    operation: Operation,
    point: Point,
    traffic: Traffic,
    timing: Timing,
    link: Link | None,
    host_copy: HostCopy | None,
) -> Row:
    """All figures of one operation: seconds, bytes, bytes per second, and ratios."""
    row = _base_row(operation.name, operation.baseline, point, traffic)
    median = timing.median
    wire = sum(m.wire_bytes for m in operation.movements)
    logical = sum(m.logical_bytes for m in operation.movements)
    row |= {
        "median_s": median,
        "p10_s": timing.percentile(10),
        "p90_s": timing.percentile(90),
        "repeats": len(timing.seconds),
        "calls": timing.calls,
        "wire_bytes": wire,
        "logical_bytes": logical,
        "memory_bytes": sum(m.memory_bytes for m in operation.movements),
        "output_bytes": timing.output_bytes,
        "temp_bytes": timing.temp_bytes,
        "extra_copies": timing.extra_copies,
    }
    if median > 0:
        row["wire_bytes_per_s"] = wire / median
        row["logical_bytes_per_s"] = logical / median
    bound = None
    if link is not None:
        row["sms"] = point.num_sms or link.num_sms
        row["flag_hop_s"] = link.flag_hop_s
        # Of a process with one GPU W is not known: then nothing is said of what crosses the wire.
        if operation.movements and (wire == 0 or link.wire_bytes_per_s is not None):
            bound = link.bound(operation.movements, point.num_sms, point.row_bytes)
        if link.wire_bytes_per_s is not None and median > 0:
            row["fraction_of_w"] = wire / median / link.wire_bytes_per_s
    elif host_copy is not None and operation.movements:
        bound = statistics.median(host_copy.seconds) * len(operation.movements)
    row["bound_s"] = bound
    row["ratio"] = median / bound if bound else None
    return row


def format_row(row: Row) -> str:
    """One line of the table; times in microseconds."""
    name = f"{row['operation']:31}{row['tokens']:7d}"
    if "error" in row:
        return f"{name}  n/a: {row['error']}"

    def rate(key: str, width: int) -> str:
        value = row.get(key)
        return f"{value / 1e9:{width}.1f}" if value else f"{'-':>{width}}"

    def number(key: str, width: int, digits: int) -> str:
        value = row.get(key)
        return f"{value:{width}.{digits}f}" if value is not None else f"{'-':>{width}}"

    def microseconds(key: str, width: int) -> str:
        value = row.get(key)
        return f"{value * 1e6:{width}.1f}" if value is not None else f"{'-':>{width}}"

    line = (
        f"{name}{microseconds('median_s', 9)} us{microseconds('p10_s', 10)}"
        f"{microseconds('p90_s', 10)}{microseconds('bound_s', 10)}{number('ratio', 8, 2)}"
        f"{rate('wire_bytes_per_s', 11)}{number('fraction_of_w', 7, 2)}"
        f"{rate('logical_bytes_per_s', 9)}{row.get('sms', '-'):>6}"
        f"{row['temp_bytes'] / 1e6:9.1f}"
    )
    if row["extra_copies"]:
        line += f"  ({row['extra_copies']:.1f} copies a call by the compiler, in the time)"
    return line


def network_line(point: Point, network: Row) -> str:
    """What a network carries at a point."""
    return (
        f"T = {point.tokens}: {network['nodes_per_token']:.2f} nodes a token; between nodes "
        f"{network['network_bytes'] / 1e6:.2f} MB one direction, of the rank that has most"
    )


def write_json(path: Path, environment: Row, settings: Row, link: Any, rows: Sequence[Row]) -> None:
    """Writes everything that was measured so far."""
    content = {"environment": environment, "settings": settings, "link": link, "results": rows}
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """A PNG of the time over T: each operation and baseline, and the operations' bounds.

    Args:
        path: the file to write.
        rows: the results; those of the first point's sizes are drawn.
        title: for the figure.
    """
    draw(rows, title).savefig(path, dpi=120)


def draw(rows: Sequence[Row], title: str) -> "Figure":
    """The figure that ``plot`` writes."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "error" not in row and row["median_s"] > 0]
    if not measured:
        raise ValueError("--plot: no operation was measured, so there is nothing to draw")
    sizes = ("hidden", "top_k", "routing", "capacity_kind", "dtype", "fp8", "num_sms")
    first = {name: measured[0][name] for name in sizes}
    measured = [row for row in measured if {name: row[name] for name in sizes} == first]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["operation"] for row in measured):
        line = sorted((r for r in measured if r["operation"] == name), key=lambda r: r["tokens"])
        baseline = line[0]["baseline"]
        drawn = axes.errorbar(
            [r["tokens"] for r in line],
            [r["median_s"] * 1e6 for r in line],
            yerr=[
                [max(0.0, r["median_s"] - r["p10_s"]) * 1e6 for r in line],
                [max(0.0, r["p90_s"] - r["median_s"]) * 1e6 for r in line],
            ],
            label=f"{name} (JAX's own)" if baseline else name,
            marker=".",
            capsize=2,
            linestyle="--" if baseline else "-",
        )
        bound = [(r["tokens"], r["bound_s"] * 1e6) for r in line if r["bound_s"]]
        if bound and not baseline:
            axes.plot(
                *zip(*bound, strict=True),
                linestyle=":",
                marker="_",
                color=drawn[0].get_color(),
                label=f"bound of {name}",
            )
    axes.set(xscale="log", yscale="log", xlabel="tokens per rank", ylabel="us, slowest rank")
    tokens = sorted({r["tokens"] for r in measured})
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set_xticks([], minor=True)
    sizes_text = textwrap.fill(", ".join(f"{k}={v}" for k, v in first.items()), 70)
    axes.set_title(f"{title}\n{sizes_text}", fontsize=9)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    return figure
