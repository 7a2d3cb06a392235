"""The benchmark in a job of several processes."""

import json
import os
from typing import Any

from job import NUM_PROCESSES, PROCESS

import jax_ep
from jax_ep.bench import cli, measure

SIZES = "--platform cpu --ranks 4 --tokens 3 --hidden 64 --top-k 2 --experts 8 --fp8 none"


def together() -> None:
    """As the command line says; then again, where process 1 cannot do one of the operations."""
    job = f"--distributed --coordinator 127.0.0.1:{os.environ['JAX_EP_TEST_PORT']}"
    job += f" --num-processes {NUM_PROCESSES} --process-id {PROCESS}"
    _tell(f"{SIZES} {job} --repeats 3 --ranks-per-node 4 2 --only make_layout+dispatch all_to_all+")
    jax_ep.set_timeout(2)
    compile_calls = measure.compile_calls

    def compile_some(fn: Any, *args: Any, **options: Any) -> Any:
        if PROCESS == 1 and fn.__name__ == "combine":
            raise MemoryError("no room for this\nin process 1")
        return compile_calls(fn, *args, **options)

    measure.compile_calls = compile_some
    _tell(f"{SIZES} --repeats 2 --only combine")


def _tell(arguments: str) -> None:
    rows = cli.main(arguments.split())
    jax_ep.finalize()
    print("ROWS", json.dumps(rows))
