"""Scenarios of the tiers network-nvshmem, network-failures and network-tear-down.

NVSHMEM's start and end, ranks that fail and leave across nodes, in jobs that may share a GPU.

Lines that begin with "NOTE: " end up in run_tiers.py's table.
"""

import contextlib
import ctypes
import os
import signal
import socket
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from job import (
    IS_LAST,
    LAST,
    NUM_PROCESSES,
    PROCESS,
    coordinator_leaves_last,
    join,
    leave_as,
    mark,
    wait_for_marks,
)
from scenarios import Layer, call, hear_of_it, right_calls

import jax_ep
from jax_ep import nodes, nvshmem, reference

HEAP_BYTES = 96 << 20
RANKS_PER_HOST = 2
FAR_OFF = 600  # seconds: a timeout that helps nobody


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
    if IS_LAST:
        load = nvshmem.load
        nvshmem.load = lambda: CannotStart(load())
    _start_fails("it does not start here")


def one_has_no_transport() -> None:
    """NVSHMEM finds no way from the last process to the others: all hear of that."""
    _start_fails("process")


def _start_fails(words: str) -> None:
    text, seconds = refused()
    print(f"NOTE: process {PROCESS} after {seconds:.1f} s: {text.splitlines()[0][:160]}")
    assert words in text or IS_LAST, text
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
    if IS_LAST:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    jax_ep.finalize()
    print(f"NOTE: finalize() without process {LAST} took {time.monotonic() - start:.1f} s")
    assert time.monotonic() - start < 10
    coordinator_leaves_last()
    os._exit(0)  # jax.distributed's own end would wait for the dead one


def groups_on_hosts() -> None:
    """Two processes on each of two hosts, to all who ask for their name: groups lie on a host."""
    join()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("dp", "ep"))  # JAX looks for its own host
    clone_newuts = 0x04000000
    libc, name = ctypes.CDLL(None, use_errno=True), f"host{PROCESS // 2}".encode()
    for status in (libc.unshare(clone_newuts), libc.sethostname(name, len(name))):
        assert status == 0, f"another name for the host: {os.strerror(ctypes.get_errno())}"
    assert socket.gethostname() == name.decode()
    jax_ep.initialize(timeout=30, network=False)

    rng, num_experts = np.random.default_rng(5), 8
    ids = np.argsort(rng.random((4, 96, num_experts)), axis=2)[..., :4].astype(np.int32)
    x = rng.standard_normal((4, 96, 256)).astype(np.float32)
    sharding = NamedSharding(mesh, P(("dp", "ep")))
    placed = [jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in (ids, x)]

    def program(axis_name: Any) -> Any:
        def f(ids: Any, x: Any) -> Any:
            layout = jax_ep.make_layout(ids[0], num_experts=num_experts, axis_name=axis_name)
            return jax_ep.dispatch(x[0], layout).tokens[None]

        return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec))

    tokens = program("ep")(*placed)
    group = slice(2 * (PROCESS // 2), 2 * (PROCESS // 2) + 2)
    layout = reference.make_layout(ids[group], num_experts=num_experts)
    expected = reference.dispatch(x[group], layout, None)[0]
    (shard,) = tokens.addressable_shards
    assert np.asarray(shard.data)[0].tobytes() == expected[PROCESS % 2].tobytes()
    try:
        program(("dp", "ep"))(*placed)
    except NotImplementedError as error:
        print(f"NOTE: over hosts: {str(error)[:160]}")
    else:
        raise AssertionError("a group over hosts has been made")


# Ranks that fail, across nodes --------------------------------------------------------------------


def connect_hosts() -> None:
    """Joins as a job whose every two processes are on a host of their own, as far as they say.

    So a process looks after those of its host alone. Others hear over the network that one failed.
    """
    join()
    jax.devices()  # JAX asks, too
    name = f"host{PROCESS // RANKS_PER_HOST}"
    nodes.socket.gethostname = lambda: name
    connect()
    assert nvshmem.is_running()


def all_are(name: str) -> None:
    """Waits until all processes have come here."""
    mark(name)
    wait_for_marks(name, NUM_PROCESSES)


def a_rank_never_comes() -> None:
    """The last process does not make the first call. One on another host waits for it in vain.

    That one's timeout alone is near. It tells the others, and the last one when it comes.
    """
    connect_hosts()
    layer = Layer(ranks_per_node=RANKS_PER_HOST)
    data = layer.data(0)
    placed = layer.place(data)
    layer.program = layer.program.lower(*placed).compile()
    jax_ep.set_timeout(3 if PROCESS == 0 else FAR_OFF)
    all_are("compiled")
    hear_in_turn(layer, placed, data, gives_up=0)


def a_rank_stalls() -> None:
    """The last process stops calling; one on its host has a timeout that is near, and tells all."""
    connect_hosts()
    layer, placed, data = right_calls(RANKS_PER_HOST)
    jax_ep.set_timeout(3 if PROCESS == LAST - 1 else FAR_OFF)
    all_are("right")
    hear_in_turn(layer, placed, data, gives_up=LAST - 1)


def hear_in_turn(layer: Layer, placed: Any, data: Any, gives_up: int) -> None:
    """All hear of the last process, and then that one, when it comes, of who has given up on it."""
    if IS_LAST:
        wait_for_marks("heard", LAST)
        hear_of_it(layer, placed, data, other=gives_up, most_seconds=2)
    else:
        hear_of_it(layer, placed, data, other=LAST, most_seconds=7)
        mark("heard")
    all_are("told")


def all_are_right_again() -> None:
    """After a failure and finalize() everywhere, initialize() mends groups across nodes, too."""
    connect_hosts()
    jax_ep.set_timeout(30)
    right_calls(RANKS_PER_HOST)


def a_rank_is_killed() -> None:
    """The last process dies with a call in flight; its host's other one tells the other hosts."""
    jax.config.update("jax_enable_recoverability", True)  # JAX lets the coordinator outlive it
    connect_hosts()
    layer, placed, data = right_calls(RANKS_PER_HOST)
    jax_ep.set_timeout(FAR_OFF)
    all_are("right")
    if IS_LAST:
        layer.program(*placed)
        os.kill(os.getpid(), signal.SIGKILL)
    hear_of_it(layer, placed, data, other=LAST, most_seconds=7)
    start = time.monotonic()
    jax_ep.finalize()
    assert time.monotonic() - start < 10
    coordinator_leaves_last()
    os._exit(0)  # jax.distributed's own end would wait for the dead one


# Leaving, across nodes ----------------------------------------------------------------------------


def begun_again() -> None:
    """Three times from initialize() to finalize(), each with calls and a region of its own."""
    for _ in range(3):
        connect()
        right_calls(ranks_per_node=1)
        jax_ep.finalize()


def left_unblocked() -> None:
    """finalize() while calls are on their way: each is right, or raises.

    Those raise whose handlers had not run yet.
    """
    connect()
    layer, placed, data = right_calls(ranks_per_node=1)
    results = [layer.program(*placed) for _ in range(20)]
    jax_ep.finalize()
    for result in results:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            assert not layer.wrong(result, data)


def left_in_turn() -> None:
    """Each process leaves when those before it have. The first waits for them in vain."""
    connect()
    right_calls(ranks_per_node=1)
    leave_as(PROCESS)


def one_leaves_the_rest() -> None:
    """The last process leaves; the others make a call, which no timeout ends, and hear of that."""
    connect_hosts()
    layer, placed, data = right_calls(RANKS_PER_HOST)
    jax_ep.set_timeout(FAR_OFF)
    all_are("right")
    if IS_LAST:
        jax_ep.finalize()
        wait_for_marks("heard", LAST)
        return
    hear_of_it(layer, placed, data, other=LAST, most_seconds=10)
    mark("heard")


def shut_down_first() -> None:
    """jax.distributed is gone when this library leaves, at the end of the process."""
    connect()
    right_calls(ranks_per_node=1)
    jax.distributed.shutdown()
