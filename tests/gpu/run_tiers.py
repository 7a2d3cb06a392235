"""Runs every test that a machine with one or two Hopper GPUs can run, tier by tier.

    python tests/gpu/run_tiers.py                  # all tiers; under six minutes on two H200
    python tests/gpu/run_tiers.py --quick          # fewer tiers and calls; under two and a half
    python tests/gpu/run_tiers.py --tiers ep8 native
    python tests/gpu/run_tiers.py --tiers ep8 -k stress
    python tests/gpu/run_tiers.py --pytest tests/multi_process/test_x.py    # one more tier
    python tests/gpu/run_tiers.py --list

A tier is one or more processes with a time limit; nothing needs a network. At the end comes a
table of what ran, passed, failed and was skipped, with reasons. The exit code is not 0 if anything
failed. Every process has a log in the output directory; of those that failed the end is printed.

`--package DIR` says where the package jax_ep with its CUDA part lies, if it is not installed.
Without a GPU all tiers are skipped, unless `--platform cpu` runs those that a CPU can.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jobs

HERE = pathlib.Path(__file__).resolve().parent
TESTS, ROOT = HERE.parent, HERE.parents[1]
SUITE = [f"test_{name}.py" for name in ("layout", "dispatch", "combine", "gradients", "moe")]
STRESS = "protocol/test_stress.py"
COLLECTIVES = "protocol/test_collectives.py"
ON_DEVICE = "stress or collectives"  # files
# Programs take the longest to compile, so not every shape of job runs the whole suite.
CORE = (
    "any_routing or any_number or default_capacity or vjp or moe_is or stale or long_rows or "
    f"{ON_DEVICE}"
)
RACE_PHASES = {"start": 0, "end": 1, "progress": 3}  # as cuda/sync/group_sync.cuh numbers them


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

    def wait(self, name: str) -> pathlib.Path:
        """The build folder, when it is done.

        Raises:
            SkippedError: the tools are not here.
            RuntimeError: the build failed.
        """
        return self.futures[name].result()

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
            process = jobs.Process(command, os.environ, step_log)
            if problems := jobs.run([process], limit=300).problems([process]):
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
    calls: int
    examples: float
    builds: Builds
    deadline: float

    def limit(self, seconds: float) -> float:
        """A job's time limit, or what is left of the budget."""
        return max(5.0, min(seconds, self.deadline - time.monotonic()))

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
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        if self.platform == "cpu":
            environment |= {"JAX_PLATFORMS": "cpu", "NPROC": "4"}
        return kept | environment | more

    def skip_without_gpu(self) -> None:
        if self.platform == "cpu":
            raise SkippedError("needs a GPU")


@dataclasses.dataclass(frozen=True)
class Shape:
    """How ranks are spread: processes, and how many of them share a GPU."""

    num_processes: int
    ranks_per_gpu: int = 1

    def memory_fraction(self) -> str:
        return f"{0.8 / self.ranks_per_gpu:.2f}" if self.num_processes > 1 else "0.6"


def run_worker(
    ctx: Context,
    name: str,
    shape: Shape,
    arguments: list[str],
    limit: float,
    *,
    flags: str = "",
    package: pathlib.Path | None = None,
    expected: dict[int, int] | None = None,
    shared: bool = False,
    **more: str,
) -> tuple[pathlib.Path, list[str]]:
    """Runs worker.py in every process of the shape.

    Args:
        ctx: the machine and the options.
        name: of the job; its folder has the logs.
        shape: of the job.
        arguments: of worker.py.
        limit: seconds.
        flags: for XLA, on GPUs.
        package: another folder of jax_ep.
        expected: return codes that are not 0.
        shared: ranks may share a GPU without MPS, in time slices.
        **more: of the environment.

    Returns:
        The job's folder, and what was not as expected.
    """
    folder, limit = ctx.folder(name), ctx.limit(limit)
    with contextlib.ExitStack() as stack:
        service: dict[str, str] = {}
        if shape.ranks_per_gpu > 1 and ctx.platform != "cpu" and not shared:
            try:
                service = stack.enter_context(
                    jobs.multi_process_service(folder, shape.ranks_per_gpu)
                )
            except RuntimeError as error:
                raise SkippedError(f"ranks that share a GPU need MPS: {error}") from error
        port, processes = jobs.free_port(), []
        if ctx.platform == "cpu":
            flags = "--xla_force_host_platform_device_count="
            flags += "8" if shape.num_processes == 1 else "1"
        elif shape.num_processes == 1:
            flags += " --xla_force_host_platform_device_count=8"  # the CPU backend beside CUDA
        for process in range(shape.num_processes):
            environment = ctx.environment(
                package,
                XLA_FLAGS=flags.strip(),
                XLA_PYTHON_CLIENT_MEM_FRACTION=shape.memory_fraction(),
                JAX_EP_TEST_PROCESS=str(process),
                JAX_EP_TEST_NUM_PROCESSES=str(shape.num_processes),
                JAX_EP_TEST_PORT=str(port),
                JAX_EP_TEST_OUT=str(folder),
                JAX_EP_TEST_PLATFORM=ctx.platform,
                JAX_EP_TEST_DEVICE=str(process % max(1, ctx.num_gpus)),
                JAX_EP_TEST_RANKS_PER_GPU=str(shape.ranks_per_gpu),
                JAX_EP_TEST_LIMIT=str(limit),
                **service,
                **more,
            )
            command = [sys.executable, "-X", "faulthandler", str(HERE / "worker.py"), *arguments]
            log = folder / f"process_{process}.log"
            processes.append(
                jobs.Process(command, environment, log, (expected or {}).get(process, 0))
            )
        ended = jobs.run(processes, limit)
    return folder, ended.problems(processes)


def run_suite(
    ctx: Context,
    tier: str,
    shape: Shape,
    files: list[str],
    limit: float,
    *,
    calls: int,
    seconds: float,
    keyword: str = "",
    flags: str = "",
    shared: bool = False,
) -> Result:
    """Runs test files of tests/, on all ranks, and reads the counts that process 0 left."""
    backend = "processes" if shape.num_processes > 1 else ctx.platform
    words = [backend, *([keyword] if keyword else []), *([ctx.keyword] if ctx.keyword else [])]
    arguments = ["pytest", *(str(TESTS / file) for file in files)]
    arguments += ["-k", " and ".join(f"({word})" for word in words), "--maxfail=5", "--tb=short"]
    environment = {
        "JAX_EP_TEST_EXAMPLES": str(ctx.examples),
        "JAX_EP_TEST_CALLS": str(calls),
        "JAX_EP_TEST_SECONDS": str(seconds),
    }
    folder, problems = run_worker(
        ctx,
        tier,
        shape,
        arguments,
        limit,
        flags=f"--xla_gpu_autotune_level=0 --xla_gpu_shard_autotuning=false {flags}",
        shared=shared,
        **environment,
    )
    lines, failures = read_report(folder / "report_0.json", tier)
    if not lines and not problems:
        problems = [f"{tier}: no tests ran"]
    return Result(lines, failures + problems)


def read_report(path: pathlib.Path, tier: str) -> tuple[list[Line], list[str]]:
    """What worker.py's pytest plugin left, if it came to that."""
    if not path.exists():
        return [], []
    found, lines = json.loads(path.read_text()), []
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


# Tiers -----------------------------------------------------------------------------------------


def one_process(ctx: Context) -> Result:
    """All GPUs in one process: behaviour, CPU against CUDA, stress, race, XLA's collectives."""
    files = [*SUITE, STRESS, COLLECTIVES]
    if ctx.platform != "cpu":
        files.insert(len(SUITE), "test_agreement.py")
    return run_suite(
        ctx,
        "one-process",
        Shape(1),
        files,
        limit=180,
        calls=ctx.calls,
        seconds=6,
        keyword=f"{CORE} or test_cpu_and" if ctx.quick else "",
        flags="--xla_gpu_enable_latency_hiding_scheduler=true",
    )


def process_per_gpu(ctx: Context) -> Result:
    """One process for each GPU: the core of the suite, stress, race, XLA's collectives."""
    if ctx.num_gpus < 2:
        raise SkippedError("needs two GPUs")
    return run_suite(
        ctx,
        "process-per-gpu",
        Shape(ctx.num_gpus),
        [*SUITE, STRESS, COLLECTIVES],
        limit=120,
        calls=ctx.calls,
        seconds=6,
        keyword=ON_DEVICE if ctx.quick else CORE,
        flags="--xla_gpu_enable_latency_hiding_scheduler=true",
    )


def several_on_a_gpu(num_ranks: int) -> Callable[[Context], Result]:
    """A tier of so many processes that they share GPUs, under MPS."""

    def tier(ctx: Context) -> Result:
        ranks_per_gpu = -(-num_ranks // max(1, ctx.num_gpus))
        if ranks_per_gpu == 1:
            raise SkippedError(f"{ctx.num_gpus} GPUs: {num_ranks} ranks are process-per-gpu")
        # At EP8 in groups of 1 to 8; for the others, what is most about the group.
        keyword = CORE if num_ranks == 8 else f"any_routing or every_rank or {ON_DEVICE}"
        return run_suite(
            ctx,
            f"ep{num_ranks}",
            Shape(num_ranks, ranks_per_gpu),
            [*SUITE, STRESS] if num_ranks == 8 else [*SUITE[:3], STRESS],
            limit=150,
            calls=ctx.calls,
            seconds=6 if num_ranks == 8 else 3,
            keyword=keyword,
        )

    tier.__doc__ = f"EP{num_ranks}: as many processes, several on a GPU under MPS."
    return tier


def race_control(ctx: Context) -> Result:
    """The race test must fail on kernels that were built with an ordering edge left out."""
    ctx.skip_without_gpu()
    phases = ["end"] if ctx.quick else list(RACE_PHASES)
    shape = Shape(1) if ctx.num_gpus > 1 else Shape(2, 2)
    lines, problems = [], []
    packages = {}
    if ctx.broken_package is not None:
        packages["given"] = ctx.broken_package
    else:
        for phase in phases:
            build = ctx.builds.wait(f"broken_{phase}")
            packages[phase] = copy_package(ctx, build, ctx.out / f"package_{phase}")
    for phase, package in packages.items():
        start = time.monotonic()
        backend = "processes" if shape.num_processes > 1 else ctx.platform
        arguments = ["pytest", str(TESTS / STRESS), "-k", f"test_race and {backend}", "--tb=short"]
        expected = dict.fromkeys(range(shape.num_processes), 1)
        folder, found = run_worker(
            ctx,
            f"race-control-{phase}",
            shape,
            arguments,
            60,
            package=package,
            expected=expected,
            JAX_EP_TIMEOUT="5",
        )
        _, failures = read_report(folder / "report_0.json", "race-control")
        seen = [f for f in failures if re.search("stale or early rows|jax_ep_[a-z]+: rank", f)]
        line = Line("race-control", f"race test without the wait at the {phase}")
        line.seconds = time.monotonic() - start
        if seen and not found:
            line.passed = 1
            line.notes = [next(t for t in seen[0].splitlines() if re.search("stale|jax_ep_", t))]
        else:
            line.failed = 1
            problems += found or [f"{phase}: the race test did not see what was left out"]
            problems += failures
        lines.append(line)
    return Result(lines, problems)


def copy_package(ctx: Context, build: pathlib.Path, to: pathlib.Path) -> pathlib.Path:
    """The package in use, with the CUDA module of a build folder."""
    package = package_folder(ctx.package)
    assert package is not None
    if not list(package.glob("_cuda*.so")):
        raise SkippedError("an editable installation cannot be replaced by an import path")
    shutil.copytree(package, to / "jax_ep", ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    for module in build.glob("_cuda*.so"):
        shutil.copy(module, to / "jax_ep")
    return to


def native(ctx: Context) -> Result:
    """The kernels without JAX, ranks as streams of one process; also under compute-sanitizer."""
    ctx.skip_without_gpu()
    program = ctx.builds.wait("native") / "kernels_test"
    folder = ctx.folder("native")
    runs: list[tuple[str, list[str], int]] = [
        ("plain", [str(program)], 60),
        ("plain, wrong on purpose", [str(program), "--small", "--control"], 60),
    ]
    lines, problems = [], []
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        reason = {"compute-sanitizer is not installed": 1}
        lines.append(Line("native", "compute-sanitizer", skipped=reason))
    else:
        tools = ["memcheck"] if ctx.quick else ["memcheck", "racecheck", "synccheck"]
        for tool in tools:
            # Blocks of racecheck and synccheck run many times slower.
            ranks = [] if tool == "memcheck" else ["--ranks=1,2"]
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9", str(program), "--small"]
            runs.append((f"compute-sanitizer {tool}", [*command, *ranks], 90))
    for i, (what, command, limit) in enumerate(runs):
        process = jobs.Process(command, os.environ, folder / f"run_{i}.log", 3 if i == 1 else 0)
        ended = jobs.run([process], ctx.limit(limit))
        found = ended.problems([process])
        line = Line("native", what, seconds=ended.seconds)
        line.passed, line.failed = (0, 1) if found else (1, 0)
        text = process.log.read_text(errors="replace")
        line.notes = re.findall(r"^(?:NOTE|OK): (.*)$", text, re.MULTILINE)
        lines.append(line)
        problems += found
    return Result(lines, problems)


def scenarios_tier(
    tier: str, ctx: Context, runs: list[tuple[str, Shape, list[str], dict[int, int], str, str]]
) -> Result:
    """One job for each (name, shape, arguments, return codes, XLA's flags, JAX_EP_TIMEOUT)."""
    lines, problems = [], []
    for name, shape, arguments, expected, flags, timeout in runs:
        start = time.monotonic()
        _, found = run_worker(
            ctx,
            f"{tier}-{name}",
            shape,
            arguments,
            75,
            flags=flags,
            expected=expected,
            shared=True,
            JAX_EP_TIMEOUT=timeout,
            JAX_EP_TEST_DUMP=str(ctx.out / f"dump-{tier}-{name}"),
        )
        line = Line(tier, name, seconds=time.monotonic() - start)
        line.passed, line.failed = (0, 1) if found else (1, 0)
        log = ctx.out / f"{tier}-{name}" / "process_0.log"
        line.notes = re.findall(r"^NOTE: (.*)$", log.read_text(errors="replace"), re.MULTILINE)
        lines.append(line)
        problems += found
    return Result(lines, problems)


def failures(ctx: Context) -> Result:
    """A rank that is killed, and one that stalls: the other one's error names it, and soon."""
    shape = Shape(2, 1 if ctx.num_gpus > 1 else 2)
    return scenarios_tier(
        "failures",
        ctx,
        [
            ("killed", shape, ["killed"], {1: -9}, "", "3"),
            ("stalled", shape, ["stalled"], {}, "", "3"),
        ],
    )


def command_buffers(ctx: Context) -> Result:
    """Calls recorded in command buffers (CUDA graphs) and replayed, or kept out of them."""
    ctx.skip_without_gpu()
    shape = Shape(1) if ctx.num_gpus > 1 else Shape(2, 2)
    runs = []
    for name, commands, mode, expectation in (
        ("recorded", "FUSION,CUSTOM_CALL", "", "inside"),
        # The library keeps its calls out of graphs that would run them at once.
        ("concurrent", "FUSION,CUSTOM_CALL", "CONCURRENT", "outside"),
        ("off", "", "", "outside"),  # the control: the dump shows calls that are not recorded
    ):
        if ctx.quick and name == "concurrent":
            continue
        flags = f"--xla_gpu_enable_command_buffer={commands} --xla_gpu_graph_min_graph_size=1"
        flags += f" --xla_dump_to={ctx.out / f'dump-command-buffers-{name}'}"
        flags += " --xla_dump_hlo_as_text"
        if mode:
            flags += f" --xla_gpu_command_buffer_scheduling_mode={mode}"
        runs.append((name, shape, ["command_buffers", expectation], {}, flags, "10"))
    return scenarios_tier("command-buffers", ctx, runs)


def example(ctx: Context) -> Result:
    """examples/train_moe_lm.py, unchanged: the losses are the CPU's, in one process and several."""
    ctx.skip_without_gpu()
    missing = [
        name
        for name in ("optax", "orbax", "matplotlib", "tqdm")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise SkippedError(f"the example needs {', '.join(missing)}")
    folder, ep = ctx.folder("example"), min(2, ctx.num_gpus)
    flags = "--steps=8 --num-layers=1 --num-heads=2 --d-model=32 --d-expert=32 --seq-len=32"
    flags += f" --learning-rate=1e-2 --eval-every=4 --sample-bytes=4 --dtype=float32 --ep={ep}"
    flags += " --dp=1"

    def process(name: str, *more: str, **environment: str) -> jobs.Process:
        command = [sys.executable, str(ROOT / "examples" / "train_moe_lm.py"), *flags.split()]
        command += [f"--out={folder / name.split('.')[0]}", *more]
        precise = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # not TF32
        return jobs.Process(
            command, ctx.environment(None, **precise, **environment), folder / f"{name}.log"
        )

    devices = f"--xla_force_host_platform_device_count={ep}"
    groups = {
        "one process": [
            process("cpu", JAX_PLATFORMS="cpu", XLA_FLAGS=devices, NPROC="8"),
            process("one", XLA_PYTHON_CLIENT_MEM_FRACTION="0.4"),
        ]
    }
    if ctx.num_gpus > 1 and not ctx.quick:
        port, common = (
            jobs.free_port(),
            f"--distributed --num-processes={ep} --coordinator=127.0.0.1",
        )
        groups["a process per GPU"] = [
            process(
                f"several.{i}",
                *f"{common}:{port} --process-id={i}".split(),
                JAX_LOCAL_DEVICE_IDS=str(i),
                XLA_PYTHON_CLIENT_MEM_FRACTION="0.4",
            )
            for i in range(ep)
        ]
    lines, problems = [], []
    for (what, group), out in zip(groups.items(), ("one", "several"), strict=False):
        ended = jobs.run(group, ctx.limit(100))
        found = ended.problems(group)
        line = Line("example", what, seconds=ended.seconds)
        if not found:
            losses = [
                json.loads((folder / name / "summary.json").read_text())["losses"]
                for name in ("cpu", out)
            ]
            # The first loss has seen no update: float32 sums in another order. After that Adam
            # makes a full step of gradients that are all rounding, and near ties of the router may
            # fall the other way, as in tests/test_examples.py (which sees 1e-4 on one platform).
            differences = [abs(a / b - 1) for a, b in zip(*losses, strict=True)]
            line.notes = [f"losses differ from the CPU's by up to {max(differences):.1e}"]
            if differences[0] > 1e-5 or max(differences) > 2e-3 or len(differences) != 8:
                found = [f"losses of {what}: {losses[1]}\non CPU: {losses[0]}"]
        line.passed, line.failed = (0, 1) if found else (1, 0)
        lines.append(line)
        problems += found
    return Result(lines, problems)


def pytest_tier(path: str) -> Callable[[Context], Result]:
    """A further file or folder, run by pytest in one process, as its author meant it to run."""

    def tier(ctx: Context) -> Result:
        name = "pytest-" + pathlib.Path(path).stem
        keyword = ["-k", ctx.keyword] if ctx.keyword else []
        arguments = ["pytest", path, *keyword, "--tb=short"]
        folder, problems = run_worker(ctx, name, Shape(1), arguments, 150)
        lines, failed = read_report(folder / "report_0.json", name)
        return Result(lines, failed + problems)

    return tier


@dataclasses.dataclass(frozen=True)
class Tier:
    """One tier.

    Attributes:
        name: for --tiers.
        run: does it.
        quick: whether --quick has it.
        needs: names of builds.
    """

    name: str
    run: Callable[[Context], Result]
    quick: bool = True
    needs: tuple[str, ...] = ()


TIERS = (
    Tier("one-process", one_process),
    Tier("process-per-gpu", process_per_gpu),
    Tier("ep8", several_on_a_gpu(8)),
    Tier("ep4", several_on_a_gpu(4), quick=False),
    Tier("ep2", several_on_a_gpu(2), quick=False),
    Tier("failures", failures),
    Tier("command-buffers", command_buffers, quick=False),
    Tier("race-control", race_control, needs=tuple(f"broken_{p}" for p in RACE_PHASES)),
    Tier("native", native, needs=("native",)),
    Tier("example", example, quick=False),
)


# The run ---------------------------------------------------------------------------------------


def package_folder(package: pathlib.Path | None) -> pathlib.Path | None:
    """The folder of the package jax_ep itself, found without importing it."""
    if package is not None:
        return package / "jax_ep" if (package / "jax_ep").is_dir() else None
    spec = importlib.util.find_spec("jax_ep")
    return pathlib.Path(spec.origin).parent if spec and spec.origin else None


def count_gpus() -> int:
    """GPUs that processes will see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))


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
    add("--budget", type=float, default=1e9, help="seconds; tiers that do not fit are skipped")
    add("--pytest", nargs="+", default=[], metavar="PATH", help="further files, each a tier")
    add("-k", dest="keyword", help="only tests that match, as in pytest")
    add("--package", type=pathlib.Path, help="the folder that holds the package jax_ep")
    add("--broken-package", type=pathlib.Path, help="one that was built with JAX_EP_BREAK_ORDER")
    add("--calls", type=int, help="stress calls of a tier (100,000; with --quick 2,000)")
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
            print(f"{tier.name:16} {tier.run.__doc__}")
        return 0
    start = time.monotonic()
    with folder_for_run(args.out) as out:
        ctx = Context(
            platform=args.platform,
            num_gpus=count_gpus() if args.platform == "cuda" else 2,
            package=args.package.resolve() if args.package else None,
            out=out,
            quick=args.quick,
            keyword=args.keyword,
            broken_package=args.broken_package.resolve() if args.broken_package else None,
            calls=args.calls or (2_000 if args.quick else 100_000),
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
            jobs.stop_everything()
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
    if ctx.broken_package is None:
        for phase, number in RACE_PHASES.items():
            if f"broken_{phase}" in wanted and not (ctx.quick and phase != "end"):
                option = f"-DJAX_EP_BREAK_ORDER={number}"
                ctx.builds.start(f"broken_{phase}", "_cuda", option)


def run_all(ctx: Context, tiers: list[Tier]) -> tuple[list[Line], list[str]]:
    """Runs tiers in turn; says what each gave as soon as it is there."""
    lines: list[Line] = []
    problems: list[str] = []
    for tier in tiers:
        start = time.monotonic()
        if start > ctx.deadline:
            result = Result([Line(tier.name, "", skipped={"no time left": 1})])
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
