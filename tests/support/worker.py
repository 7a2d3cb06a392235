"""One process of a job: `worker.py FILE SCENARIO [ARGUMENT...]`. Started by launcher.py.

FILE is a Python file, SCENARIO a function of it. What it returns is the exit code; one that returns
None lets the interpreter exit the usual way, through jax_ep's and JAX's own tear-down.

Most of what a process costs is to import JAX. Scenarios that leave nothing behind can share it:
`one+other` runs one after the other, says which begins, and between them waits for all processes
and calls jax_ep.finalize(). `module.function` is a scenario of another file beside FILE. With
JAX_EP_TEST_HOST the process has that host name (host.py).
"""

import faulthandler
import importlib
import os
import pathlib
import sys

import host

TESTS = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    file, scenario, *arguments = sys.argv[1:]
    if name := os.environ.get("JAX_EP_TEST_HOST"):
        host.become(name)
    path = pathlib.Path(file).resolve()
    # The launcher ends this process at its limit; before that it says where it is.
    limit = float(os.environ["JAX_EP_TEST_LIMIT"])
    faulthandler.dump_traceback_later(max(1.0, limit - 3), exit=False)
    sys.path[:0] = [str(path.parent), str(TESTS), str(TESTS / "support")]
    names = scenario.split("+")
    for i, name in enumerate(names):
        module, _, function = name.rpartition(".")
        run = getattr(importlib.import_module(module or path.stem), function)
        if len(names) > 1:
            importlib.import_module("job").begin(name, is_first=i == 0)
        status = run(*arguments)
    sys.stdout.flush()
    raise SystemExit(status)


if __name__ == "__main__":
    main()
