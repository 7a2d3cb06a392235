"""The tiers of NVSHMEM's UCX plugin: over a network in software, and over TCP."""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Sequence

from context import Context, Result, Shape, SkippedError, run_suite
from network_tiers import ENVIRONMENT, exchange, ranks_per_gpu

# Of all processes.
UCX = {
    "NVSHMEM_REMOTE_TRANSPORT": "ucx",
    "NVSHMEM_DISABLE_P2P": "1",
    "NVSHMEM_DISABLE_CUDA_VMM": "1",  # the heap is one allocation
    "NVSHMEM_DISABLE_MNNVL": "1",
    "NCCL_IB_DISABLE": "1",  # the libibverbs that it would find is none
    # A queue for each stream, or copies wait behind kernels that wait for them.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}


@dataclasses.dataclass(frozen=True)
class Wire:
    """How the network in software is.

    Attributes:
        seed: of its delays.
        is_newest_first: whether the newest fragment of a put leaves first.
        hosts: names for the processes' hosts; else they are on one, without P2P.
    """

    seed: int
    is_newest_first: bool = False
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [f"seed {self.seed}", "newest first" if self.is_newest_first else ""]
        return ", ".join(filter(None, [*words, "two hosts" if self.hosts else ""]))

    def environments(self, build: pathlib.Path, keys: pathlib.Path) -> list[dict[str, str]]:
        """Of both processes, which meet in the folder `keys`."""
        keys.mkdir(parents=True)
        return [
            {
                **UCX,
                **_libraries(build / "wire"),
                "NVSHMEM_DISABLE_P2P": str(int(not self.hosts)),
                "WIRE_FOLDER": str(keys),
                "WIRE_DELAY_US": "2000",  # short ones hide mistakes
                "WIRE_FRAGMENT": "4096",
                "WIRE_FENCE": "atomics",
                "WIRE_NEWEST_FIRST": str(int(self.is_newest_first)),
                "WIRE_SEED": str(100 * self.seed + rank),
            }
            for rank in range(2)
        ]


WIRES = (Wire(1), Wire(2, is_newest_first=True), Wire(3, hosts=("host0", "host1")))


def wire(ctx: Context) -> Result:
    """NVSHMEM's proxy and UCX plugin over a network in software; wrong protocols are caught."""
    build = _build(ctx)
    if ctx.num_gpus < 2:
        raise SkippedError("peers over the wire must not share a GPU: it needs two")
    lines, problems = [], []
    for plan in WIRES[: 1 if ctx.quick else len(WIRES)]:
        keys = ctx.folder(f"network-wire-keys-{plan.seed}")
        result = _run(
            ctx,
            "network-wire",
            str(plan),
            build,
            plan.environments(build, keys / "exchange"),
            plan.environments(build, keys / "suite"),
            is_reordered=True,
            keyword="small or drops or call_after_call",
            hosts=plan.hosts,
        )
        lines += result.lines
        problems += result.problems
    return Result(lines, problems)


def tcp(ctx: Context) -> Result:
    """NVSHMEM's proxy and UCX plugin over UCX's own TCP, slowly: a few calls."""
    build = _build(ctx)
    spec = importlib.util.find_spec("libucx")
    if spec is None or not spec.submodule_search_locations:
        raise SkippedError("needs UCX: pip install libucx-cu13")
    environment = {
        **UCX,
        **_libraries(pathlib.Path(spec.submodule_search_locations[0]) / "lib", build / "wire"),
        "LD_PRELOAD": str(build / "libover_tcp.so"),
        "UCX_NET_DEVICES": "lo",
        "UCX_MEMTYPE_CACHE": "n",
        "UCX_MEM_EVENTS": "n",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    both = [environment, environment]
    keyword = "small and uniform and not sums"
    return _run(ctx, "network-tcp", "loopback", build, both, both, keyword=keyword)


def _build(ctx: Context) -> pathlib.Path:
    ctx.skip_without_gpu()
    return ctx.builds.wait("network-wire", ctx.deadline)


def _libraries(*folders: pathlib.Path) -> dict[str, str]:
    """That are found first."""
    paths = [*map(str, folders), os.environ.get("LD_LIBRARY_PATH", "")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def _run(
    ctx: Context,
    tier: str,
    what: str,
    build: pathlib.Path,
    of_exchange: Sequence[dict[str, str]],
    of_suite: Sequence[dict[str, str]],
    *,
    keyword: str,
    is_reordered: bool = False,
    hosts: Sequence[str] = (),
) -> Result:
    """The native program, then tests through JAX, by two processes with these environments."""
    line, problems = exchange(
        ctx,
        str(build / "network_nvshmem"),
        2,
        *(["reordered"] if is_reordered else []),
        tier=tier,
        what=f"exchange, {what}",
        hosts=tuple(hosts),
        environments=tuple(of_exchange),
    )
    named = [{"JAX_EP_TEST_HOST": host} for host in hosts] or [{}, {}]
    result = run_suite(
        ctx,
        f"{tier}-{what}".replace(", ", "-").replace(" ", "_"),
        Shape(2, ranks_per_gpu(ctx, 2)),
        ["gpu/across_nodes.py"],
        limit=120,
        keyword=keyword,
        environments={rank: of_suite[rank] | named[rank] for rank in range(2)},
        JAX_EP_NETWORK="1",
        JAX_EP_RANKS_PER_NODE="1",
        NVSHMEM_SYMMETRIC_SIZE=str(160 << 20),
        **ENVIRONMENT,
    )
    return Result([line, *result.lines], problems + result.problems)
