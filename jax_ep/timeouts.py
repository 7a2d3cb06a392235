"""How long an operation waits for another rank."""

from typing import NamedTuple

from jax_ep import _native, environment
from jax_ep._checks import checked_seconds


class Timeout(NamedTuple):
    """How long an operation waits for another rank, in seconds (see ``set_timeout``)."""

    arrival: float
    progress: float


def set_timeout(
    seconds: float | None = None, *, arrival: float | None = None, progress: float | None = None
) -> None:
    """Sets how long an operation waits for another rank.

    There are two times. *Arrival* is how long a rank may take to come to the operation: it may be
    compiling, or writing a checkpoint. *Progress* is how long it may take to go on once it has
    come. On CPU the operation then ends with DEADLINE_EXCEEDED, naming the operation and the rank,
    and the runtime stays usable. On CUDA the kernel ends with NaN in its results, and the group is
    broken (see ``check``).

    The defaults are 600 s and 30 s, or the environment variables ``JAX_EP_ARRIVAL_TIMEOUT`` and
    ``JAX_EP_PROGRESS_TIMEOUT``, or ``JAX_EP_TIMEOUT`` for both. What is set holds in this process,
    for compiled programs too: on CPU for calls that start afterwards, on CUDA at once.

    Args:
        seconds: both times, where the following do not say otherwise; above 0 and at most 1e8
            (three years).
        arrival: seconds to wait for a rank to come. Left out, and ``seconds`` too, it stays.
        progress: seconds to wait for a rank that has come. Likewise.

    Raises:
        TypeError: if a time is not a number, or none is given.
        ValueError: if a time is not above 0 and at most 1e8.
    """
    given = {"seconds": seconds, "arrival": arrival, "progress": progress}
    if all(value is None for value in given.values()):
        raise TypeError("jax_ep.set_timeout: pass seconds, arrival or progress")
    checked = {
        name: checked_seconds(f"jax_ep.set_timeout: {name}", value)
        for name, value in given.items()
        if value is not None
    }
    before = get_timeout()
    both = checked.get("seconds")
    _apply(
        checked.get("arrival", before.arrival if both is None else both),
        checked.get("progress", before.progress if both is None else both),
    )


def get_timeout() -> Timeout:
    """The times in seconds that ``set_timeout`` sets: ``arrival`` and ``progress``."""
    return Timeout(*_native.cpu.timeout())


def _apply(arrival: float, progress: float) -> None:
    _native.cpu.set_timeout(arrival, progress)
    if _native.cuda is not None:
        _native.cuda.set_timeout(arrival, progress)


def _apply_environment() -> None:
    arrival, progress = environment.timeouts()
    default = get_timeout()
    _apply(
        default.arrival if arrival is None else arrival,
        default.progress if progress is None else progress,
    )


_apply_environment()
