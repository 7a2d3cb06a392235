"""Scenarios of the tier network-nvshmem: NVSHMEM's start and end, in jobs that may share a GPU.

Lines that begin with "NOTE: " end up in run_tiers.py's table.
"""

import os
import signal
import time
from typing import Any

import jax
from job import NUM_PROCESSES, PROCESS, coordinator_leaves_last, join, mark, wait_for_marks
from scenarios import Layer, call

import jax_ep
from jax_ep import nvshmem

HEAP_BYTES = 64 << 20
LAST = NUM_PROCESSES - 1


def connect(**options: object) -> float:
    """Joins with a network; its seconds."""
    join()
    jax.devices()
    start = time.monotonic()
    jax_ep.initialize(timeout=30, network=True, heap_bytes=HEAP_BYTES, **options)
    return time.monotonic() - start


def refused(**options: object) -> tuple[str, float]:
    """The error of initialize(), and its seconds."""
    start = time.monotonic()
    try:
        connect(**options)
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    raise AssertionError("initialize() has raised nothing")


def is_right(seed: int) -> None:
    """A layer over all ranks, on this node's own path."""
    layer = Layer()
    data = layer.data(seed)
    outcome, _, _ = call(layer, layer.place(data), data)
    assert outcome == "right", outcome


def started_and_ended() -> None:
    """Starts NVSHMEM, ends it, starts it again; the process's exit ends it the second time."""
    seconds = connect()
    assert nvshmem.is_running()
    mapped = nvshmem.load().mapped_peers()
    print(f"NOTE: NVSHMEM {nvshmem.load().loaded_version()} started in {seconds:.1f} s")
    print(f"NOTE: heaps mapped by process {PROCESS}: {mapped}")
    is_right(1)
    start = time.monotonic()
    jax_ep.finalize()
    print(f"NOTE: ended in {time.monotonic() - start:.1f} s")
    assert not nvshmem.is_running()
    print(f"NOTE: started again in {connect():.1f} s")
    check = nvshmem.load().check_links(10.0)
    assert check.wait(20)
    assert check.result() == ["good"] * NUM_PROCESSES
    is_right(2)


def one_leaves_alone() -> None:
    """Process 0 leaves when the others have not come to it yet: it does not wait for long."""
    connect()
    start = time.monotonic()
    if PROCESS == 0:
        jax_ep.finalize()
        print(f"NOTE: finalize() alone took {time.monotonic() - start:.1f} s")
        assert 4 < time.monotonic() - start < 10
        mark("left")
    wait_for_marks("left", 1)
    jax_ep.finalize()
    text, seconds = refused()
    assert "NVSHMEM cannot be started again" in text, text
    assert seconds < 10
    jax_ep.initialize(timeout=30)  # on one node all works as ever
    is_right(3)


class CannotStart:
    """The native module, if NVSHMEM's start failed."""

    def __init__(self, native: Any) -> None:
        self.loaded_version, self.unique_id = native.loaded_version, native.unique_id

    def start(self, *arguments: object) -> None:
        raise RuntimeError("it does not start here")


def one_cannot_start() -> None:
    """The last process fails when the others are waiting for it inside NVSHMEM: all hear of it."""
    if PROCESS == LAST:
        load = nvshmem.load
        nvshmem.load = lambda: CannotStart(load())
    _start_fails("it does not start here")


def one_has_no_transport() -> None:
    """NVSHMEM finds no way from the last process to the others: all hear of that."""
    _start_fails("process")


def _start_fails(words: str) -> None:
    text, seconds = refused()
    print(f"NOTE: process {PROCESS} after {seconds:.1f} s: {text.splitlines()[0][:160]}")
    assert words in text or PROCESS == LAST, text
    assert seconds < 15, "the timeout is 30 s"
    again, _ = refused()
    assert "NVSHMEM cannot be started again" in again, again
    jax_ep.initialize(timeout=30)  # without a network
    is_right(4)


def one_is_killed() -> None:
    """The last process is killed; the others leave, and end, without it."""
    connect()
    mark("joined")
    wait_for_marks("joined", NUM_PROCESSES)
    if PROCESS == LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    jax_ep.finalize()
    print(f"NOTE: finalize() without process {LAST} took {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < 10
    coordinator_leaves_last()
    os._exit(0)  # jax.distributed's own end would wait for the dead one
