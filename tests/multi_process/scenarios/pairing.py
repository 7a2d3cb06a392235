"""Calls of one process meet the same calls of the others, whatever else each of them does."""

import jax
import numpy as np
from job import NUM_PROCESSES, PROCESS, join, mark, wait_for_marks
from layers import check_pair, layer_and_data
from protocol import stress

import jax_ep


def pairing() -> None:
    """Independent calls, ready in different orders, on all devices of all processes."""
    join()
    jax_ep.initialize()
    for scenario in ("eight_layers", "one_layer_twice", "back_to_back", "scan", "two_programs"):
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
    try:
        got = jax.block_until_ready(f(*data))
    except jax.errors.JaxRuntimeError as error:
        print("ERROR", error)
    else:
        check_pair(got, ids)
        print("RIGHT")
    mark("done")
    wait_for_marks("done", NUM_PROCESSES)
