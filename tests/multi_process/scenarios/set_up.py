"""initialize() that fails or is missing, and leaving in several orders."""

import ctypes
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from job import NUM_PROCESSES, PROCESS, join, leave_as, mark, wait_for_marks
from layers import check_pair, example, layer_and_data, make_mesh, per_shard, put

import jax_ep
from jax_ep import reference


def retried_after_missing() -> None:
    """The last process comes to initialize() when the others have tried twice, in vain."""
    join()
    if PROCESS < NUM_PROCESSES - 1:
        for _ in range(2):
            try:
                jax_ep.initialize(timeout=1)
            except RuntimeError as error:
                print("ERROR", error)
        mark("done")
    wait_for_marks("done", NUM_PROCESSES - 1)
    jax_ep.initialize(timeout=30)
    f, data, ids = layer_and_data()
    check_pair(f(*data), ids)
    print("RIGHT")


def retried_after_failure() -> None:
    """Process 1 cannot be read at first; then it can, and all try again."""
    join()
    libc = drop_ptrace_capability()
    if PROCESS == 1:
        assert libc.prctl(4, 0, 0, 0, 0) == 0  # PR_SET_DUMPABLE
    start = time.monotonic()
    try:
        jax_ep.initialize(timeout=30)
    except RuntimeError as error:
        print(f"SECONDS {time.monotonic() - start:.2f}")
        print("ERROR", error)
    # Nothing is left: this raises nothing, and a program that spans processes is refused.
    jax_ep.finalize()
    f, data, ids = layer_and_data()
    try:
        f(*data)
    except RuntimeError as error:
        print("REFUSED", error)
    if PROCESS == 1:
        assert libc.prctl(4, 1, 0, 0, 0) == 0
    mark("done")
    wait_for_marks("done", NUM_PROCESSES)
    jax_ep.initialize(timeout=30)
    check_pair(f(*data), ids)
    print("RIGHT")


def forgotten() -> None:
    """Nobody calls initialize()."""
    join()
    f, data, _ = layer_and_data()
    try:
        jax.block_until_ready(f(*data))
    except RuntimeError as error:
        print("ERROR", error)


def groups_inside_processes() -> None:
    """Expert parallelism inside each process, data parallelism across: nothing to initialize."""
    join()
    jax_ep.set_timeout(20)
    mesh = make_mesh((NUM_PROCESSES, jax.local_device_count()), ("dp", "ep"))
    num_ranks = mesh.shape["ep"]
    ids, x, weights, _ = example(mesh, num_ranks)
    data = [put(mesh, array, P(mesh.axis_names)) for array in (ids, x, weights)]

    def layer(ids: Any, x: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=2 * num_ranks, axis_name="ep")
        recv = jax_ep.dispatch(x, layout, weights)
        return jax_ep.combine(recv.tokens, layout, recv.weights), layout.recv_src

    _, recv_src = per_shard(mesh, layer)(*data)
    ids = np.where(ids >= 2 * num_ranks, -1, ids).reshape(*mesh.devices.shape, *ids.shape[1:])
    for shard in recv_src.addressable_shards:
        group, rank = divmod(shard.index[0].start or 0, num_ranks)
        expected = reference.make_layout(ids[group], num_experts=2 * num_ranks)
        np.testing.assert_array_equal(np.asarray(shard.data)[0], expected.recv_src[rank])
    print("RIGHT")


def drop_ptrace_capability() -> ctypes.CDLL:
    """Gives up CAP_SYS_PTRACE, which root has: with it nothing is unreadable. Returns libc."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for i in range(3):
        sets[i] &= ~(1 << 19)
    assert libc.capset(header, sets) == 0
    return libc


def leave_and_join() -> None:
    """Leaves in turn, joins again, leaves in reverse, joins once more and leaves at will."""
    join()
    f, data, ids = layer_and_data()
    for name, place in (("first", PROCESS), ("second", NUM_PROCESSES - 1 - PROCESS)):
        jax_ep.initialize()
        try:
            jax_ep.initialize()
        except RuntimeError as error:
            print("TWICE", error)
        check_pair(f(*data), ids)
        leave_as(place, f"left the {name} time")
    jax_ep.initialize()
    check_pair(f(*data), ids)
    jax_ep.finalize()
    jax_ep.finalize()
    try:
        jax.block_until_ready(f(*data))
    except RuntimeError as error:
        print("AFTER", error)


def tear_down(how: str) -> None:
    """Leaves after a call that everybody has waited for, at the end of the process."""
    join()
    jax_ep.initialize()
    f, data, ids = layer_and_data()
    check_pair(f(*data), ids)
    if how == "shutdown_first":
        jax.distributed.shutdown()
        jax_ep.finalize()
    elif how == "some_at_exit":
        if PROCESS == 0:
            jax_ep.finalize()
    elif how == "unblocked":
        f(*data)  # nobody waits for the last one
    else:
        raise ValueError(how)
