"""What GPUs did in a number of equal steps, by a trace of jax.profiler's.

A device runs the same kernels in each step, and ends one before it begins the next: so a step is
the next so many kernels, and what lies between two of them is time in which the device waited for
the host.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from jax.profiler import ProfileData

_COMMUNICATION = ("jax_ep", "nccl")  # in the names of kernels
_COPIES = ("Memcpy", "Memset")  # of arguments and results too, which are not a step's


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel that has run, in nanoseconds of the trace."""

    name: str
    begin: float
    end: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """A device's steps, in microseconds; each figure but the first is the median of the steps.

    To trace slows the host down, more than the device. A step that takes no longer than span_us
    without a trace had no gap there, whatever gap_us is.

    Attributes:
        kernels: of a step.
        step_us: from a step's first kernel to the next one's.
        span_us: from a step's first kernel to its last one's end.
        gap_us: from a step's last kernel to the next one's first.
        longest_gap_us: the longest of them.
        idle_us: within a step, while no kernel ran.
        communication_us: in kernels that exchange rows, waits for other devices included.
        num_communication: kernels of this kind.
    """

    kernels: int
    step_us: float
    span_us: float
    gap_us: float
    longest_gap_us: float
    idle_us: float
    communication_us: float
    num_communication: int


def read_kernels(folder: pathlib.Path) -> Iterator[tuple[str, list[Kernel]]]:
    """Yields each GPU's name and the kernels that it ran, by the newest trace of a folder."""
    paths = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    for plane in ProfileData.from_file(str(paths[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        kernels = [
            Kernel(event.name, event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if line.name.startswith("Stream")  # other lines say the same in other words
            for event in line.events
            if not event.name.startswith(_COPIES)
        ]
        yield plane.name, sorted(kernels, key=lambda kernel: kernel.begin)


def summarise(kernels: list[Kernel], num_steps: int) -> Summary:
    """Summarises the kernels of so many steps, by their begin.

    Raises:
        ValueError: the steps are not equal, or there are fewer than two.
    """
    size = len(kernels) // num_steps
    steps = [kernels[i * size : (i + 1) * size] for i in range(num_steps)]
    names = {tuple(sorted(kernel.name for kernel in step)) for step in steps}
    if num_steps < 2 or not size or size * num_steps != len(kernels) or len(names) > 1:
        raise ValueError(f"{len(kernels)} kernels are not {num_steps} equal steps")

    def idle(step: list[Kernel]) -> float:
        ends = np.maximum.accumulate([kernel.end for kernel in step])
        begins = np.array([kernel.begin for kernel in step])
        return float(np.sum(np.maximum(begins[1:] - ends[:-1], 0)))

    def communication(step: list[Kernel]) -> list[float]:
        return [k.end - k.begin for k in step if any(name in k.name for name in _COMMUNICATION)]

    begins = np.array([step[0].begin for step in steps])
    ends = np.array([max(kernel.end for kernel in step) for step in steps])
    gaps = begins[1:] - ends[:-1]
    return Summary(
        kernels=size,
        step_us=float(np.median(np.diff(begins))) / 1e3,
        span_us=float(np.median(ends - begins)) / 1e3,
        gap_us=float(np.median(gaps)) / 1e3,
        longest_gap_us=float(np.max(gaps)) / 1e3,
        idle_us=float(np.median([idle(step) for step in steps])) / 1e3,
        communication_us=float(np.median([sum(communication(step)) for step in steps])) / 1e3,
        num_communication=len(communication(steps[0])),
    )
