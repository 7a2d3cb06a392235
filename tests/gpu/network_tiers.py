"""The tiers of the network between nodes."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Callable

import gpus
import launcher
from context import HERE, TESTS, Context, Line, Result, Shape, SkippedError, run_job, run_suite

SCENARIOS = HERE / "network_scenarios.py"
# No transport but P2P; and NVLink multicast stays off.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NVSHMEM_REMOTE_TRANSPORT": "none",
    "NVSHMEM_DISABLE_NCCL": "1",
    "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "lo",
    "NVSHMEM_DEBUG": "WARN",
    "JAX_EP_NETWORK_SLOTS": "0",  # small calls go as large ones do, but where a tier says otherwise
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


def slots(ctx: Context) -> Result:
    """Calls in slots over the simulated network; wrong hops and wrong memory are caught."""
    return _over_simulated_network(ctx, "network-slots", "calls in slots across nodes")


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
            line, found = exchange(ctx, str(program), num_ranks)
            lines.append(line)
            problems += found
    runs = [Run(("started_and_ended",), n) for n in sizes]
    runs += [
        Run(("one_leaves_alone",), 2),
        Run(("one_cannot_start",), 2),
        Run(("one_has_no_transport",), 2, {1: {"NVSHMEM_DISABLE_P2P": "1"}}),
        Run(("one_is_killed",), 2, expected={1: KILLED}),
        Run(("groups_on_hosts",), 4),
    ]
    runs = [run for run in runs if any(word in run.name for word in words)]
    result = _run_scenarios(ctx, "network-nvshmem", runs, limit=60, JAX_EP_TIMEOUT="10")
    return Result(lines + result.lines, problems + result.problems)


def failures(ctx: Context) -> Result:
    """A rank of a group across nodes that never comes, stalls or is killed: all hear of it soon."""
    runs = [
        Run(("a_rank_never_comes", "a_rank_stalls", "all_are_right_again"), 4),
        Run(("a_rank_is_killed",), 4, expected={3: KILLED}),
    ]
    return _run_scenarios(ctx, "network-failures", runs, limit=75)


def tear_down(ctx: Context) -> Result:
    """Processes of a group across nodes leave: again and again, with calls under way, or alone."""
    tier, on_nodes = "network-tear-down", {"JAX_EP_RANKS_PER_NODE": "1"}
    runs = [
        Run(("begun_again", "left_in_turn"), 2),
        Run(("left_unblocked",), 2),
        Run(("shut_down_first",), 2),
    ]
    result = _run_scenarios(ctx, tier, runs, limit=75, **on_nodes)
    on_hosts = _run_scenarios(ctx, tier, [Run(("one_leaves_the_rest",), 4)], limit=75)
    return Result(result.lines + on_hosts.lines, result.problems + on_hosts.problems)


@dataclasses.dataclass(frozen=True)
class Run:
    """Scenarios that the processes of a job run one after the other.

    Attributes:
        scenarios: their names.
        num_processes: of the job.
        environments: further variables of single processes.
        expected: return codes that are not 0.
    """

    scenarios: tuple[str, ...]
    num_processes: int
    environments: dict[int, dict[str, str]] = dataclasses.field(default_factory=dict)
    expected: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return "+".join(self.scenarios)


def _run_scenarios(
    ctx: Context, tier: str, runs: list[Run], limit: float, **environment: str
) -> Result:
    """A line of the table for each; process 0 and 1 may add notes to it."""
    ctx.skip_without_gpu()
    lines, problems = [], []
    for run in runs:
        folder, job = run_job(
            ctx,
            f"{tier}-{run.scenarios[0]}-{run.num_processes}",
            Shape(run.num_processes, ranks_per_gpu(ctx, run.num_processes)),
            (run.name,),
            limit,
            file=SCENARIOS,
            expected=run.expected,
            environments=run.environments,
            shared=KILLED in run.expected.values(),
            **environment,
            **ENVIRONMENT,
        )
        line = Line(tier, f"{run.name}, {run.num_processes} processes")
        problems += job.judge(line)
        for log in sorted(folder.glob("process_*.log"))[:2]:
            text = log.read_text(errors="replace")
            line.notes += re.findall(r"^NOTE: (.*)$", text, re.MULTILINE)
        lines.append(line)
    return Result(lines, problems)


def exchange(
    ctx: Context,
    program: str,
    num_ranks: int,
    *options: str,
    tier: str = "network-nvshmem",
    what: str = "exchange",
    hosts: tuple[str, ...] = (),
    environments: tuple[dict[str, str], ...] = (),
) -> tuple[Line, list[str]]:
    """The native program, a process for each rank; they may share a GPU, under MPS."""
    name = f"{tier}-{what}-{num_ranks}".replace(", ", "-").replace(" ", "_")
    folder, per_gpu = ctx.folder(name), ranks_per_gpu(ctx, num_ranks)
    line = Line(tier, f"{what}, {num_ranks} ranks")
    with contextlib.ExitStack() as stack:
        service: dict[str, str] = {}
        if per_gpu > 1:
            try:
                service = stack.enter_context(gpus.multi_process_service(folder, per_gpu))
            except RuntimeError as error:
                raise SkippedError(f"ranks that share a GPU need MPS: {error}") from error
        meet = folder / "meet"
        meet.mkdir()
        usual = {**os.environ, **ENVIRONMENT, **service, "NVSHMEM_SYMMETRIC_SIZE": str(256 << 20)}
        processes = []
        for r in range(num_ranks):
            command = [program, str(r), str(num_ranks), str(r % ctx.num_gpus), str(meet), *options]
            if hosts:
                command = [sys.executable, str(TESTS / "support/host.py"), hosts[r], *command]
            environment = usual | (environments[r] if environments else {})
            processes.append(launcher.Process(command, environment, folder / f"process_{r}.log"))
        problems = ctx.run(processes, 60).judge(line)
    text = processes[0].log.read_text(errors="replace")
    line.notes = re.findall(r"^NOTE: (.*)$", text, re.MULTILINE)
    return line, problems


def across_nodes(num_ranks: int, ranks_per_node: int) -> Callable[[Context], Result]:
    """A tier of so many processes, one group, of which so many each count as a node."""

    def tier(ctx: Context) -> Result:
        # Eight processes have an eighth of the host, and compile for most of the time.
        keyword = "small or drops or long or call_after_call" if num_ranks == 8 else ""
        return _run_group(ctx, num_ranks, ranks_per_node, keyword or "not random_calls")

    tier.__doc__ = (
        f"EP{num_ranks} on nodes of {ranks_per_node} over NVSHMEM's P2P: the verbs, their gradients"
    )
    return tier


def slots_across_nodes(num_ranks: int, ranks_per_node: int) -> Callable[[Context], Result]:
    """A tier as those, whose small calls go in slots; and random calls, of which some do."""

    def tier(ctx: Context) -> Result:
        ctx = dataclasses.replace(ctx, has_slots=True)
        lines, problems = [], []
        for kind, file, keyword in (
            ("slots-", "gpu/slots_across_nodes.py", ""),
            ("slots-stress-", "gpu/across_nodes.py", "random_calls"),
        ):
            result = _run_group(
                ctx, num_ranks, ranks_per_node, keyword, kind, file, JAX_EP_NETWORK_SLOTS="1"
            )
            lines += result.lines
            problems += result.problems
        return Result(lines, problems)

    tier.__doc__ = f"EP{num_ranks} on nodes of {ranks_per_node}, with slots between them."
    return tier


def stress(ctx: Context) -> Result:
    """Random calls across nodes, checked on the devices, queued and with late ranks."""
    lines, problems = [], []
    for num_ranks, ranks_per_node in ((2, 1), (4, 2)):
        result = _run_group(ctx, num_ranks, ranks_per_node, "random_calls", "stress-")
        lines += result.lines
        problems += result.problems
    return Result(lines, problems)


def _run_group(
    ctx: Context,
    num_ranks: int,
    ranks_per_node: int,
    keyword: str,
    kind: str = "",
    file: str = "gpu/across_nodes.py",
    **environment: str,
) -> Result:
    ctx.skip_without_gpu()
    return run_suite(
        ctx,
        f"network-{kind}ep{num_ranks}-by-{ranks_per_node}",
        Shape(num_ranks, ranks_per_gpu(ctx, num_ranks)),
        [file],
        limit=120,
        keyword=keyword,
        JAX_EP_NETWORK="1",
        JAX_EP_RANKS_PER_NODE=str(ranks_per_node),
        NVSHMEM_SYMMETRIC_SIZE=str(160 << 20),  # for chunks of 32 to 80 KiB
        **(ENVIRONMENT | environment),
    )


def ranks_per_gpu(ctx: Context, num_ranks: int) -> int:
    return -(-num_ranks // ctx.num_gpus)
