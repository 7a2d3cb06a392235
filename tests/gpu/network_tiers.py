"""The tiers of the network between nodes."""

import contextlib
import os
import re
from collections.abc import Callable

import gpus
import launcher
from context import HERE, Context, Line, Result, Shape, SkippedError, run_job, run_suite

SCENARIOS = HERE / "network_scenarios.py"
# No transport but P2P; and NVLink multicast stays off.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    "NVSHMEM_DEBUG": "WARN",
}
KILLED = -9


def simulated(ctx: Context) -> Result:
    """A hop over the simulated network, which reorders what it may; wrong protocols are caught."""
    return _over_simulated_network(
        ctx, "network-simulated", "exchange by models, protocols and seeds"
    )


def rails(ctx: Context) -> Result:
    """Dispatch and combine in two hops over the simulated network; wrong hops are caught."""
    return _over_simulated_network(ctx, "network-rails", "dispatch and combine in two hops")


def _over_simulated_network(ctx: Context, tier: str, what: str) -> Result:
    ctx.skip_without_gpu()
    program = ctx.builds.wait(tier, ctx.deadline) / tier.replace("-", "_")
    folder = ctx.folder(tier)
    command = [str(program), *(["--small"] if ctx.quick else [])]
    process = launcher.Process(command, os.environ, folder / "run.log")
    line = Line(tier, what)
    problems = ctx.run([process], 150).judge(line)
    text = process.log.read_text(errors="replace") if process.log.exists() else ""
    as_expected = re.findall(r"^ok: .*$", text, re.MULTILINE)
    caught = [run for run in as_expected if run.endswith("(wrong on purpose)")]
    line.notes = [f"{len(as_expected)} runs as expected; {len(caught)} wrong on purpose, caught"]
    return Result([line], problems)


def nvshmem(ctx: Context) -> Result:
    """NVSHMEM over P2P: the same hop, start and end with JAX, processes that fail, leave or die."""
    ctx.skip_without_gpu()
    sizes = (2,) if ctx.quick else (2, 4, 8)
    words = re.split(r"\s+or\s+", ctx.keyword or "")
    lines, problems = [], []
    if any(word in "exchange" for word in words):
        program = ctx.builds.wait("network-nvshmem", ctx.deadline) / "network_nvshmem"
        for num_ranks in sizes:
            line, found = _exchange(ctx, str(program), num_ranks)
            lines.append(line)
            problems += found
    runs: list[tuple[str, int, dict[int, dict[str, str]], dict[int, int]]]
    runs = [("started_and_ended", n, {}, {}) for n in sizes]
    runs += [
        ("one_leaves_alone", 2, {}, {}),
        ("one_cannot_start", 2, {}, {}),
        ("one_has_no_transport", 2, {1: {"NVSHMEM_DISABLE_P2P": "1"}}, {}),
        ("one_is_killed", 2, {}, {1: KILLED}),
        ("groups_on_hosts", 4, {}, {}),
    ]
    runs = [run for run in runs if any(word in run[0] for word in words)]
    for name, num_processes, environments, expected in runs:
        folder, job = run_job(
            ctx,
            f"network-{name}-{num_processes}",
            Shape(num_processes, _ranks_per_gpu(ctx, num_processes)),
            (name,),
            75,
            file=SCENARIOS,
            expected=expected,
            environments=environments,
            # A client of MPS that is killed can disturb the others.
            shared=KILLED in expected.values(),
            JAX_EP_TIMEOUT="10",
            **ENVIRONMENT,
        )
        line = Line("network-nvshmem", f"{name}, {num_processes} processes")
        problems += job.judge(line)
        for log in sorted(folder.glob("process_*.log"))[:2]:
            text = log.read_text(errors="replace")
            line.notes += re.findall(r"^NOTE: (.*)$", text, re.MULTILINE)
        lines.append(line)
    return Result(lines, problems)


def _exchange(ctx: Context, program: str, num_ranks: int) -> tuple[Line, list[str]]:
    """The native program, a process for each rank; they may share a GPU, under MPS."""
    folder, per_gpu = ctx.folder(f"network-exchange-{num_ranks}"), _ranks_per_gpu(ctx, num_ranks)
    line = Line("network-nvshmem", f"exchange, {num_ranks} ranks")
    with contextlib.ExitStack() as stack:
        service: dict[str, str] = {}
        if per_gpu > 1:
            try:
                service = stack.enter_context(gpus.multi_process_service(folder, per_gpu))
            except RuntimeError as error:
                raise SkippedError(f"ranks that share a GPU need MPS: {error}") from error
        meet = folder / "meet"
        meet.mkdir()
        processes = [
            launcher.Process(
                [program, str(r), str(num_ranks), str(r % ctx.num_gpus), str(meet)],
                {**os.environ, **ENVIRONMENT, **service, "NVSHMEM_SYMMETRIC_SIZE": str(256 << 20)},
                folder / f"process_{r}.log",
            )
            for r in range(num_ranks)
        ]
        problems = ctx.run(processes, 60).judge(line)
    text = processes[0].log.read_text(errors="replace")
    line.notes = re.findall(r"^NOTE: (.*)$", text, re.MULTILINE)
    return line, problems


def across_nodes(num_ranks: int) -> Callable[[Context], Result]:
    """A tier of so many processes, one group whose ranks count as nodes of one and of two."""

    def tier(ctx: Context) -> Result:
        ctx.skip_without_gpu()
        lines, problems = [], []
        for ranks_per_node in (1, 2):
            if ranks_per_node == num_ranks:
                continue
            result = run_suite(
                ctx,
                f"network-ep{num_ranks}-by-{ranks_per_node}",
                Shape(num_ranks, _ranks_per_gpu(ctx, num_ranks)),
                ["gpu/across_nodes.py"],
                limit=150,
                JAX_EP_NETWORK="1",
                JAX_EP_RANKS_PER_NODE=str(ranks_per_node),
                NVSHMEM_SYMMETRIC_SIZE=str(num_ranks * 8 << 20),  # for chunks of 32 KiB
                **ENVIRONMENT,
            )
            lines += result.lines
            problems += result.problems
        return Result(lines, problems)

    tier.__doc__ = f"EP{num_ranks} across nodes over NVSHMEM's P2P: the verbs and their gradients."
    return tier


def _ranks_per_gpu(ctx: Context, num_ranks: int) -> int:
    return -(-num_ranks // ctx.num_gpus)
