"""The benchmark in a job of several processes."""

import json
import os
from typing import Any

from job import NUM_PROCESSES, PROCESS

import jax_ep
from jax_ep.bench import cli, measure
from jax_ep.bench.processes import OthersGoneError

SIZES = "--platform cpu --ranks 4 --tokens 3 --hidden 64 --top-k 2 --experts 8 --fp8 none"


def together() -> None:
    """As the command line says; then again, where process 1 cannot do one of the operations.

    Calls wait for their peers for 600 s, as they do by default.
    """
    job = f"--distributed --coordinator 127.0.0.1:{os.environ['JAX_EP_TEST_PORT']}"
    job += f" --num-processes {NUM_PROCESSES} --process-id {PROCESS}"
    _tell(f"{SIZES} {job} --repeats 3 --ranks-per-node 4 2 --only make_layout+dispatch all_to_all+")
    compile_calls = measure.compile_calls
    failure: list[Exception] = [MemoryError("no room for this\nin process 1")]

    def compile_some(fn: Any, *args: Any, **options: Any) -> Any:
        if PROCESS == 1 and fn.__name__ == "combine":
            raise failure[-1]
        return compile_calls(fn, *args, **options)

    measure.compile_calls = compile_some
    _tell(f"{SIZES} --repeats 2 --only =combine =make_layout")
    failure.append(RuntimeError("UNIMPLEMENTED: not in process 1"))
    _tell(f"{SIZES} --tokens 3 5 --repeats 2 --only =combine =make_layout")
    for arguments in ("--seed", f"{PROCESS}"), ("--only", "=combine"):
        failure.append(TypeError("a mistake"))
        try:
            _tell(f"{SIZES} {' '.join(arguments)}")
        except (SystemExit, TypeError, OthersGoneError) as error:
            print("ENDED", type(error).__name__, str(error).replace("\n", " "))


def _tell(arguments: str) -> None:
    rows = cli.main(arguments.split())
    jax_ep.finalize()
    print("ROWS", json.dumps(rows))
