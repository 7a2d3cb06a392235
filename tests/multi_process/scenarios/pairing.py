"""Calls of one process meet the same calls of the others, whatever else each of them does."""

import os
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from job import NUM_PROCESSES, PROCESS, join, mark, wait_for_marks
from layers import NUM_TOKENS, check_pair, layer_and_data, make_mesh, per_shard
from protocol import stress

import jax_ep


def pairing() -> None:
    """Independent calls, ready in different orders, on all devices of all processes.

    What more processes than two could change: calls of one program and of another in flight.
    """
    join()
    jax_ep.initialize()
    scenarios = ["two_programs"]
    if NUM_PROCESSES == 2:
        scenarios += ["eight_layers", "one_layer_twice", "scan"]
    for scenario in scenarios:
        stress.SCENARIOS[scenario](jax.devices(), 40, 0)
        print("RIGHT", scenario)


EXTRA = (
    "cost_analysis",
    "compiler_options",
    "lowered_twice",
    "local_programs",
    "other_line",
    "serialized",
)


def extra_compile() -> None:
    """Process 0 compiles more than the others before a call: in each way, of a program of its own.

    And does compile it, whatever programs the tests share. Prints RIGHT and the way.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once a process
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(8)
    for i, how in enumerate(EXTRA):
        _compile_more(how, NUM_TOKENS + i)
        print("RIGHT", how)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def _compile_more(how: str, num_tokens: int) -> None:
    f, data, ids = layer_and_data(num_tokens=num_tokens)
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
            # Of a process of its own: not the same trace.
            f, data, ids = layer_and_data(num_tokens=num_tokens)
        elif how == "serialized":
            f = serialize_executable.deserialize_and_load(
                *serialize_executable.serialize(f.lower(*data).compile())
            )
    for _ in range(3):
        check_pair(f(*data), ids)


def cached(folder: str) -> None:
    """Steps with JAX's persistent cache: of one folder; of process 0's, which is kept, and 1's."""
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    join()
    jax_ep.initialize()
    jax_ep.set_timeout(20)
    kept_by_one = f"{folder}/own" if PROCESS == 0 else f"{folder}/{os.getpid()}"
    for which, cache in (("shared", f"{folder}/shared"), ("own", kept_by_one)):
        jax.config.update("jax_compilation_cache_dir", cache)
        compilation_cache.reset_cache()  # of which JAX has one in a process, with its folder
        f, data, ids = layer_and_data()
        events.clear()
        for _ in range(3):
            check_pair(f(*data), ids)
        print("RIGHT", which)
        if "/jax/compilation_cache/cache_hits" in events:
            print("HIT", which)


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
