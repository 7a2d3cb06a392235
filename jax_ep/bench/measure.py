"""Times a per-shard function as a jitted program runs it.

On CPU a time is that of the whole call, until every rank's result is ready.

On a GPU starting a program costs more than the operations take, so a program with N + 1 calls and
one with a single call are timed in turn, and a call takes the difference divided by N. Each call's
operands pass an optimization barrier together with the result of the call before: that keeps the
calls in order and apart, and moves no data. All results leave the program, so none is dropped; the
compiled programs are searched for the calls all the same.
"""

import dataclasses
import functools
import os
import re
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

_WARM_UP = 3  # command buffers are recorded at the second run and replayed from the third on
_DATA_MOVERS = re.compile(
    r'custom_call_target="jax_ep_\w+"|'
    r"[ =)](?:ragged-all-to-all|all-to-all|all-gather)(?:-start)?\("
)
_COPY = re.compile(r"[ =)}]copy(?:-start)?\(")


@dataclasses.dataclass(frozen=True)
class Timing:
    """How long a call takes.

    Attributes:
        seconds: of each repeat, ascending. A difference of two programs may be negative where
            the machine's jitter exceeds what it measures.
        calls: N, 0 where whole programs were timed.
        output_bytes: results of a call, per device.
        temp_bytes: what XLA allocates besides, per device: the largest use within the call.
        extra_copies: copies that the compiler put between the calls of the long program, per call;
            they are part of the time.
    """

    seconds: tuple[float, ...]
    calls: int
    output_bytes: int
    temp_bytes: int
    extra_copies: float = 0.0

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    def percentile(self, percent: int) -> float:
        """The repeat that stands at this percentage of all, in seconds."""
        return self.seconds[min(len(self.seconds) * percent // 100, len(self.seconds) - 1)]


def compile_calls(
    fn: Callable[..., Any], mesh: Mesh, args: tuple[Any, ...], num_calls: int
) -> jax.stages.Compiled:
    """A program over ``mesh`` that calls ``fn`` on its shards ``num_calls`` times, in order."""

    def program(*args: Any) -> list[Any]:
        results = []
        for call in range(num_calls):
            result = fn(*args)
            if call + 1 < num_calls:
                args, result = lax.optimization_barrier((args, result))
            results.append(result)
        return results

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    return jax.jit(sharded).lower(*args).compile()


def count_calls(compiled: jax.stages.Compiled) -> int:
    """Calls of jax_ep and collectives that move rows, in the program as it was compiled."""
    return len(_DATA_MOVERS.findall(compiled.as_text() or ""))


def require_all_calls(
    single: jax.stages.Compiled, many: jax.stages.Compiled, num_calls: int
) -> None:
    """Checks that the compiler neither merged nor dropped calls.

    Raises:
        RuntimeError: the program with ``num_calls`` calls has fewer than so many times the calls of
            ``single``, so that its time would say nothing.
    """
    expected, found = num_calls * count_calls(single), count_calls(many)
    if found < expected:
        raise RuntimeError(
            f"the compiler merged or dropped calls: {found} are left of {expected}; no time can be "
            "told from this program"
        )


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _runner(compiled: jax.stages.Compiled, args: tuple[Any, ...]) -> Callable[[], None]:
    def run() -> None:
        # The results are freed at once, so that the next run gets the same addresses: a command
        # buffer whose addresses change is recorded again.
        jax.block_until_ready(compiled(*args))

    for _ in range(_WARM_UP):
        run()
    return run


def time_whole_calls(
    fn: Callable[..., Any],
    mesh: Mesh,
    args: tuple[Any, ...],
    *,
    repeats: int,
    between: Callable[[], None] | None = None,
) -> Timing:
    """Times whole programs with one call; ``between`` runs after each."""
    compiled = compile_calls(fn, mesh, args, 1)
    run = _runner(compiled, args)
    seconds = []
    for _ in range(repeats):
        seconds.append(_seconds(run))
        if between is not None:
            between()
    return Timing(tuple(sorted(seconds)), 0, *_memory(compiled))


def time_chained_calls(
    fn: Callable[..., Any],
    mesh: Mesh,
    args: tuple[Any, ...],
    *,
    repeats: int,
    calls: int,
) -> Timing:
    """Times a call as the difference between ``calls`` + 1 calls and one, over ``calls``.

    Fewer calls are taken if their results would not fit into the devices' memory.

    Raises:
        MemoryError: not even two calls fit.
        RuntimeError: the compiler merged or dropped calls.
    """
    single = compile_calls(fn, mesh, args, 1)
    output_bytes, temp_bytes = _memory(single)
    free = _free_bytes(mesh)
    if free is not None:
        fitting = int((0.9 * free - temp_bytes) // max(1, output_bytes)) - 1
        if fitting < 1:
            raise MemoryError(
                f"two calls need 2 x {output_bytes / 2**30:.1f} GiB of results and "
                f"{temp_bytes / 2**30:.1f} GiB of scratch, but {free / 2**30:.1f} GiB are free"
            )
        calls = min(calls, fitting)
    many = compile_calls(fn, mesh, args, calls + 1)
    require_all_calls(single, many, calls + 1)
    run_single, run_many = _runner(single, args), _runner(many, args)
    seconds = []
    for _ in range(repeats):
        once = _seconds(run_single)
        seconds.append((_seconds(run_many) - once) / calls)
    extra = (_count_copies(many) - _count_copies(single)) / calls
    return Timing(tuple(sorted(seconds)), calls, output_bytes, temp_bytes, extra)


def chain_length(expected_seconds: float) -> int:
    """N for an operation that is expected to take this long: about a millisecond in all."""
    return int(min(40, max(5, 1e-3 // max(expected_seconds, 1e-6))))


def _count_copies(compiled: jax.stages.Compiled) -> int:
    return len(_COPY.findall(compiled.as_text() or ""))


def _memory(compiled: jax.stages.Compiled) -> tuple[int, int]:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0, 0
    return int(analysis.output_size_in_bytes), int(analysis.temp_size_in_bytes)


def _free_bytes(mesh: Mesh) -> int | None:
    """What the fullest device still has, or None where it does not say."""
    free = []
    for device in mesh.devices.flat:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        free.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return int(min(free))


@functools.cache
def _cores() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1)


class HostCopy:
    """A copy of ``num_bytes`` in the host's memory by all cores, timed each time it is called.

    The bound on CPU: buffers are warm, and it runs between the repeats of what it bounds.
    """

    def __init__(self, num_bytes: int) -> None:
        num_threads = os.cpu_count() or 1
        source = np.ones(num_bytes, np.uint8)
        target = np.zeros_like(source)
        parts = zip(
            np.array_split(source, num_threads), np.array_split(target, num_threads), strict=True
        )
        self._parts = list(parts)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """Copies once."""
        self.seconds.append(
            _seconds(
                lambda: list(_cores().map(lambda part: np.copyto(part[1], part[0]), self._parts))
            )
        )
