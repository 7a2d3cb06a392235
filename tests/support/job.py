"""What one process of a job knows of it: its number, its folder; how it joins, waits and leaves.

For scenarios, the functions that worker.py runs. The launcher describes the job in
JAX_EP_TEST_{PROCESS,NUM_PROCESSES,PORT,OUT,PLATFORM}, and in JAX_EP_TEST_DEVICE the one local
device that this process has on a platform with GPUs.
"""

import os
import pathlib
import threading
import time
from typing import Any

import jax

import jax_ep

PROCESS = int(os.environ["JAX_EP_TEST_PROCESS"])
NUM_PROCESSES = int(os.environ["JAX_EP_TEST_NUM_PROCESSES"])
LAST = NUM_PROCESSES - 1
IS_LAST = PROCESS == LAST
OUT = pathlib.Path(os.environ["JAX_EP_TEST_OUT"])
PLATFORM = os.environ["JAX_EP_TEST_PLATFORM"]

CALL_ERRORS = (RuntimeError, ValueError)
"""What a failed call raises: JAX's own is a RuntimeError; where it waits for several arrays at once
it raises a ValueError."""


_scenario = ""  # that runs, where there are several: each has marks of its own


def begin(scenario: str, is_first: bool) -> None:
    """Says which scenario begins. All processes have ended and left the one before."""
    global _scenario
    if not is_first:
        mark("ended")
        wait_for_marks("ended", NUM_PROCESSES)
        jax_ep.finalize()
    _scenario = scenario
    print("SCENARIO", scenario)


def join() -> None:
    """Makes this process one of the job, for JAX, if it is not. Alone it has all devices."""
    if NUM_PROCESSES == 1 or jax.distributed.is_initialized():
        return
    options: dict[str, Any] = {}
    if PLATFORM != "cpu":
        options["local_device_ids"] = [int(os.environ["JAX_EP_TEST_DEVICE"])]
    address = f"127.0.0.1:{os.environ['JAX_EP_TEST_PORT']}"
    jax.distributed.initialize(address, NUM_PROCESSES, PROCESS, **options)


def connect(**options: Any) -> None:
    """Makes this process one of the job, for JAX and for jax_ep."""
    join()
    jax.devices(PLATFORM)  # its client exists before jax_ep.initialize() looks for it
    jax_ep.initialize(**options)


def mark(name: str) -> None:
    """Leaves a file that the others can wait for."""
    _mark(name, PROCESS)


def _mark(name: str, number: int) -> None:
    (OUT / f"{_scenario}.{name}_{number}").touch()


def _marks(name: str) -> list[pathlib.Path]:
    return list(OUT.glob(f"{_scenario}.{name}_*"))


def wait_for_marks(name: str, count: int, seconds: float = 60) -> None:
    """Returns when so many processes have left their mark."""
    deadline = time.monotonic() + seconds
    while len(_marks(name)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"fewer than {count} processes left the mark {name!r}")
        time.sleep(0.02)


def mark_when_said(words: str, seconds: float = 60) -> None:
    """Leaves the mark "said" once this process has logged these words; in a thread of its own."""
    log = pathlib.Path(os.readlink("/proc/self/fd/2"))
    begin = log.stat().st_size

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while words.encode() not in log.read_bytes()[begin:]:
            if time.monotonic() > deadline:
                return  # who waits for the mark says that it has not come
            time.sleep(0.05)
        mark("said")

    threading.Thread(target=watch, daemon=True).start()


def leave_as(place: int, name: str = "left") -> None:
    """Calls finalize() when `place` processes have left before, as marks of this name say."""
    wait_for_marks(name, place)
    jax_ep.finalize()
    mark(name)


def coordinator_leaves_last(seconds: float = 60) -> None:
    """Process 0 returns when the other survivors of a job that lost one process have ended."""
    _mark("pid", os.getpid())
    if PROCESS != 0:
        return
    wait_for_marks("pid", NUM_PROCESSES - 1)
    others = {int(f.name.rpartition("_")[2]) for f in _marks("pid")} - {os.getpid()}
    deadline = time.monotonic() + seconds
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in others):
        if time.monotonic() > deadline:
            raise TimeoutError("the other survivors do not end")
        time.sleep(0.02)
