"""What a node with four or eight GPUs is for: the tiers at that size, then all figures, in one run.

    python tests/gpu/whole_node.py --out DIR                 # within nine minutes
    python tests/gpu/whole_node.py --out DIR --steps bench-sms bench-decode
    python tests/gpu/whole_node.py --list

Works with any number of GPUs from two on; `--package DIR` is as for run_tiers.py. Each step is a
command with a time limit of its own, which goes on whatever came of those before it; DIR gets its
output as STEP.txt and its figures as STEP.json. What does not fit into `--budget` is not run, or
stopped, and the table at the end says so. The exit code is not 0 if a step failed, was stopped or
was not run.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

import gpus  # noqa: E402 (of tests/support)
import launcher  # noqa: E402

BENCH = "-P -m jax_ep.bench --no-second-process --repeats 7"
BASE = "--hidden 7168 --top-k 8 --capacity tight"
VERBS = "make_layout dispatch layout_and_dispatch combine round"
QUICK_TIERS = "one-process process-per-gpu failures slots-one-process transformations"


@dataclasses.dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: for the table, and of its files.
        command: its arguments.
        limit: seconds.
        is_bench: whether it writes figures, and to the file given by --json.
    """

    name: str
    command: list[str]
    limit: float
    is_bench: bool = False


def bench(name: str, limit: float, arguments: str) -> Step:
    """The benchmark with these arguments."""
    return Step(name, [sys.executable, *BENCH.split(), *arguments.split()], limit, is_bench=True)


def tiers(name: str, limit: float, arguments: str, package: pathlib.Path | None) -> Step:
    """Tiers of run_tiers.py, which say what they did not do in their time."""
    command = [sys.executable, str(HERE / "run_tiers.py"), "--budget", str(limit - 5)]
    command += ["--package", str(package)] if package else []
    return Step(name, command + arguments.split(), limit)


def steps(package: pathlib.Path | None) -> list[Step]:
    """All of them, what is wanted most first."""
    uniform = f"{BASE} --routing uniform --fp8 none"
    forms = f"{BASE} --routing uniform zipf group-limited --fp8 none float32"
    sizes = "--tokens 1 16 128 1024 4096 16384"
    stress = "--tiers one-process -k random_calls --seconds 40 --calls 100000"
    return [
        tiers("tiers", 200, f"--quick --tiers {QUICK_TIERS}", package),
        bench("bench-sms", 60, f"{uniform} --tokens 4096 --num-sms 24 16 --only {VERBS}"),
        bench("bench-tokens", 100, f"{uniform} {sizes}"),
        bench("bench-decode", 60, "--decode --tokens 1 16 128 --fp8 none"),
        bench("bench-forms", 60, f"{forms} --tokens 4096 --only dispatch combine"),
        bench("bench-overlap", 60, "--overlap --layers 2"),
        tiers("stress", 100, stress, package),
        tiers("example", 60, "--tiers example", package),
    ]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [step.name for step in steps(None)]
    add("--out", type=pathlib.Path, help="a folder for outputs and figures")
    add("--steps", nargs="+", choices=names, default=names, help="only these")
    add("--budget", type=float, default=540, help="seconds, for all (540)")
    add("--package", type=pathlib.Path, help="the folder that holds the package jax_ep")
    add("--list", action="store_true", help="print the commands, and end")
    args = parser.parse_args(argv)
    if args.out is None and not args.list:
        parser.error("--out: say where outputs and figures go")
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the steps in turn; returns the exit code."""
    args = parse_args(argv)
    wanted = [step for step in steps(args.package) if step.name in args.steps]
    if args.list:
        for step in wanted:
            print(f"{step.name} ({step.limit:g} s): {' '.join(step.command)}")
        return 0
    if gpus.count_gpus() < 2:
        print("needs two GPUs")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [str(args.package.resolve())] if args.package else []
    paths += [path for path in [os.environ.get("PYTHONPATH")] if path]
    environment = {
        "NCCL_NVLS_ENABLE": "0",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }
    deadline = time.monotonic() + args.budget
    lines, is_whole = [], True
    for step in wanted:
        left = deadline - time.monotonic()
        if left < step.limit / 2:
            lines.append(f"{step.name:14} not run: {max(0.0, left):.0f} s of --budget were left")
            is_whole = False
            continue
        command = step.command
        if step.is_bench:
            command = [*command, "--json", str(args.out / f"{step.name}.json")]
        process = launcher.Process(command, environment, args.out / f"{step.name}.txt")
        ended = launcher.run([process], limit=min(step.limit, left))
        how = "passed"
        if ended.problems([process]):
            is_whole = False
            how = "STOPPED: time was up" if ended.late else f"FAILED: {ended.returncodes[0]}"
        lines.append(f"{step.name:14} {ended.seconds:6.1f} s  {how}")
        print(f"\n==== {lines[-1]}\n{launcher.tail(process.log, 40)}", flush=True)
    print("\n" + "\n".join(lines))
    return 0 if is_whole else 1


if __name__ == "__main__":
    raise SystemExit(main())
