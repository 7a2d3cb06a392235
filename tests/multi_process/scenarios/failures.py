"""A process that dies, stalls or comes late."""

import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from job import (
    IS_LAST,
    NUM_PROCESSES,
    coordinator_leaves_last,
    join,
    mark,
    mark_when_said,
    wait_for_marks,
)
from layers import check_pair, layer_and_data

import jax_ep


def killed() -> None:
    """The last process is killed in a loop; the others must learn it from us, and soon."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(60)
    f, data, _ = layer_and_data()
    start = time.monotonic()
    try:
        for step in range(100000):
            jax.block_until_ready(f(*data))
            start = time.monotonic()
            if step == 20 and IS_LAST:
                os.kill(os.getpid(), signal.SIGKILL)
    except jax.errors.JaxRuntimeError as error:
        print(f"SECONDS {time.monotonic() - start:.2f}")
        print("ERROR", error)
    # A second call fails as well, at once, and the runtime still computes.
    try:
        jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("AGAIN", error)
    assert float(jax.jit(jnp.sum)(np.ones(4))) == 4
    coordinator_leaves_last()


def stalled() -> None:
    """The last process never calls."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(2)
    f, data, _ = layer_and_data()
    if IS_LAST:
        wait_for_marks("done", NUM_PROCESSES - 1)
        return
    try:
        jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error)
    mark("done")


def waited_for() -> None:
    """The last process comes later than a rank that has come may take, and in time."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(arrival=60, progress=0.5)
    f, data, ids = layer_and_data()
    if IS_LAST:
        wait_for_marks("said", 1)
    else:
        mark_when_said("waits for rank")
    check_pair(f(*data), ids)
    print("RIGHT")


def late() -> None:
    """The last process calls after the others have given up; the next call is right again."""
    join()
    jax_ep.initialize()
    f, data, ids = layer_and_data()
    check_pair(f(*data), ids)
    jax_ep.set_timeout(2)
    if IS_LAST:
        wait_for_marks("done", NUM_PROCESSES - 1)
    try:
        jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error)
    mark("done")
    wait_for_marks("done", NUM_PROCESSES)
    jax_ep.set_timeout(60)
    check_pair(f(*data), ids)
    print("RIGHT")
