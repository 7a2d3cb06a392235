"""What the tiers of run_tiers.py share: the machine, the options, jobs, builds."""

import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import time
from typing import Any

import gpus
import launcher

OUT_OF_TIME = "cut short by --budget"
STRESS_SECONDS = 6.0  # after which each stress test ends, unless told otherwise
NUM_STRESS_TESTS = 6  # those of random calls
HERE = pathlib.Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]


class SkippedError(Exception):
    """A tier cannot run here; the message is the reason."""


@dataclasses.dataclass
class Line:
    """One line of the table."""

    tier: str
    what: str
    passed: int = 0
    failed: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Result:
    """What a tier gave: lines of the table, and texts of what went wrong."""

    lines: list[Line]
    problems: list[str] = dataclasses.field(default_factory=list)


# Building what is not in the package -----------------------------------------------------------


class Builds:
    """Targets of CMake that only tests need, built in the background while other tiers run."""

    def __init__(self, out: pathlib.Path, jobs_at_once: int) -> None:
        self.out, self.jobs_at_once = out, jobs_at_once
        self.pool = concurrent.futures.ThreadPoolExecutor(4)
        self.futures: dict[str, concurrent.futures.Future[pathlib.Path]] = {}

    def start(self, name: str, target: str, *options: str) -> None:
        """Begins to configure and build a target in a build folder of its own."""
        if name not in self.futures:
            self.futures[name] = self.pool.submit(self._build, name, target, options)

    def wait(self, name: str, deadline: float) -> pathlib.Path:
        """The build folder, when it is done.

        Raises:
            SkippedError: the tools are not here, or the deadline comes first.
            RuntimeError: the build failed.
        """
        try:
            return self.futures[name].result(max(0.0, deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            raise SkippedError(OUT_OF_TIME) from None

    def _build(self, name: str, target: str, options: tuple[str, ...]) -> pathlib.Path:
        missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
        missing += [m for m in ("nanobind", "jaxlib") if importlib.util.find_spec(m) is None]
        if missing:
            raise SkippedError(f"needs a build; not found here: {', '.join(missing)}")
        folder, log = self.out / f"build_{name}", self.out / f"build_{name}.log"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator]
        configure += ["-DJAX_EP_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}", *options]
        build = ["cmake", "--build", str(folder), "--target", target]
        build += ["--parallel", str(self.jobs_at_once)]
        for i, command in enumerate((configure, build)):
            step_log = log.with_suffix(f".{i}.log")
            process = launcher.Process(command, os.environ, step_log)
            if problems := launcher.run([process], limit=300).problems([process]):
                raise RuntimeError(f"building {target}: " + "\n".join(problems))
        return folder


# The machine and the options -------------------------------------------------------------------


@dataclasses.dataclass
class Context:
    """What tiers need to know."""

    platform: str
    num_gpus: int
    package: pathlib.Path | None
    out: pathlib.Path
    quick: bool
    keyword: str | None
    broken_package: pathlib.Path | None
    broken_slots: pathlib.Path | None
    calls: int
    seconds: float
    examples: float
    builds: Builds
    deadline: float
    has_slots: bool = False  # JAX_EP_SLOTS of all jobs

    def run(self, processes: list[launcher.Process], limit: float) -> "Job":
        """Runs processes together, for at most `limit` seconds and what is left of the budget."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            return Job([], OUT_OF_TIME, 0.0)
        ended = launcher.run(processes, min(limit, left))
        if left < limit and ended.late and not ended.failed:
            return Job([], OUT_OF_TIME, ended.seconds)
        return Job(ended.problems(processes), None, ended.seconds)

    def folder(self, name: str) -> pathlib.Path:
        folder = self.out / name
        folder.mkdir()
        return folder

    def environment(self, package: pathlib.Path | None = None, **more: str) -> dict[str, str]:
        """Of a process that imports jax_ep."""
        package = package or self.package
        paths = [str(package)] if package else []
        if inherited := os.environ.get("PYTHONPATH"):
            paths.append(inherited)
        kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
        environment = {
            "JAX_EP_TIMEOUT": "20",
            "NCCL_NVLS_ENABLE": "0",
            "NVSHMEM_DISABLE_NVLS": "1",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "JAX_EP_SLOTS": str(int(self.has_slots)),
        }
        if self.platform == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "NPROC": "4"}
        return kept | environment | more

    def skip_without_gpu(self) -> None:
        if self.platform == "cpu":
            raise SkippedError("needs a GPU")


@dataclasses.dataclass(frozen=True)
class Job:
    """How a job of processes ended.

    Attributes:
        problems: what was not as expected, in words.
        cut: the reason, if the budget ended it before it could succeed or fail.
        seconds: that it took.
    """

    problems: list[str]
    cut: str | None
    seconds: float

    def judge(self, line: Line) -> list[str]:
        """Counts the job as the one run of this line; returns the problems."""
        line.seconds = self.seconds
        if self.cut is not None:
            line.skipped = {self.cut: 1}
        else:
            line.passed, line.failed = (0, 1) if self.problems else (1, 0)
        return self.problems


@dataclasses.dataclass(frozen=True)
class Shape:
    """How ranks are spread: processes, and how many of them share a GPU."""

    num_processes: int
    ranks_per_gpu: int = 1

    def memory_fraction(self) -> str:
        return f"{0.8 / self.ranks_per_gpu:.2f}" if self.num_processes > 1 else "0.6"


def run_job(
    ctx: Context,
    name: str,
    shape: Shape,
    scenario: tuple[str, ...],
    limit: float,
    *,
    file: pathlib.Path = HERE / "scenarios.py",
    flags: str = "",
    package: pathlib.Path | None = None,
    expected: dict[int, int] | None = None,
    environments: dict[int, dict[str, str]] | None = None,
    shared: bool = False,
    **more: str,
) -> tuple[pathlib.Path, Job]:
    """Runs a scenario in every process of the shape.

    Args:
        ctx: the machine and the options.
        name: of the job; its folder has the logs.
        shape: of the job.
        scenario: a function of the file, and its arguments.
        limit: seconds.
        file: with the function.
        flags: for XLA, on GPUs.
        package: another folder of jax_ep.
        expected: return codes that are not 0.
        environments: further variables of single processes.
        shared: ranks may share a GPU without MPS, in time slices.
        **more: of the environment.

    Returns:
        The job's folder, and how it ended.
    """
    folder = ctx.folder(name)
    with contextlib.ExitStack() as stack:
        service: dict[str, str] = {}
        if shape.ranks_per_gpu > 1 and ctx.platform != "cpu" and not shared:
            try:
                service = stack.enter_context(
                    gpus.multi_process_service(folder, shape.ranks_per_gpu)
                )
            except RuntimeError as error:
                raise SkippedError(f"ranks that share a GPU need MPS: {error}") from error
        if ctx.platform == "cpu":
            flags = "--xla_force_host_platform_device_count="
            flags += "8" if shape.num_processes == 1 else "1"
        elif shape.num_processes == 1:
            flags += " --xla_force_host_platform_device_count=8"  # the CPU backend beside CUDA
        environment = ctx.environment(
            package,
            XLA_FLAGS=flags.strip(),
            XLA_PYTHON_CLIENT_MEM_FRACTION=shape.memory_fraction(),
            JAX_EP_TEST_RANKS_PER_GPU=str(shape.ranks_per_gpu),
            **service,
            **more,
        )
        processes = launcher.worker_processes(
            file,
            *scenario,
            num_processes=shape.num_processes,
            out=folder,
            limit=min(limit, ctx.deadline - time.monotonic()),
            environment=environment,
            environments=environments,
            platform=ctx.platform,
            num_gpus=ctx.num_gpus,
            expected=expected,
        )
        return folder, ctx.run(processes, limit)


def run_pytest(
    ctx: Context, tier: str, shape: Shape, arguments: list[str], limit: float, **more: Any
) -> Result:
    """Runs pytest in every process of the shape, in step, and reads what process 0 left.

    The rest is as for `run_job`.
    """
    scenario = ("run_pytest", *arguments)
    folder, job = run_job(ctx, tier, shape, scenario, limit, file=HERE / "in_step.py", **more)
    lines, failures = read_report(folder / "report_0.json", tier, job.cut)
    if job.cut is not None and not any(job.cut in line.skipped for line in lines):
        lines.append(Line(tier, "(the rest)", skipped={job.cut: 1}))
    return Result(lines, failures + job.problems)


def run_suite(
    ctx: Context,
    tier: str,
    shape: Shape,
    files: list[str],
    limit: float,
    *,
    keyword: str = "",
    flags: str = "",
    **more: Any,
) -> Result:
    """Runs test files of tests/, on all ranks, and reads the counts that process 0 left."""
    backend = "processes" if shape.num_processes > 1 else ctx.platform
    words = [backend, *([keyword] if keyword else []), *([ctx.keyword] if ctx.keyword else [])]
    arguments = [str(TESTS / file) for file in files]
    arguments += ["-k", " and ".join(f"({word})" for word in words), "--maxfail=5", "--tb=short"]
    environment = {
        "JAX_EP_TEST_EXAMPLES": str(ctx.examples),
        "JAX_EP_TEST_CALLS": str(ctx.calls),
        "JAX_EP_TEST_SECONDS": str(ctx.seconds),
    }
    result = run_pytest(
        ctx,
        tier,
        shape,
        arguments,
        limit + NUM_STRESS_TESTS * max(0.0, ctx.seconds - STRESS_SECONDS),
        flags=f"--xla_gpu_autotune_level=0 --xla_gpu_shard_autotuning=false {flags}",
        **environment,
        **more,
    )
    if not result.lines and not result.problems:
        result.problems.append(f"{tier}: no tests ran")
    return result


def read_report(path: pathlib.Path, tier: str, cut: str | None) -> tuple[list[Line], list[str]]:
    """What the pytest plugin of in_step.py left, if it came to that.

    A test in which the process died or was stopped has failed, unless the budget cut the job short.
    """
    if not path.exists():
        return [], []
    found, lines = json.loads(path.read_text()), []
    if running := found["running"]:
        file = pathlib.Path(running.split("::")[0]).name
        nothing = {"passed": 0, "failed": 0, "seconds": 0.0, "skipped": {}, "notes": []}
        counts = found["files"].setdefault(file, nothing)
        if cut is not None:
            counts["skipped"][cut] = 1
        else:
            counts["failed"] += 1
            found["failures"].append(f"{running} was running when the process ended")
    for file, c in found["files"].items():
        skipped: dict[str, int] = {}
        for reason, count in c["skipped"].items():
            general = re.sub(r"\d+ ranks, but", "more ranks than", reason)
            skipped[general] = skipped.get(general, 0) + count
        lines.append(Line(tier, file, c["passed"], c["failed"], skipped, c["seconds"], c["notes"]))
    if lines:
        compiled = found["compilations"]
        lines[-1].notes.append(f"all files: {len(compiled)} compilations in {sum(compiled):.0f} s")
    return lines, found["failures"]


def package_folder(package: pathlib.Path | None) -> pathlib.Path | None:
    """The folder of the package jax_ep itself, found without importing it."""
    if package is not None:
        return package / "jax_ep" if (package / "jax_ep").is_dir() else None
    spec = importlib.util.find_spec("jax_ep")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None
