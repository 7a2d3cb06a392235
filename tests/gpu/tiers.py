"""The tiers that run_tiers.py runs, each on a machine with its options."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable

import launcher
import network_tiers
import ucx_tiers
from context import (
    HERE,
    ROOT,
    TESTS,
    Context,
    Job,
    Line,
    Result,
    Shape,
    SkippedError,
    package_folder,
    read_report,
    run_job,
    run_pytest,
    run_suite,
)

IN_STEP = HERE / "in_step.py"
SUITE = [
    f"test_{name}.py"
    for name in (
        *("layout", "dispatch", "combine"),  # what the smallest tiers run
        *("gradients", "expand", "float8_rows", "expert_capacity", "layout_and_dispatch", "moe"),
    )
]
STRESS = "protocol/test_stress.py"
COLLECTIVES = "protocol/test_collectives.py"
GROUPS = "protocol/test_groups.py"
DECODE_LOOP = "protocol/test_decode_loop.py"
PROTOCOL = "stress or collectives or groups or decode_loop"  # files
# Programs take the longest to compile, so not every shape of job runs the whole suite.
CORE = (
    "any_routing or any_number or default_capacity or vjp or moe_is or stale or long_rows or "
    "with_scales or expert_capacity or "
    f"{PROTOCOL}"
)
QUICK = "not mixed"  # random calls of many sizes, which take the longest to compile
RACECHECKED_KERNEL = "layout_kernel"
RACECHECK_NOTE = (
    f"{RACECHECKED_KERNEL} alone: the others hand over shared memory by bulk copies that complete "
    "on mbarriers and by st.release / ld.acquire, which racecheck does not know"
)


def one_process(ctx: Context) -> Result:
    """All GPUs in one process: behaviour, CPU against CUDA, stress, race, XLA's collectives."""
    files = [*SUITE, STRESS, GROUPS, DECODE_LOOP, COLLECTIVES]
    if ctx.platform != "cpu":
        files.insert(len(SUITE), "test_agreement.py")
    return run_suite(
        ctx,
        "one-process",
        Shape(1),
        files,
        limit=240,
        keyword=f"({CORE} or test_cpu_and) and {QUICK}" if ctx.quick else "",
        flags="--xla_gpu_enable_latency_hiding_scheduler=true",
    )


def one_process_errors(ctx: Context) -> Result:
    """All GPUs in one process: what the handlers refuse, bad ids, and a rank that never comes."""
    files = ["test_handlers.py", "test_id_check.py", "test_runtime_errors.py"]
    return run_suite(ctx, "one-process-errors", Shape(1), files, limit=180)


def process_per_gpu(ctx: Context) -> Result:
    """One process for each GPU: the core of the suite, stress, race, XLA's collectives."""
    if ctx.num_gpus < 2:
        raise SkippedError("needs two GPUs")
    return run_suite(
        ctx,
        "process-per-gpu",
        Shape(ctx.num_gpus),
        [*SUITE, STRESS, GROUPS, DECODE_LOOP, COLLECTIVES],
        limit=180,
        keyword=f"({PROTOCOL}) and {QUICK}" if ctx.quick else CORE,
        flags="--xla_gpu_enable_latency_hiding_scheduler=true",
    )


def several_on_a_gpu(num_ranks: int) -> Callable[[Context], Result]:
    """A tier of so many processes; they share GPUs, under MPS, where there are fewer."""

    def tier(ctx: Context) -> Result:
        if num_ranks == ctx.num_gpus:
            raise SkippedError(f"{ctx.num_gpus} GPUs: {num_ranks} ranks are process-per-gpu")
        ranks_per_gpu = -(-num_ranks // max(1, ctx.num_gpus))
        # At EP8 in groups of 1 to 8; for the others, what is most about the group.
        keyword = CORE if num_ranks == 8 else f"any_routing or every_rank or {PROTOCOL}"
        return run_suite(
            ctx,
            f"ep{num_ranks}",
            Shape(num_ranks, ranks_per_gpu),
            [*(SUITE if num_ranks == 8 else SUITE[:3]), STRESS, GROUPS, DECODE_LOOP],
            limit=210,
            keyword=f"({keyword}) and {QUICK}" if ctx.quick else keyword,
        )

    tier.__doc__ = f"EP{num_ranks}: as many processes, several on a GPU under MPS."
    return tier


def platform_allocator(ctx: Context) -> Result:
    """XLA without a pool, an allocation a buffer: addresses come back as other allocations."""
    ctx.skip_without_gpu()
    lines, problems = [], []
    several = Shape(max(2, ctx.num_gpus), 1 if ctx.num_gpus > 1 else 2)
    for tier, shape in (("platform-one", Shape(1)), ("platform-several", several)):
        result = run_suite(
            ctx,
            tier,
            shape,
            SUITE[:3],
            limit=120,
            keyword="any_routing or every_rank or stale",
            XLA_PYTHON_CLIENT_ALLOCATOR="platform",
            # What was not there at initialize() cannot be mapped by other processes.
            JAX_EP_TEST_STAGING_BYTES=str(1 << 27),
        )
        lines += result.lines
        problems += result.problems
    return Result(lines, problems)


def race_control(ctx: Context) -> Result:
    """The race test must fail on kernels that do not wait for their peers' rows.

    With K = 2 it must see rows that a receiver has stored on too early, as well.
    The other waits have no such control: without the one at the start rows would go to the
    addresses of earlier calls, and the end of a layout leaves its ids alone too long to be caught.
    """
    ctx.skip_without_gpu()
    package = ctx.broken_package
    if package is None:
        package = copy_package(
            ctx, ctx.builds.wait("broken", ctx.deadline), ctx.out / "package_broken"
        )
    job, failures = run_broken(ctx, "race-control", package, "test_race")
    # The error itself; the report shows the line of code before it.
    found_stale = [
        re.search(r"Error: (stale or early rows, by rank: .*)", text) for text in failures
    ]
    stale = [match.group(1) for match in found_stale if match]
    if len(stale) < 2:
        job.problems.append("the race test saw nothing where it should, with K = 1 or with K = 2")
    if not any("rows stored on" in text for text in stale):
        job.problems.append("the race test saw no rows that a receiver had stored on too early")
    line = Line("race-control", "race test without the wait for rows", notes=stale)
    problems = job.judge(line)
    return Result([line], [*problems, *failures] if problems else [])


def slot_breaks() -> dict[str, int]:
    """What slots may be built without, by name: the number for JAX_EP_BREAK_SLOTS."""
    source = (ROOT / "cuda" / "sync" / "slots.cuh").read_text()
    names = re.search(r"enum SlotBreak \{ *kNoBreak, *([^}]*?),? *\}", source)
    assert names is not None
    return {name.strip(): i for i, name in enumerate(names.group(1).split(","), 1)}


def slots_race_control(ctx: Context) -> Result:
    """Slots that lack one of what orders them: races of calls in slots must see it, each time."""
    ctx.skip_without_gpu()
    ctx = dataclasses.replace(ctx, has_slots=True)
    lines, problems = [], []
    for name in slot_breaks():
        if ctx.broken_slots is not None:
            package = ctx.broken_slots / name
        else:
            build = ctx.builds.wait(name, ctx.deadline)
            package = copy_package(ctx, build, ctx.out / f"package_{name}")
        keyword = "(test_race and in_one) or test_nobody_runs_ahead"
        job, failures = run_broken(ctx, f"slots-race-control-{name}", package, keyword)
        line = Line("slots-race-control", name)
        errors = [re.search(r"^E +([\w.]*Error: .*)", text, re.MULTILINE) for text in failures]
        line.notes = [error.group(1) for error in errors if error]
        # Rows are wrong; or, where slots are written over, a rank waits for what was there.
        lost = "|DEADLINE_EXCEEDED: jax_ep_(combine|layout_and_dispatch): .*waited for|was told by"
        seen = "stale or early rows|wrong rows" + ("" if name == "kBreakTag" else lost)
        if not any(re.search(seen, note) for note in line.notes):
            job.problems.append(f"{name}: no race was seen")
        if any("streaming multiprocessor" in text for text in failures):
            job.problems.append(f"{name}: blocks have found no place on the GPU")
        problems += job.judge(line)
        lines.append(line)
    return Result(lines, problems)


def run_broken(
    ctx: Context, name: str, package: pathlib.Path, keyword: str
) -> tuple[Job, list[str]]:
    """Runs tests of races on a package that is wrong on purpose, and expects that some fail."""
    shape = Shape(1) if ctx.num_gpus > 1 else Shape(2, 2)
    backend = "processes" if shape.num_processes > 1 else ctx.platform
    folder, job = run_job(
        ctx,
        name,
        shape,
        ("run_pytest", str(TESTS / STRESS), "-k", f"({keyword}) and {backend}", "--tb=short"),
        90,
        file=IN_STEP,
        package=package,
        expected=dict.fromkeys(range(shape.num_processes), 1),
        JAX_EP_TIMEOUT="5",
    )
    if job.cut is not None:
        raise SkippedError(job.cut)
    return job, read_report(folder / "report_0.json", name, None)[1]


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
    program = ctx.builds.wait("native", ctx.deadline) / "kernels_test"
    folder = ctx.folder("native")
    runs: list[tuple[str, list[str], int]] = [
        ("plain", [str(program), *(["--small"] if ctx.quick else [])], 180),
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
            only = ["--kernel-name", f"kernel_substring={RACECHECKED_KERNEL}"]
            command = [sanitizer, f"--tool={tool}", "--error-exitcode=9"]
            command += [*(only if tool == "racecheck" else []), str(program), "--small", *ranks]
            runs.append((f"compute-sanitizer {tool}", command, 90))
    for i, (what, command, limit) in enumerate(runs):
        process = launcher.Process(command, os.environ, folder / f"run_{i}.log", 3 if i == 1 else 0)
        line = Line("native", what)
        problems += ctx.run([process], limit).judge(line)
        text = process.log.read_text(errors="replace") if process.log.exists() else ""
        line.notes = re.findall(r"^(?:NOTE|OK): (.*)$", text, re.MULTILINE)
        if what.endswith("racecheck"):
            line.notes.append(RACECHECK_NOTE)
        lines.append(line)
    return Result(lines, problems)


def scenarios_tier(
    tier: str,
    ctx: Context,
    runs: list[tuple[str, Shape, tuple[str, ...], dict[int, int], str, str]],
) -> Result:
    """One job for each (name, shape, arguments, return codes, XLA's flags, JAX_EP_TIMEOUT)."""
    lines, problems = [], []
    for name, shape, scenario, expected, flags, timeout in runs:
        folder, job = run_job(
            ctx,
            f"{tier}-{name}",
            shape,
            scenario,
            75,
            flags=flags,
            expected=expected,
            shared=True,
            JAX_EP_TIMEOUT=timeout,
            JAX_EP_TEST_DUMP=str(ctx.out / f"dump-{tier}-{name}"),
        )
        line = Line(tier, name)
        problems += job.judge(line)
        log = folder / "process_0.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        line.notes = re.findall(r"^NOTE: (.*)$", text, re.MULTILINE)
        lines.append(line)
    return Result(lines, problems)


def failures(ctx: Context) -> Result:
    """A rank that is killed, and one that stalls: the others' errors name it, and soon."""
    num = max(2, ctx.num_gpus)
    shape = Shape(num, 1 if ctx.num_gpus > 1 else 2)
    return scenarios_tier(
        "failures",
        ctx,
        [
            ("killed", shape, ("killed",), {num - 1: -9}, "", "3"),
            ("stalled", shape, ("stalled",), {}, "", "3"),
        ],
    )


def command_buffers(ctx: Context) -> Result:
    """Calls recorded in command buffers (CUDA graphs) and replayed, or kept out of them."""
    ctx.skip_without_gpu()
    shape = Shape(1) if ctx.num_gpus > 1 else Shape(2, 2)
    runs = []
    calls = "FUSION,CUSTOM_CALL"
    for name, commands, mode, scenario in (
        ("recorded", calls, "", ("command_buffers", "inside")),
        # The library keeps its calls out of graphs that would run them at once.
        ("concurrent", calls, "CONCURRENT", ("command_buffers", "outside")),
        # The control: the dump shows calls that are not recorded.
        ("off", "", "", ("command_buffers", "outside")),
        # What is recorded are the steps, or the whole loop.
        ("loop-steps", calls, "", ("decode_loops",)),
        ("loop-whole", f"{calls},WHILE,CONDITIONAL", "", ("decode_loops",)),
    ):
        if ctx.quick and name == "concurrent":
            continue
        flags = f"--xla_gpu_enable_command_buffer={commands} --xla_gpu_graph_min_graph_size=1"
        flags += f" --xla_dump_to={ctx.out / f'dump-command-buffers-{name}'}"
        flags += " --xla_dump_hlo_as_text"
        if mode:
            flags += f" --xla_gpu_command_buffer_scheduling_mode={mode}"
        runs.append((name, shape, scenario, {}, flags, "10"))
    return scenarios_tier("command-buffers", ctx, runs)


def transformations(ctx: Context) -> Result:
    """Four ranks in two groups: vmap over a mesh axis and over none, a partly manual shard_map."""
    shape = Shape(4, -(-4 // max(1, ctx.num_gpus)))
    run = ("transformations", shape, ("transformations",), {}, "", "60")
    return scenarios_tier("transformations", ctx, [run])


def overlap(ctx: Context) -> Result:
    """Calls with overlap=True beside GEMMs: the bits of those without, in every form of program."""
    several = Shape(max(2, ctx.num_gpus), 1 if ctx.num_gpus > 1 else 2)
    return scenarios_tier(
        "overlap",
        ctx,
        [
            (name, shape, ("overlap_scenarios.beside",), {}, "--xla_gpu_autotune_level=0", "20")
            for name, shape in (("one-process", Shape(1)), ("several-processes", several))
        ],
    )


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
    folder, dp = ctx.folder("example"), 2 if ctx.num_gpus >= 4 else 1
    ep = min(4, ctx.num_gpus // dp)
    num_ranks = dp * ep
    flags = "--steps=8 --num-layers=1 --num-heads=2 --d-model=32 --d-expert=32 --seq-len=32"
    flags += f" --learning-rate=1e-2 --eval-every=4 --sample-bytes=4 --dtype=float32 --ep={ep}"
    flags += f" --dp={dp}"

    def process(name: str, *more: str, **environment: str) -> launcher.Process:
        command = [sys.executable, str(ROOT / "examples" / "train_moe_lm.py"), *flags.split()]
        command += [f"--out={folder / name.split('.')[0]}", *more]
        precise = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}  # not TF32
        return launcher.Process(
            command, ctx.environment(None, **precise, **environment), folder / f"{name}.log"
        )

    devices = f"--xla_force_host_platform_device_count={num_ranks}"
    groups = {
        "one process": [
            process("cpu", JAX_PLATFORMS="cpu", XLA_FLAGS=devices, NPROC="8"),
            process("one", XLA_PYTHON_CLIENT_MEM_FRACTION="0.4"),
        ]
    }
    if ctx.num_gpus > 1 and not ctx.quick:
        port, common = (
            launcher.free_port(),
            f"--distributed --num-processes={num_ranks} --coordinator=127.0.0.1",
        )
        groups["a process per GPU"] = [
            process(
                f"several.{i}",
                *f"{common}:{port} --process-id={i}".split(),
                JAX_LOCAL_DEVICE_IDS=str(i),
                XLA_PYTHON_CLIENT_MEM_FRACTION="0.4",
            )
            for i in range(num_ranks)
        ]
    lines, problems = [], []
    for (what, group), out in zip(groups.items(), ("one", "several"), strict=False):
        job, line = ctx.run(group, 100), Line("example", what)
        if not job.problems and job.cut is None:
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
                job.problems.append(f"losses of {what}: {losses[1]}\non CPU: {losses[0]}")
        problems += job.judge(line)
        lines.append(line)
    return Result(lines, problems)


def run_file(ctx: Context, name: str, path: pathlib.Path, limit: float) -> Result:
    """Runs a file or folder by pytest in one process, which may start others."""
    keyword = ["-k", ctx.keyword] if ctx.keyword else []
    arguments = [str(path), *keyword, "--tb=short"]
    return run_pytest(ctx, name, Shape(1), arguments, limit)


def multi_process(ctx: Context) -> Result:
    """Jobs of 1 to 4 processes: staging, memory that grew, stalled and killed ranks, tear-down."""
    ctx.skip_without_gpu()
    path = TESTS / "multi_process" / "test_multi_process_cuda.py"
    return run_file(ctx, "multi-process", path, limit=360)


def with_slots(run: Callable[[Context], Result]) -> Callable[[Context], Result]:
    """A tier again with small calls on GPUs in slots, where they are unless told otherwise."""

    def tier(ctx: Context) -> Result:
        ctx.skip_without_gpu()
        out = ctx.out / "slots"
        out.mkdir(exist_ok=True)
        result = run(dataclasses.replace(ctx, out=out, has_slots=True))
        for line in result.lines:
            line.tier = f"slots-{line.tier}"
        return result

    tier.__doc__ = f"With slots (JAX_EP_SLOTS=1). {run.__doc__}"
    return tier


def pytest_tier(path: str) -> Callable[[Context], Result]:
    """A further file or folder, run by pytest in one process, as its author meant it to run."""

    def tier(ctx: Context) -> Result:
        return run_file(ctx, "pytest-" + pathlib.Path(path).stem, pathlib.Path(path), limit=150)

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
    Tier("one-process-errors", one_process_errors),  # apart: a group that broke stays broken
    Tier("process-per-gpu", process_per_gpu),
    Tier("ep8", several_on_a_gpu(8)),
    Tier("ep4", several_on_a_gpu(4), quick=False),
    Tier("ep3", several_on_a_gpu(3), quick=False),
    Tier("ep2", several_on_a_gpu(2), quick=False),
    Tier("platform-allocator", platform_allocator, quick=False),
    Tier("multi-process", multi_process, quick=False),
    Tier("failures", failures),
    Tier("command-buffers", command_buffers, quick=False),
    Tier("transformations", transformations, quick=False),
    Tier("overlap", overlap),
    Tier("race-control", race_control, needs=("broken",)),
    Tier("native", native, needs=("native",)),
    Tier("example", example, quick=False),
    Tier("network-simulated", network_tiers.simulated, needs=("network-simulated",)),
    Tier("network-rails", network_tiers.rails, needs=("network-rails",)),
    Tier("network-slots", network_tiers.slots, needs=("network-slots",)),
    Tier("network-nvshmem", network_tiers.nvshmem, quick=False, needs=("network-nvshmem",)),
    Tier("network-ep2", network_tiers.across_nodes(2, 1), quick=False),
    Tier("network-ep4-by-1", network_tiers.across_nodes(4, 1), quick=False),
    Tier("network-ep4-by-2", network_tiers.across_nodes(4, 2), quick=False),
    Tier("network-ep8-by-1", network_tiers.across_nodes(8, 1), quick=False),
    Tier("network-ep8-by-2", network_tiers.across_nodes(8, 2), quick=False),
    Tier("network-slots-ep2", network_tiers.slots_across_nodes(2, 1), quick=False),
    Tier("network-slots-ep4", network_tiers.slots_across_nodes(4, 2), quick=False),
    Tier("network-wire", ucx_tiers.wire, quick=False, needs=("network-wire",)),
    Tier("network-tcp", ucx_tiers.tcp, quick=False, needs=("network-wire",)),
    Tier("network-stress", network_tiers.stress, quick=False),
    Tier("network-failures", network_tiers.failures, quick=False),
    Tier("network-tear-down", network_tiers.tear_down, quick=False),
    Tier("slots-one-process", with_slots(one_process)),
    Tier("slots-process-per-gpu", with_slots(process_per_gpu), quick=False),
    Tier("slots-ep8", with_slots(several_on_a_gpu(8)), quick=False),
    Tier("slots-multi-process", with_slots(multi_process), quick=False),
    Tier("slots-failures", with_slots(failures)),
    Tier("slots-overlap", with_slots(overlap), quick=False),
    Tier("slots-command-buffers", with_slots(command_buffers), quick=False),
    Tier("slots-race-control", slots_race_control, quick=False, needs=("broken-slots",)),
)
