"""Runs every test that a machine with one or two Hopper GPUs can run, tier by tier.

    python tests/gpu/run_tiers.py                  # all tiers; some ten minutes on two H200
    python tests/gpu/run_tiers.py --quick          # fewer tiers and calls; under two and a half
    python tests/gpu/run_tiers.py --tiers ep8 native
    python tests/gpu/run_tiers.py --tiers ep8 -k stress
    python tests/gpu/run_tiers.py --tiers one-process -k random_calls --seconds 60   # 100,000 calls
    python tests/gpu/run_tiers.py --tiers slots-one-process -k mixed --calls 1000000 --seconds 300
    python tests/gpu/run_tiers.py --pytest tests/test_export.py    # one more tier
    python tests/gpu/run_tiers.py --list

A tier is one or more processes with a time limit; nothing needs a network. At the end comes a
table of what ran, passed, failed and was skipped, with reasons. The exit code is not 0 if anything
failed. Every process has a log in the output directory; of those that failed the end is printed.

`--package DIR` says where the package jax_ep with its CUDA part lies, if it is not installed.
Without a GPU all tiers are skipped, unless `--platform cpu` runs those that a CPU can.
"""

import argparse
import contextlib
import importlib.util
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))

import gpus
import launcher
from context import (
    OUT_OF_TIME,
    STRESS_SECONDS,
    Builds,
    Context,
    Line,
    Result,
    SkippedError,
    package_folder,
)
from tiers import TIERS, Tier, pytest_tier, slot_breaks


def why_not(ctx: Context) -> str | None:
    """Why nothing can run on this machine, or None."""
    if ctx.platform == "cuda" and ctx.num_gpus == 0:
        return "no GPU here"
    package = package_folder(ctx.package)
    if package is None:
        return "jax_ep is not installed (or pass --package DIR)"
    if ctx.platform == "cuda":
        if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
            return "JAX has no CUDA plugin here"
        # Of an editable installation the modules are not beside the sources.
        folders = [package, *(pathlib.Path(path) / "jax_ep" for path in sys.path)]
        if not any(list(folder.glob("_cuda*.so")) for folder in folders):
            return f"the package in {package} has no CUDA part"
    return None


def print_table(lines: list[Line]) -> None:
    """Tiers, counts, seconds; reasons and notes below each line."""
    width = max(len(f"{line.tier}  {line.what}") for line in lines)
    header = f"{'tier':{width}}  {'run':>5} {'passed':>6} {'failed':>6} {'skipped':>7} {'s':>6}"
    print(f"\n{header}\n{'-' * len(header)}")
    for line in lines:
        num_skipped = sum(line.skipped.values())
        name = f"{line.tier}  {line.what}"
        run = line.passed + line.failed
        counts = f"{run:>5} {line.passed:>6} {line.failed:>6} {num_skipped:>7}"
        print(f"{name:{width}}  {counts} {line.seconds:>6.1f}")
        for reason, count in line.skipped.items():
            print(f"    skipped {count}: {reason}")
        for note in line.notes:
            print(f"    {note[:200]}")


@contextlib.contextmanager
def folder_for_run(given: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """An empty folder with a short path: sockets lie in it."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield pathlib.Path(tempfile.mkdtemp(prefix="run_", dir=given.resolve()))
    else:
        yield pathlib.Path(tempfile.mkdtemp(prefix="jax_ep_tiers_"))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiers", nargs="+", metavar="TIER", choices=[t.name for t in TIERS], help="only these")
    add("--quick", action="store_true", help="fewer tiers, 2,000 stress calls")
    add("--budget", type=float, default=1e9, help="seconds, for all; what does not fit is skipped")
    add("--pytest", nargs="+", default=[], metavar="PATH", help="further files, each a tier")
    add("-k", dest="keyword", help="only tests that match, as in pytest")
    add("--package", type=pathlib.Path, help="the folder that holds the package jax_ep")
    add("--broken-package", type=pathlib.Path, help="one that was built with JAX_EP_BREAK_ORDER")
    add(
        "--broken-slots",
        type=pathlib.Path,
        help="a folder of those built with JAX_EP_BREAK_SLOTS, each by the name of its SlotBreak",
    )
    add("--calls", type=int, help="random calls of a tier, by all its tests of them (100,000)")
    add("--seconds", type=float, default=STRESS_SECONDS, help="a stress test ends after (6)")
    add("--examples", type=float, help="part of hypothesis' examples (0.15; with --quick 0.05)")
    add("--out", type=pathlib.Path, help="where logs go (default: a new folder in /tmp)")
    add("--platform", choices=("cuda", "cpu"), default="cuda", help="cpu: to test the tests")
    add("--list", action="store_true", help="say what there is, and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs what was asked for; returns the exit code."""
    args = parse_args(argv)
    tiers = [t for t in TIERS if t.name in (args.tiers or [t.name])]
    if args.quick and not args.tiers:
        tiers = [t for t in tiers if t.quick]
    further = [Tier("pytest-" + pathlib.Path(p).stem, pytest_tier(p)) for p in args.pytest]
    tiers = further if further and not args.tiers else [*tiers, *further]
    if args.list:
        for tier in TIERS:
            print(f"{tier.name:22} {tier.run.__doc__}")
        return 0
    start = time.monotonic()
    with folder_for_run(args.out) as out:
        ctx = Context(
            platform=args.platform,
            num_gpus=gpus.count_gpus() if args.platform == "cuda" else 2,
            package=args.package.resolve() if args.package else None,
            out=out,
            quick=args.quick,
            keyword=args.keyword,
            broken_package=args.broken_package.resolve() if args.broken_package else None,
            broken_slots=args.broken_slots.resolve() if args.broken_slots else None,
            calls=args.calls or (2_000 if args.quick else 100_000),
            seconds=args.seconds,
            examples=args.examples or (0.05 if args.quick else 0.15),
            builds=Builds(out, max(2, (os.cpu_count() or 2) // 4)),
            deadline=start + args.budget,
        )
        reason = why_not(ctx)
        if reason is not None:
            print_table([Line(t.name, "", skipped={reason: 1}) for t in tiers])
            return 2 if "package" in reason else 0  # a machine that could, but for what is missing
        print(f"{ctx.num_gpus} devices; package in {package_folder(ctx.package)}; logs in {out}")
        signal.signal(
            signal.SIGTERM, lambda *_: sys.exit(143)
        )  # so that what follows is cleaned up
        try:
            if ctx.platform == "cuda":
                start_builds(ctx, tiers)
            lines, problems = run_all(ctx, tiers)
        finally:
            ctx.builds.pool.shutdown(wait=False, cancel_futures=True)
            launcher.stop_everything()
    for problem in problems:
        print(f"\n==== {problem}")
    print_table(lines)
    num_failed = sum(line.failed for line in lines)
    if problems and not num_failed:
        num_failed = len(problems)
    verdict = f"{num_failed} FAILED" if problems or num_failed else "all passed"
    print(f"\n{verdict}; {time.monotonic() - start:.0f} s; logs in {out}")
    return 1 if problems or num_failed else 0


def start_builds(ctx: Context, tiers: list[Tier]) -> None:
    wanted = {need for tier in tiers for need in tier.needs}
    if "native" in wanted:
        ctx.builds.start("native", "kernels_test", "-DJAX_EP_TESTS=ON")
    for need in {"network-simulated", "network-rails", "network-slots"} & wanted:
        ctx.builds.start(need, need.replace("-", "_"), "-DJAX_EP_TESTS=ON")
    if "network-nvshmem" in wanted:
        options = ("-DJAX_EP_TESTS=ON", "-DJAX_EP_NVSHMEM=ON")
        ctx.builds.start("network-nvshmem", "network_nvshmem", *options)
    if "network-wire" in wanted:
        options = ("-DJAX_EP_TESTS=ON", "-DJAX_EP_NVSHMEM=ON")
        ctx.builds.start("network-wire", "network_wire", *options)
    if "broken" in wanted and ctx.broken_package is None:
        ctx.builds.start("broken", "_cuda", "-DJAX_EP_BREAK_ORDER=ON")
    if "broken-slots" in wanted and ctx.broken_slots is None:
        for name, number in slot_breaks().items():
            ctx.builds.start(name, "_cuda", f"-DJAX_EP_BREAK_SLOTS={number}")


def run_all(ctx: Context, tiers: list[Tier]) -> tuple[list[Line], list[str]]:
    """Runs tiers in turn; says what each gave as soon as it is there."""
    lines: list[Line] = []
    problems: list[str] = []
    for tier in tiers:
        start = time.monotonic()
        if start > ctx.deadline:
            result = Result([Line(tier.name, "", skipped={OUT_OF_TIME: 1})])
        else:
            try:
                result = tier.run(ctx)
            except SkippedError as skipped:
                result = Result([Line(tier.name, "", skipped={str(skipped): 1})])
            except Exception as error:  # a tier that cannot even start has failed; go on
                result = Result([Line(tier.name, "", failed=1)], [f"{tier.name}: {error!r}"])
        if result.problems and not any(line.failed for line in result.lines):
            result.lines.append(Line(tier.name, "(see below)", failed=1))
        failed = sum(line.failed for line in result.lines)
        passed = sum(line.passed for line in result.lines)
        seconds = time.monotonic() - start
        print(f"{tier.name}: {passed} passed, {failed} failed in {seconds:.1f} s", flush=True)
        for text in result.problems:
            print("    " + text.strip().splitlines()[0][:200], flush=True)
        lines += result.lines
        problems += result.problems
    return lines, problems


if __name__ == "__main__":
    raise SystemExit(main())
