"""Figures that others have measured across nodes, and the machines of the model.

From DeepEP's README and docs/legacy.md (github.com/deepseek-ai/DeepEP, dd758ca): H = 7168, fp8 rows
to the experts and bf16 rows back. A bandwidth is logical: bytes of rows to all nodes, the rank's
own included, over the time; within one node, of rows to all ranks.
"""

import dataclasses

from jax_ep.simulate.model import Design, Machine, directly, two_hops
from jax_ep.simulate.routed import Problem, Routed, route

FP8, BF16 = 7392, 14336  # bytes of a row of 7168 channels; fp8 with a float32 scale per 128

H200 = Machine(
    nvlink=366e9,
    nic=45.5e9,
    nic_latency=5e-6,
    start=20e-6,
    start_direct=30e-6,
    sm_push=46e9,
    sm_store=60e9,
)
H800 = dataclasses.replace(H200, nvlink=137e9)
ORIGINS = """\
measured for jax_ep on two H200: nvlink (366 GB/s), sm_push, sm_store
fitted: nic (45.5 of the 50 GB/s published), nvlink of H800 (137 of 160), start_direct (30 us), each
  to the point that is marked with it
assumed: nic_latency (5 us), start (20 us), that SMs are alike"""


@dataclasses.dataclass(frozen=True)
class Point:
    """A published figure, GB/s in two hops, us of a low-latency call (T = 128).

    V1's normal kernels had the best four nodes of a token; low latency has a row for each choice.
    """

    name: str
    num_ranks: int
    figure: float
    row_bytes: int
    tokens: int = 4096
    machine: Machine = H800
    num_sms: int = 24
    fitted: str = ""  # what of the machine is chosen so that this comes out

    @property
    def is_latency(self) -> bool:
        """Whether the figure is us."""
        return self.tokens == 128

    def computed(self) -> float:
        """What the model gives in place of the figure."""
        groups = 1 if self.is_latency else self.num_ranks // 8
        routed = route(
            Problem(self.num_ranks, self.tokens, num_groups=groups, top_groups=min(groups, 4))
        )
        if self.is_latency:
            time = directly(routed, self.row_bytes, self.machine, once_per_choice=True)
            return time.seconds * 1e6
        design = Design(num_sms=self.num_sms, expands=False)
        seconds = two_hops(routed, self.row_bytes, self.machine, design).seconds
        return logical_bytes(routed, self.row_bytes) / seconds / 1e9


def logical_bytes(routed: Routed, row_bytes: int) -> float:
    """Of the mean rank: to all nodes, or to all ranks of the only one."""
    rows = routed.to_node if routed.problem.num_nodes > 1 else routed.to_rank
    return float(rows.sum()) * row_bytes / routed.problem.num_ranks


POINTS = (
    Point("V1 dispatch", 8, 153, FP8, fitted="nvlink"),
    *(Point("V1 dispatch", r, figure, FP8) for r, figure in ((16, 43), (32, 58), (64, 51))),
    *(Point("V1 combine", r, f, BF16) for r, f in ((8, 158), (16, 43), (32, 57), (64, 50))),
    Point("V2 dispatch", 16, 90, FP8, 8192, H200, 12, fitted="nic"),
    Point("V2 combine", 16, 81, BF16, 8192, H200, 12),
    Point("V2 dispatch", 32, 61, FP8, 8192, H200, 6),
    Point("V2 combine", 32, 61, BF16, 8192, H200, 6),
    Point("V1 low-latency dispatch", 16, 118, FP8, 128, fitted="start_direct"),
    *(
        Point("V1 low-latency dispatch", r, figure, FP8, 128)
        for r, figure in ((8, 77), (32, 155), (64, 173), (128, 192), (256, 194))
    ),
    *(
        Point("V1 low-latency combine", r, figure, BF16, 128)
        for r, figure in ((8, 114), (16, 195), (32, 273), (64, 314), (128, 369), (256, 360))
    ),
)
