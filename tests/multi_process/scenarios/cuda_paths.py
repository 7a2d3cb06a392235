"""The paths that rows take between GPUs, and what each demands of XLA's memory."""

import threading

from cuda_layer import Layer, connect
from job import CALL_ERRORS, join
from layers import local_parts

import jax_ep


def right(num_tokens: str, staging_bytes: str) -> None:
    """Every verb on whatever path the environment chooses."""
    join()
    connect(staging_bytes=int(staging_bytes))
    Layer(int(num_tokens)).check()


def grown() -> None:
    """XLA's memory has grown since initialize(): an error without a staging region."""
    join()
    connect()
    layer = Layer(2**14)  # a rank receives rows of 16 MB, which do not fit what there was
    layer.print_error("GROWN")
    jax_ep.finalize()
    connect(staging_bytes=1 << 27)
    layer.check()


def too_small() -> None:
    """The region is too small for a call; the error says how large it has to be."""
    join()
    connect(staging_bytes=256)
    layer = Layer()
    layer.print_error("SMALL")
    jax_ep.finalize()
    connect(staging_bytes=1 << 20)
    layer.check()


def not_exportable() -> None:
    """XLA's memory cannot be mapped: initialize() says what to pass, and works with it."""
    join()
    try:
        connect()
    except RuntimeError as error:
        print("ERROR", str(error).replace("\n", " "))
    connect(staging_bytes=1 << 20)
    Layer().check()


def slots() -> None:
    """Processes disagree on slots: initialize() says so, and works once they agree."""
    join()
    try:
        connect()
    except RuntimeError as error:
        print("ERROR", str(error).replace("\n", " "))
    connect(slot_bytes=1 << 22)
    Layer().check()


def alone() -> None:
    """One process with all GPUs, everything staged; it leaves and comes back."""
    layer = Layer()
    layer.print_error("SMALL")
    connect(staging_bytes=1 << 20)
    layer.check()
    jax_ep.finalize()
    layer.print_error("AFTER")
    jax_ep.initialize()  # keeps the region
    layer.check()


def grown_in_flight() -> None:
    """One process with all GPUs, everything staged: its region grows while a thread calls."""
    connect(staging_bytes=1 << 20)
    layer = Layer()
    layer.check()
    called, enough, wrong = threading.Semaphore(0), threading.Event(), []
    right = [part.tobytes() for _, _, part in local_parts(layer.call())]

    def work() -> None:
        try:
            while not enough.is_set():
                results = [layer.program(*layer.data) for _ in range(4)]  # some are on their way
                for parts in map(local_parts, results):
                    wrong.append([part.tobytes() for _, _, part in parts] != right)
                called.release()
        except CALL_ERRORS as error:
            print("ERROR", str(error).replace("\n", " "))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    for doubled in range(1, 6):
        for _ in range(2):
            assert called.acquire(timeout=60), "the thread does not call any more"
        jax_ep.initialize(staging_bytes=1 << (20 + doubled))
    enough.set()
    thread.join(60)
    assert not thread.is_alive(), "the thread does not end"
    print("WRONG", sum(wrong))
    layer.check()
