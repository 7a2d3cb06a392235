"""Processes that say they are on several hosts: which ranks are a node, and what is refused."""

import dataclasses
import socket
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from job import NUM_PROCESSES, PROCESS, join, mark, wait_for_marks
from layers import example, make_mesh, per_shard, put

import jax_ep
from jax_ep import nodes, reference


def _check(mesh: Mesh, ranks_per_node: int) -> None:
    """Sums are in the order of so many ranks on a node, to the bit."""
    ids, x, weights, _ = example(mesh, mesh.size)

    def f(ids: Any, x: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=2 * mesh.size, axis_name="ep")
        recv = jax_ep.dispatch(x, layout, weights)
        return jax_ep.combine(recv.tokens, layout, recv.weights)

    out = per_shard(mesh, f)(*(put(mesh, array, P("ep")) for array in (ids, x, weights)))
    layout = reference.make_layout(ids, num_experts=2 * mesh.size)
    rows = reference.dispatch(x, layout, weights)
    on_nodes = dataclasses.replace(layout, ranks_per_node=ranks_per_node)
    expected, on_one = (reference.combine(rows[0], of, rows[1]) for of in (on_nodes, layout))
    assert ranks_per_node == mesh.size or (expected != on_one).mean() > 0.01
    for shard in out.addressable_shards:
        got = np.asarray(shard.data)[0]
        assert got.tobytes() == expected[shard.index[0].start or 0].tobytes()
    print("RIGHT", ranks_per_node)


def _refused(what: Any) -> None:
    try:
        what()
    except (RuntimeError, ValueError) as error:
        print("ERROR", error)


def on_hosts() -> None:
    """Each process on a host of its own; then options that say otherwise."""
    join()
    here = socket.gethostname
    nodes.socket.gethostname = lambda: f"host{PROCESS}"
    try:
        jax_ep.initialize()
    finally:
        nodes.socket.gethostname = here
    each = jax.local_device_count()
    _check(make_mesh((each * NUM_PROCESSES,), ("ep",)), each)
    scattered = np.arange(each * NUM_PROCESSES).reshape(NUM_PROCESSES, each).T.reshape(-1)
    _refused(lambda: _check(make_mesh((scattered.size,), ("ep",), scattered), each))
    jax_ep.finalize()

    _refused(lambda: jax_ep.initialize(ranks_per_node=1 + PROCESS))
    jax_ep.initialize(ranks_per_node=2)
    _check(make_mesh((scattered.size,), ("ep",), scattered), 2)
    jax_ep.finalize()

    jax_ep.initialize()
    _check(make_mesh((scattered.size,), ("ep",), scattered), scattered.size)


def other_programs() -> None:
    """Each process has a program of its own order, of one layout."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(60)
    mesh = make_mesh((len(jax.devices()),), ("ep",))
    ids, x, _, _ = example(mesh, mesh.size)
    data = [put(mesh, array, P("ep")) for array in (ids, x)]

    def program(ranks_per_node: int) -> Any:
        def f(ids: Any, x: Any) -> Any:
            layout = jax_ep.make_layout(ids, num_experts=2 * mesh.size, axis_name="ep")
            layout = dataclasses.replace(layout, ranks_per_node=ranks_per_node)
            return jax_ep.combine(jax_ep.dispatch(x, layout).tokens, layout)

        return per_shard(mesh, f)

    own = program(2 if PROCESS == 0 else 4)
    own.lower(*data).compile()
    start = time.monotonic()
    try:
        jax.block_until_ready(own(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", str(error).splitlines()[0])
    print(f"SECONDS {time.monotonic() - start:.2f}")
    mark("differed")
    wait_for_marks("differed", NUM_PROCESSES)
    jax.block_until_ready(program(2)(*data))
    print("RIGHT")
