"""Predicts dispatch and combine across nodes, which do not exist yet: nothing here is measured.

First the model stands beside published figures of DeepEP, with its errors; then come predictions
for jax_ep on H200 with a NIC of 50 GB/s a GPU: H = 7168, bf16 rows in expert order, and calls of
128 tokens that send fp8 rows straight to their ranks and bf16 rows back.
"""

import argparse
import dataclasses
from collections.abc import Sequence

from jax_ep._checks import positive_argument
from jax_ep.simulate import published
from jax_ep.simulate.model import Design, directly, memory_bytes, two_hops
from jax_ep.simulate.plot import draw
from jax_ep.simulate.published import BF16, FP8, H200, Point
from jax_ep.simulate.routed import Problem, route

COMPARED = "what | EP | published | model | error"
PREDICTED = (
    "EP | nodes per token | network MB | dispatch us | logical GB/s | bound by | fp8 dispatch us"
    " | combine us | staging MB | tables MB | T = 128: dispatch us | combine us | slots MB"
)


def print_header(columns: str) -> None:
    """The head of a table in Markdown."""
    print(f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}")


def print_row(*cells: object) -> None:
    """A row of it."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_comparison(point: Point) -> float:
    """A published figure and what the model gives, which is returned."""
    unit = "us" if point.is_latency else "GB/s"
    computed = point.computed()
    error = f"{100 * (computed / point.figure - 1):+.0f} %"
    error += f" (fitted: {point.fitted})" if point.fitted else ""
    print_row(point.name, point.num_ranks, f"{point.figure} {unit}", f"{computed:.0f}", error)
    return computed


def print_prediction(problem: Problem, design: Design) -> dict[str, float]:
    """What is predicted of jax_ep; returns the times in us."""
    # A row of dispatch comes with eight bytes for each choice of its token: place and weight.
    placing = 8 * problem.top_k
    routed, small = route(problem), route(dataclasses.replace(problem, tokens=128))
    dispatch, fp8 = (two_hops(routed, row + placing, H200, design) for row in (BF16, FP8))
    combine = two_hops(routed, BF16, H200, design)
    direct = [directly(small, row, H200) for row in (FP8 + placing, BF16)]
    memory = memory_bytes(problem, BF16 + placing, design, small.problem.tokens)
    megabytes = {name: f"{size / 1e6:.3g}" for name, size in memory.items()}
    logical = published.logical_bytes(routed, BF16)
    print_row(
        problem.num_ranks,
        f"{routed.nodes_per_token:.2f}",
        f"{logical * (1 - 1 / problem.num_nodes) / 1e6:.0f}",
        f"{dispatch.seconds * 1e6:.0f}",
        f"{logical / dispatch.seconds / 1e9:.0f}",
        dispatch.bound,
        *(f"{time.seconds * 1e6:.0f}" for time in (fp8, combine)),
        *(megabytes[name] for name in ("staging", "tables")),
        *(f"{time.seconds * 1e6:.0f}" for time in direct),
        megabytes["slots"],
    )
    names = ("dispatch", "fp8 dispatch", "combine", "dispatch, T = 128", "combine, T = 128")
    times = (dispatch, fp8, combine, *direct)
    return {name: time.seconds * 1e6 for name, time in zip(names, times, strict=True)}


def _group_size(text: str) -> int:
    problem = Problem(positive_argument(text))
    if problem.num_ranks % problem.ranks_per_node or problem.num_experts % problem.num_ranks:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a multiple of {problem.ranks_per_node} ranks on a node that divides "
            f"{problem.num_experts} experts"
        )
    return problem.num_ranks


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser("python -m jax_ep.simulate", description=__doc__)
    parser.add_argument(
        "--ep", type=_group_size, nargs="+", default=[16, 32, 64, 128, 256], metavar="R"
    )
    parser.add_argument("--tokens", type=positive_argument, default=4096, help="T, per rank")
    parser.add_argument("--router", choices=["group-limited", "uniform"], default="group-limited")
    parser.add_argument(
        "--chunk-rows", type=positive_argument, default=Design.chunk_rows, help="rows of a chunk"
    )
    parser.add_argument(
        "--credits", type=positive_argument, default=Design.credits, help="chunks to a node"
    )
    parser.add_argument(
        "--num-sms", type=positive_argument, default=Design.num_sms, help="of each rank"
    )
    parser.add_argument("--skip-published", action="store_true", help="predictions alone")
    parser.add_argument("--plot", metavar="FILE", help="draws both (needs matplotlib)")
    options = parser.parse_args(arguments)
    design = Design(options.chunk_rows, options.credits, options.num_sms)
    groups, best = (8, 4) if options.router == "group-limited" else (1, 1)

    points = () if options.skip_published else published.POINTS
    computed, predicted = [], {}
    if points:
        print_header(COMPARED)
        computed = [print_comparison(point) for point in points]
        print(f"\n{published.ORIGINS}\n")
    print(
        f"Predicted for jax_ep, not measured: T = {options.tokens}, top-8 of 256 experts, the best "
        f"{best} of {groups} groups, {design.num_sms} SMs, chunks of {design.chunk_rows} rows, "
        f"{design.credits} credits\n"
    )
    print_header(PREDICTED)
    for num_ranks in options.ep:
        problem = Problem(num_ranks, options.tokens, num_groups=groups, top_groups=best)
        predicted[num_ranks] = print_prediction(problem, design)
    if options.plot:
        draw(points, computed, predicted).savefig(options.plot, dpi=80)


if __name__ == "__main__":
    main()
