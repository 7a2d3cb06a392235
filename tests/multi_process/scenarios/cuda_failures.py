"""A process on a GPU that dies or stalls, and leaving in several orders."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cuda_layer import Layer, connect
from job import (
    CALL_ERRORS,
    IS_LAST,
    NUM_PROCESSES,
    PROCESS,
    coordinator_leaves_last,
    join,
    leave_as,
    mark,
    mark_when_said,
    wait_for_marks,
)
from layers import example, local_parts, make_mesh, per_shard, put

import jax_ep


def stalled() -> None:
    """The last rank does not call. The others are told; then all begin anew."""
    join()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    if not IS_LAST:
        jax_ep.set_timeout(1000)
        start = time.monotonic()
        results = layer.program(*layer.data)
        jax_ep.set_timeout(3)  # holds for the kernel that waits already
        jax.block_until_ready(results)
        print(f"SECONDS {time.monotonic() - start:.2f}")
        floats = [p for n, _, p in local_parts(results) if n != "['recv_src']"]
        # bfloat16 and float8 are seen as uint16 and uint8 here.
        is_nan: dict[Any, Callable[[Any], Any]] = {
            np.dtype(np.float32): np.isnan,
            np.dtype(np.uint16): lambda p: (p & 0x7FFF) > 0x7F80,
            np.dtype(np.uint8): lambda p: (p & 0x7F) == 0x7F,
        }
        nan = [is_nan[p.dtype](p) for p in floats]
        print("POISONED", all(part.all() for part in nan))
        try:
            jax_ep.check()
        except RuntimeError as error:
            print("CHECK", error)
        layer.print_error("AGAIN")
        mark("told")
    wait_for_marks("told", NUM_PROCESSES - 1)
    jax_ep.finalize()
    jax_ep.check()  # forgotten
    jax_ep.set_timeout(60)
    connect(staging_bytes=1 << 20)
    Layer().check()  # what XLA replays of the old program gives NaN


def late() -> None:
    """The last rank comes when the others have said that they wait for it."""
    join()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    jax_ep.set_timeout(arrival=600, progress=10)
    if IS_LAST:
        wait_for_marks("said", NUM_PROCESSES - 1)
    else:
        mark_when_said("has waited for 30 s")
    layer.check()


def broken_in_another_group() -> None:
    """Process 3 of 2 x 2 does not come to process 2's group, of which process 0's is to hear."""
    join()
    connect(staging_bytes=1 << 20)
    mesh = make_mesh((2, 2), ("row", "column"))
    ids, x, _, _ = example(mesh, 2)
    data = [put(mesh, array, jax.sharding.PartitionSpec(mesh.axis_names)) for array in (ids, x)]

    def along(axis: str) -> Callable[..., Any]:
        def call(ids: Any, x: Any) -> Any:
            layout = jax_ep.make_layout(ids, num_experts=4, axis_name=axis)
            return jax_ep.combine(jax_ep.dispatch(x, layout).tokens, layout)

        return per_shard(mesh, call)

    along_row, along_column = along("column"), along("row")
    for program in (along_row, along_column):
        jax.block_until_ready(program(*data))
    jax_ep.check()
    mark("right")
    wait_for_marks("right", NUM_PROCESSES)
    jax_ep.set_timeout(2 if PROCESS == 2 else 600)
    if PROCESS < 3:
        results = jax.block_until_ready(along_row(*data))
        (part,) = (part for _, _, part in local_parts(results))
        print("POISONED", bool(((part & 0x7FFF) > 0x7F80).all()))
    if PROCESS in (0, 2):
        start = time.monotonic()
        try:
            jax.block_until_ready(along_column(*data))
            jax_ep.check()
        except CALL_ERRORS as error:
            print("ERROR", str(error).replace("\n", " "))
        print(f"SECONDS {time.monotonic() - start:.2f}")
    mark("done")
    wait_for_marks("done", NUM_PROCESSES)


def killed() -> None:
    """The last process is killed between calls; the others must learn it from us, and soon.

    With recoverability JAX lets the others exit with code 0, as long as the coordinator, process 0,
    leaves last.
    """
    jax.config.update("jax_enable_recoverability", True)
    join()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    mark("right")
    wait_for_marks("right", NUM_PROCESSES)
    jax_ep.set_timeout(600)  # no help: that a process has died is not found by a timeout
    if IS_LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        while time.monotonic() < start + 60:
            layer.call()
            jax_ep.check()
    except CALL_ERRORS as error:
        print(f"SECONDS {time.monotonic() - start:.2f}")
        print("ERROR", str(error).replace("\n", " "))
    layer.print_error("AGAIN")
    assert float(jax.jit(lambda x: x.sum())(np.ones(4))) == 4
    jax_ep.finalize()
    coordinator_leaves_last()


def interrupted() -> None:
    """Process 0 leaves while its kernel waits for process 1, which lives, until Ctrl-C."""
    join()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    jax_ep.set_timeout(arrival=600, progress=300)
    if IS_LAST:
        wait_for_marks("left", 1)
        for _ in range(2):  # the kernels of the first call find it, if no handler does
            layer.print_error("TOLD")
        return
    layer.program(*layer.data)
    start = time.monotonic()
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        jax_ep.finalize()
    except KeyboardInterrupt:
        print("INTERRUPTED")
    print(f"SECONDS {time.monotonic() - start:.2f}")
    mark("left")


def tear_down(how: str) -> None:
    """Leaves in several orders, after a call that everybody has waited for."""
    join()
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    if how == "again":
        jax_ep.finalize()
        jax_ep.finalize()
        layer.print_error("AFTER")
        for _ in range(2):
            connect(staging_bytes=1 << 20)
            layer.check()
            jax_ep.finalize()
    elif how == "in_turn":
        leave_as(PROCESS)
    elif how == "shutdown_first":
        jax.distributed.shutdown()
        jax_ep.finalize()
    elif how == "some_at_exit":
        if PROCESS == 0:
            jax_ep.finalize()
    elif how == "at_exit":
        pass
    elif how == "unblocked":
        layer.program(*layer.data)  # nobody waits for the last one
    else:
        raise ValueError(how)
