"""Times a per-shard function as a jitted program runs it.

On CPU a time is that of the whole call, until every rank's result is ready.

On a GPU starting a program costs more than the operations take, so a program with 2 N calls and one
with N are timed in turn, in bursts of a few runs, and a call takes the difference divided by N. (N
is so large that the shorter one takes longer on the device than the host does to start it: else the
host's time would hide the device's in one of them, and the difference would be too small.) Each
call's operands pass an optimization barrier together with the
result of the call before, which keeps the calls in order; one operand is another array in each
call, so that the compiler sees no two equal calls; and a number of each array that a call gives
leaves the program, so none is dropped. One kernel picks them out at the end; nothing else of this
moves data. (The arrays themselves must not leave: each result of a program costs the host some
microseconds on each device, which is more than a small call takes.) The compiled programs are
searched for the calls all the same.

A program of its own for each call is what a server has that decodes a step at a time. Of those a
burst is timed: each takes an operand from the one before, which hands it on where it lies, and the
host launches them without waiting. So a call takes what its launch takes, or its work if that is
longer.

In a job of several processes each times its own devices. A burst, or a call on CPU, ends in all of
them with the last rank, but for a call, so the next one begins in all nearly at once; and of each
the slowest process's time counts.
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
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_ep.bench.processes import Processes

_WARM_UP = 3  # command buffers are recorded at the second run and replayed from the third on
BURST = 4  # runs between waits: a device that has been idle is slower, and ranks begin apart
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
        calls: N, by which the programs differ; 0 where whole programs were timed.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program and the global arrays it is called with.

    Attributes:
        compiled: the program.
        args: its arguments.
        call_bytes: results of a call in it, per device.
    """

    compiled: jax.stages.Compiled
    args: tuple[Any, ...]
    call_bytes: int = 0

    def run(self, times: int = 1) -> None:
        """Runs it so often, one right after the other, until every device is done.

        The results are freed at once, so that the next run gets the same addresses: a command
        buffer whose addresses change is recorded again.
        """
        for _ in range(times - 1):
            self.compiled(*self.args)
        jax.block_until_ready(self.compiled(*self.args))


def compile_calls(
    fn: Callable[..., Any],
    mesh: Mesh,
    args: tuple[Any, ...],
    num_calls: int,
    fresh: int = 0,
    *,
    returns_results: bool = True,
) -> Program:
    """A program over ``mesh`` that calls ``fn`` on its shards ``num_calls`` times, in order.

    Args:
        fn: takes the shards of ``args``.
        mesh: with the axis "ep".
        args: global arrays, or pytrees of them.
        num_calls: calls in the program.
        fresh: which of ``args``, an array that ``fn`` uses, every call gets a copy of its own of.
        returns_results: whether the calls' results are the program's. Else it returns the first
            number of each of their arrays, float32 [R * num_calls, arrays], and they all lie in
            memory until its end.
    """
    copies = tuple(jnp.copy(args[fresh]) for _ in range(num_calls - 1))
    call_bytes = 0

    def program(args: tuple[Any, ...], copies: tuple[Any, ...]) -> Any:
        nonlocal call_bytes
        results = []
        for call in range(num_calls):
            result = fn(*args)
            if call + 1 < num_calls:
                args = (*args[:fresh], copies[call], *args[fresh + 1 :])
                args, result = lax.optimization_barrier((args, result))
            results.append(result)
        call_bytes = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(results[0]))
        if returns_results:
            return results
        numbers = [a.reshape(-1)[:1].astype(jnp.float32) for a in jax.tree.leaves(results)]
        return jnp.concatenate(numbers).reshape(num_calls, -1)

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    compiled = jax.jit(sharded).lower(args, copies).compile()
    return Program(compiled, (args, copies), call_bytes)


def count_calls(program: Program) -> int:
    """Calls of jax_ep and collectives that move rows, in the program as it was compiled."""
    return len(_DATA_MOVERS.findall(program.compiled.as_text() or ""))


def require_all_calls(single: Program, many: Program, num_calls: int) -> None:
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


def _warm_up(program: Program) -> None:
    for _ in range(_WARM_UP):
        program.run()


def time_whole_calls(
    fn: Callable[..., Any],
    mesh: Mesh,
    args: tuple[Any, ...],
    *,
    repeats: int,
    between: Callable[[], None] | None = None,
    processes: Processes | None = None,
) -> Timing:
    """Times whole programs with one call; ``between`` runs after each."""
    processes = processes or Processes()
    program = compile_calls(fn, mesh, args, 1)
    processes.exchange("compiled")  # who cannot, says so before anybody waits for it in a call
    _warm_up(program)
    seconds = []
    for _ in range(repeats):
        if processes.count > 1:
            processes.exchange("begins")
            program.run()  # processes leave an exchange a millisecond apart, a call nearly together
        seconds.append(_seconds(program.run))
        if between is not None:
            processes.exchange("ended")
            between()
    return Timing(tuple(sorted(processes.slowest(seconds))), 0, *_memory(program))


def time_programs(program: Program, *, repeats: int) -> Timing:
    """Times a program that takes a device longer than the host needs to start it, in bursts."""
    _warm_up(program)
    seconds = (_seconds(functools.partial(program.run, BURST)) / BURST for _ in range(repeats))
    return Timing(tuple(sorted(seconds)), 0, *_memory(program))


def time_chained_calls(
    fn: Callable[..., Any],
    mesh: Mesh,
    args: tuple[Any, ...],
    *,
    fresh: int,
    repeats: int,
    calls: int,
    processes: Processes | None = None,
) -> Timing:
    """Times a call as the difference between 2 * ``calls`` calls and ``calls``, over ``calls``.

    Fewer calls are taken if their operands and results would not fit into the devices' memory.
    ``fresh`` is as in ``compile_calls``.

    Raises:
        MemoryError: not even two calls fit.
        RuntimeError: the compiler merged or dropped calls.
    """
    processes = processes or Processes()
    single = compile_calls(fn, mesh, args, 1, returns_results=False)
    output_bytes, temp_bytes = _memory_of_call(single)
    free = _free_bytes(mesh)
    if free is not None:
        operand_bytes = args[fresh].nbytes // mesh.size
        per_call = output_bytes + operand_bytes
        # The long program's results, and copies of the operand for both programs.
        of_both = 2 * output_bytes + 3 * operand_bytes
        fitting = int((0.9 * free - temp_bytes) // max(1, of_both))
        if fitting < 1:
            raise MemoryError(
                f"two calls need 2 x {per_call / 2**30:.1f} GiB for operands and results and "
                f"{temp_bytes / 2**30:.1f} GiB of scratch, but {free / 2**30:.1f} GiB are free"
            )
        calls = min(calls, fitting)
    calls = processes.least(calls)
    short, long = (
        compile_calls(fn, mesh, args, number, fresh, returns_results=False)
        for number in (calls, 2 * calls)
    )
    for program, number in (short, calls), (long, 2 * calls):
        require_all_calls(single, program, number)
    processes.exchange("compiled")  # as above
    for program in short, long:
        _warm_up(program)
    bursts = []
    for _ in range(repeats):
        bursts += [_seconds(functools.partial(program.run, BURST)) for program in (short, long)]
    bursts = processes.slowest(bursts)
    seconds = [
        (of_long - of_short) / (BURST * calls)
        for of_short, of_long in zip(bursts[::2], bursts[1::2], strict=True)
    ]
    extra = (_count_copies(long) - _count_copies(short)) / calls
    return Timing(tuple(sorted(seconds)), calls, output_bytes, temp_bytes, extra)


def time_single_calls(
    fn: Callable[..., Any],
    mesh: Mesh,
    args: tuple[Any, ...],
    *,
    fresh: int,
    repeats: int,
    calls: int,
    processes: Processes | None = None,
) -> Timing:
    """Times a burst of programs, each with one call, over their number.

    ``fresh`` is which of ``args``, an array, a call takes from the one before.
    """
    processes = processes or Processes()

    def program(chained: Any, rest: tuple[Any, ...]) -> tuple[Any, Any]:
        result = fn(*rest[:fresh], chained, *rest[fresh:])
        handed_on, result = lax.optimization_barrier((chained, result))
        return handed_on, result

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    jitted = jax.jit(sharded, donate_argnums=0)
    rest = (*args[:fresh], *args[fresh + 1 :])
    chained = jnp.copy(args[fresh])  # which the first call takes for good
    compiled = jitted.lower(chained, rest).compile()
    processes.exchange("compiled")  # as above

    def burst() -> None:
        nonlocal chained
        for _ in range(calls):
            chained, _ = compiled(chained, rest)  # results are freed at once, as in Program.run
        jax.block_until_ready(chained)

    burst()  # a warm-up
    seconds = sorted(processes.slowest([_seconds(burst) / calls for _ in range(repeats)]))
    done = Program(compiled, (chained, rest))
    return Timing(tuple(seconds), calls, *_memory(done), _count_copies(done))


def chain_length(expected_seconds: float) -> int:
    """N for an operation that is expected to take this long: about a millisecond of work.

    40 at most, 0.25 ms of the smallest calls: a program takes the host 0.1 to 0.2 ms to start.
    """
    return min(40, max(5, round(1e-3 / max(expected_seconds, 1e-6))))


def _count_copies(program: Program) -> int:
    return len(_COPY.findall(program.compiled.as_text() or ""))


def _memory(program: Program) -> tuple[int, int]:
    analysis = program.compiled.memory_analysis()
    if analysis is None:
        return 0, 0
    return int(analysis.output_size_in_bytes), int(analysis.temp_size_in_bytes)


def _memory_of_call(single: Program) -> tuple[int, int]:
    """As ``_memory``, of a program that does not return the results: they are temporary there."""
    return single.call_bytes, max(0, _memory(single)[1] - single.call_bytes)


def _free_bytes(mesh: Mesh) -> int | None:
    """What this process's fullest device still has, or None where it does not say."""
    free = []
    for device in mesh.local_devices:
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
