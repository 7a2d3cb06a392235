"""The paths that rows take between GPUs, and what each demands of XLA's memory."""

from cuda_layer import Layer, connect
from job import join

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
