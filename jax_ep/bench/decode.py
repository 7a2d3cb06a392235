"""The table for decoding: calls in slots beside those of the general path.

Either stands in it two times: as one of many calls in a row, which XLA records in a command buffer
(a CUDA graph), and as a program of its own.
"""

from collections.abc import Sequence
from typing import Any

from jax_ep import limits
from jax_ep.bench.measure import Timing
from jax_ep.bench.report import Row
from jax_ep.bench.traffic import Point, point_fields

OPERATIONS = ("layout_and_dispatch", "round trip")
SLOTS, GENERAL = "slots", "general"  # the paths

# What is measured unless the command line says otherwise.
TOKENS = [1, 8, 16, 32, 64, 128, 256, 4096]
FP8 = ["none", "float32"]

_LEGEND = """\
Below, {of_paths}
us of the slowest rank: median [10th - 90th percentile]
round trip: layout_and_dispatch, then combine; with fp8 what combine takes is of the type of x
single: each a program of its own that takes an operand from the one before, launched without
waiting; so the time is that of the launch where that is longer than the call
-: not measured, see above"""

_GPU_PATHS = """\
{paths}
a call that slots do not take is a general one there too
in a program: one of many calls in a row, which XLA records in a command buffer; one number of each
array leaves the program, for a result costs the host some us, more than a small call takes"""

_CPU_PATHS = """\
all calls are general ones: there are no slots on CPU
in a program: from the start of a program with one call until every rank has its result"""

_CELL = 25


def defaults(of_bench: dict[str, Any]) -> dict[str, Any]:
    """Of the command line, from those of the whole benchmark: its base at more T."""
    base = {name: v[:1] if isinstance(v, list) else v for name, v in of_bench.items()}
    return base | {"tokens": TOKENS, "fp8": FP8}


def paths(on_gpu: bool, slot_bytes: int | None) -> dict[str, int | None]:
    """What is measured, one after the other, and the bytes of slots that it is set up with."""
    if not on_gpu:
        return {GENERAL: None}
    slot_bytes = limits.DEFAULT_SLOT_BYTES if slot_bytes is None else slot_bytes
    return {SLOTS: slot_bytes, GENERAL: 0} if slot_bytes > 0 else {GENERAL: 0}


def fields(path: str, single: Timing) -> Row:
    """What a row has beside the figures of its call in a program."""
    return {
        "path": path,
        "single_median_s": single.median,
        "single_p10_s": single.percentile(10),
        "single_p90_s": single.percentile(90),
        "single_calls": single.calls,
    }


def legend(of_path: dict[str, int | None]) -> str:
    """What the table has in it."""
    if of_path == {GENERAL: None}:
        return _LEGEND.format(of_paths=_CPU_PATHS)
    texts = {
        SLOTS: f"slots: with {(of_path.get(SLOTS) or 0) / 2**20:g} MiB of them on each device",
        GENERAL: "general: set up without slots",
    }
    found = "; ".join(texts[path] for path in of_path)
    return _LEGEND.format(of_paths=_GPU_PATHS.format(paths=found))


def table(points: Sequence[Point], rows: Sequence[Row]) -> list[str]:
    """Lines of points that differ in T alone: a line an operation, both paths side by side."""
    kinds = {"in a program": "", "single": "single_"}
    names = [f"{path}, {kind}" for path in (SLOTS, GENERAL) for kind in kinds]
    lines = [f"{'operation':21}{'T':>6}{''.join(f'{name:>{_CELL}}' for name in names)}{'SMs':>6}"]
    for operation in OPERATIONS:
        for point in points:
            wanted = point_fields(point) | {"operation": operation}
            found = {
                row["path"]: row
                for row in rows
                if "error" not in row
                and wanted.items() <= (row | {"capacity": row["capacity_kind"]}).items()
            }
            cells = [
                _cell(found.get(path), of) for path in (SLOTS, GENERAL) for of in kinds.values()
            ]
            if any(cell != "-" for cell in cells):
                sms = next((row["sms"] for row in found.values() if "sms" in row), "-")
                text = "".join(f" {cell:>{_CELL - 1}}" for cell in cells)
                lines.append(f"{operation:21}{point.tokens:6d}{text} {sms:>5}")
    return lines


def _cell(row: Row | None, prefix: str) -> str:
    if row is None:
        return "-"
    median, low, high = (row[f"{prefix}{name}_s"] * 1e6 for name in ("median", "p10", "p90"))
    return f"{median:.1f} [{low:.1f} - {high:.1f}]"
