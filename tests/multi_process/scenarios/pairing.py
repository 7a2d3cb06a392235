"""Calls of one process meet the same calls of the others, whatever else each of them does."""

import os
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from job import NUM_PROCESSES, PROCESS, join, mark, wait_for_marks
from layers import check_pair, layer_and_data, make_mesh, per_shard
from protocol import stress

import jax_ep


def pairing(*scenarios: str) -> None:
    """Independent calls, ready in different orders, on all devices of all processes."""
    join()
    jax_ep.initialize()
    for scenario in scenarios:
        stress.SCENARIOS[scenario](jax.devices(), 40, 0)


def extra_compile(how: str) -> None:
    """Process 0 compiles more than the others before the call. Prints RIGHT or the error."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(8)
    f, data, ids = layer_and_data()
    if PROCESS == 0:
        if how == "cost_analysis":
            f.lower(*data).compile().cost_analysis()
        elif how == "compiler_options":
            f.lower(*data).compile({"xla_embed_ir_in_executable": True})
        elif how == "lowered_twice":
            lowered = [f.lower(*data), jax.jit(lambda *a: f(*a)).lower(*data)]
            for one in lowered:
                one.compile()
        elif how == "local_programs":
            jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()
        elif how == "other_line":
            f, data, ids = layer_and_data()  # of a process of its own: not the same trace
        elif how == "serialized":
            f = serialize_executable.deserialize_and_load(
                *serialize_executable.serialize(f.lower(*data).compile())
            )
    for _ in range(3):
        check_pair(f(*data), ids)
    print("RIGHT")
    mark("done")
    wait_for_marks("done", NUM_PROCESSES)


def cached(folder: str, shared: str) -> None:
    """A step with JAX's persistent cache: one folder, or process 0's is kept and 1's is not."""
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    own = f"{folder}/cache" if shared == "shared" or PROCESS == 0 else f"{folder}/{os.getpid()}"
    jax.config.update("jax_compilation_cache_dir", own)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(20)
    f, data, ids = layer_and_data()
    for _ in range(3):
        check_pair(f(*data), ids)
    print("RIGHT")
    if "/jax/compilation_cache/cache_hits" in events:
        print("HIT")


def other_order() -> None:
    """Two programs, launched in another order by each process, then in the same one."""
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(60)
    both, data, ids = layer_and_data()
    mesh = make_mesh((len(jax.devices()),), ("ep",))

    def one(ids: Any, x: Any, weights: Any) -> Any:
        layout = jax_ep.make_layout(ids, num_experts=2 * mesh.size, axis_name="ep")
        recv = jax_ep.dispatch(x, layout, weights)
        return jax_ep.combine(recv.tokens, layout, recv.weights)

    single = per_shard(mesh, one)
    for program in (both, single):
        program.lower(*data).compile()
    start = time.monotonic()
    try:
        jax.block_until_ready((both if PROCESS == 0 else single)(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", str(error).splitlines()[0])
    print(f"SECONDS {time.monotonic() - start:.2f}")
    mark("failed")
    wait_for_marks("failed", NUM_PROCESSES)
    check_pair(both(*data), ids)
    print("RIGHT")
