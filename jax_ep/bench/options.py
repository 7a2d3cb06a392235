"""Times make_layout, dispatch and combine as a jitted program runs them, beside their bounds.

Runs on all devices of one process, or of several, each of which is started like this (where JAX
finds the cluster's settings by itself, --distributed alone is enough) and of which process 0
prints:

    python -m jax_ep.bench --distributed --coordinator HOST:PORT --num-processes N --process-id I

On GPUs with JAX_LOCAL_DEVICE_IDS=.. in its environment, where a host has several. W, below, is what
a process's own GPUs carry between each other: with one GPU each there is none, and no bound of what
crosses the wire.

On GPUs the limits are measured first: W, what a link carries in each direction while both are busy
(rows pushed by bulk copies, for each pair), the time of a flag, and B, what a copy inside a device
moves. The bound of an operation is the larger of its wire bytes over W and its memory bytes over B;
with --num-sms also of the bytes that so many SMs have to read or to store, at the rates at which
they only read and at most store. A GPU's time is the difference between a program with many
dependent calls and one with half as many, over those that it has more. On CPU a time is that of the
whole call, and the bound is a copy by all cores of the rows that the operation must write, between
warm buffers, measured between the repetitions. All times are the slowest rank's.

The first value of --hidden, --top-k, --routing, --capacity, --dtype, --fp8 and --num-sms is the
base, measured at every --tokens; every further value is measured with the others at their base
(--product: all combinations). Beside the base stand JAX's own collectives for the same rows.

With several --ranks-per-node all is measured with each, one after the other. On GPUs ranks of one
host that count as several nodes send rows over the network that NVSHMEM finds between them, so
that beside each other stand the ways of rows inside a node and between nodes.

With --decode few tokens are measured, in slots and without, each in a long program and as programs
of one call, and one table has them side by side.

With --overlap whole programs are timed, of two micro-batches through layers of experts: with calls
on all SMs, one after the other, and with overlap=True on the SMs of --num-sms.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax_ep import _native
from jax_ep._checks import positive_argument
from jax_ep.bench import decode, operations, overlap, timeline, traffic
from jax_ep.bench.traffic import Point

VERB_NAMES = (
    "make_layout",
    "dispatch",
    *operations.NOT_EXPANDED,
    "make_layout+dispatch",
    "layout_and_dispatch",
    "combine",
    "round trip",
    "make_layout+dispatch+combine",
    "forward+backward",
)
BASELINE_NAMES = ("all_to_all", "all_to_all+gather", "all_gather+gather", operations.RAGGED)
_TIMELINE_TOKENS = 4096  # unless told

# By platform, what is measured unless the command line says otherwise.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "tokens": [1, 16, 128, 1024],
        "hidden": [1024],
        "top_k": [8],
        "experts": 64,
        "routing": ["uniform"],
        "capacity": ["tight"],
        "fp8": ["none"],
        "repeats": 20,
    },
    "gpu": {
        "tokens": [1, 16, 128, 1024, 4096, 16384],
        "hidden": [7168, 2048],
        "top_k": [8, 1, 2],
        "experts": 256,
        "routing": ["uniform", "zipf"],
        "capacity": ["tight", "default"],
        "fp8": ["none", "float32"],
        "repeats": 9,
    },
}

_VARIED = ("hidden", "top_k", "routing", "capacity", "dtype", "fp8", "num_sms")


def _capacity(text: str) -> str:
    kind = text.removeprefix(traffic.EXPERT_PREFIX)
    if kind == "tight" or text == "default":
        return text
    try:
        if float(kind) > 0:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r}: give tight, default, or a factor of the mean load above 0; expert-tight or "
        "expert-FACTOR for room that each expert has for itself"
    )


def make_parser() -> argparse.ArgumentParser:
    """All options; what depends on the platform is `complete`d later."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_ep.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--platform", choices=["cpu", "cuda"], help="default: JAX's own choice")
    add(
        "--ranks",
        type=positive_argument,
        help="devices in the EP group; default: all GPUs, or 8 on CPU; of several processes all",
    )
    add("--distributed", action="store_true", help="this is one of several processes")
    add("--coordinator", help="HOST:PORT of process 0")
    add("--num-processes", type=positive_argument)
    add("--process-id", type=int)
    add("--tokens", type=positive_argument, nargs="+", help="T, per rank")
    add("--hidden", type=positive_argument, nargs="+", help="H")
    add("--top-k", type=positive_argument, nargs="+", help="K")
    add("--experts", type=positive_argument, help="E; default: 256, or 64 on CPU")
    add("--routing", nargs="+", choices=traffic.ROUTINGS)
    add("--zipf-exponent", type=float, default=1.0, help="how skewed --routing zipf is")
    add(
        "--capacity",
        type=_capacity,
        nargs="+",
        help="tight (exactly what the fullest rank receives), default (cannot overflow), or "
        "factors of the mean load; expert-tight, expert-FACTOR: the same room for each expert",
    )
    add("--alignment", type=positive_argument, default=1, help="expert alignment in rows")
    add(
        "--dtype",
        nargs="+",
        default=["bfloat16"],
        choices=["bfloat16", "float16", "float32"],
    )
    add("--fp8", nargs="+", choices=traffic.FP8_MODES, help="how dispatch sends rows")
    add(
        "--num-sms",
        type=positive_argument,
        nargs="+",
        help="SMs an operation may use; default: its own",
    )
    add("--product", action="store_true", help="all combinations of the lists")
    add(
        "--decode",
        action="store_true",
        help=f"only {', '.join(decode.OPERATIONS)}, by default at T = "
        f"{', '.join(map(str, decode.TOKENS))}: with slots and without, in a program and as "
        "programs of one call",
    )
    add(
        "--overlap",
        action="store_true",
        help="only programs of micro-batches, with calls beside the experts' products and without",
    )
    add(
        "--expert-hidden",
        type=positive_argument,
        default=1024,
        help="F of the experts of --overlap (1024)",
    )
    add("--layers", type=positive_argument, default=1, help="of the programs of --overlap (1)")
    add(
        "--only",
        nargs="+",
        help="only operations whose name contains one of these, or after =, is it: =dispatch",
    )
    add("--repeats", type=positive_argument, help="default: 9, or 20 on CPU")
    add(
        "--calls",
        type=positive_argument,
        help="N: a GPU's long program has 2 N calls; default: by the bound, 5 to 40",
    )
    add("--seed", type=int, default=0)
    add(
        "--staging-bytes",
        type=positive_argument,
        default=0,
        help="of jax_ep.initialize(); with JAX_EP_PATH=staged all rows go through that region",
    )
    add(
        "--ranks-per-node",
        type=positive_argument,
        nargs="+",
        default=[None],
        help="ranks that count as a node, of jax_ep.initialize(): then what a network would carry "
        "is printed too. On GPUs fewer than there are need a process for each GPU, and NVSHMEM. "
        "Default: as the hosts are",
    )
    add(
        "--slot-bytes",
        type=int,
        help="of jax_ep.initialize(); 0: no slots. Default: as JAX_EP_SLOTS says; with --decode "
        "first 64 MiB, then none",
    )
    add(
        "--no-second-process",
        action="store_true",
        help="leave out ragged_all_to_all with XLA's device kernel, which needs its own process",
    )
    add("--json", type=Path, help="write all figures to this file, after every point")
    add(
        "--plot",
        type=Path,
        help="draw the base's times and their bounds over T into this PNG (needs matplotlib)",
    )
    add(
        "--timeline",
        type=Path,
        metavar="FILE.png",
        help="measure nothing; run one operation (--only; default: all three verbs) at the base's "
        "first --tokens (default 4096) and say when each block of its kernels did what, in a table "
        "and in this PNG. Needs matplotlib, GPUs, and a build of jax_ep with JAX_EP_TIMELINE",
    )
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if options do not go together."""
    _check_only(parser, args)
    for mode in ("decode", "overlap"):
        if getattr(args, mode) and (args.plot or args.timeline):
            parser.error(f"--{mode}: it has no --plot and no --timeline")
    if args.overlap:
        _check_overlap(parser, args)
    if args.decode and len(args.ranks_per_node) > 1:
        parser.error("--decode: it takes one --ranks-per-node")
    if (args.plot or args.timeline) and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot and --timeline need matplotlib: pip install matplotlib")
    if args.timeline and args.distributed:
        parser.error("--timeline: it shows the devices of one process, without --distributed")
    if args.timeline and not timeline.is_built(_native.cuda):
        parser.error(
            "--timeline: the kernels of this installation note nothing; in jax_ep's source "
            f"directory run {timeline.BUILD_COMMAND}"
        )
    if args.timeline and args.tokens is None:
        args.tokens = [_TIMELINE_TOKENS]


def chooses(text: str, name: str) -> bool:
    """Whether a word of ``--only`` is for the operation of this name."""
    return text[1:] == name if text.startswith("=") else text in name


def _check_overlap(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if an option would change nothing."""
    for name in ("decode", "only", "fp8", "distributed", "calls", "ranks_per_node"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--overlap: it has no --{name.replace('_', '-')}")
    if args.alignment != 1 or any(c.startswith(traffic.EXPERT_PREFIX) for c in args.capacity or ()):
        parser.error("--overlap: experts have neither --alignment nor room of their own")


def _check_only(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if a word of ``--only`` would choose nothing."""
    names = decode.OPERATIONS if args.decode else (*VERB_NAMES, *BASELINE_NAMES)
    for text in args.only or ():
        if not any(chooses(text, name) for name in names):
            parser.error(f"--only {text}: no operation has that in its name: {', '.join(names)}")


def complete(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    platform: str,
    num_devices: int,
    num_processes: int,
) -> None:
    """Fills in what the command line leaves to the platform; ends if it cannot be measured."""
    if args.timeline and platform == "cpu":
        parser.error("--timeline: it is the GPU's kernels that note what they do")
    args.ranks = args.ranks or num_devices
    defaults = _DEFAULTS[platform]
    if args.decode:
        defaults = decode.defaults(defaults)
    elif args.overlap:
        defaults = overlap.defaults(defaults, platform, args.ranks)
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.ranks > num_devices:
        of = "this process has" if num_processes == 1 else "the processes have"
        parser.error(f"--ranks {args.ranks}: {of} {num_devices} devices")
    if num_processes > 1 and args.ranks < num_devices:
        parser.error(f"--ranks {args.ranks}: several processes measure all {num_devices} devices")
    if args.experts % args.ranks:
        parser.error(f"--experts {args.experts}: must be a multiple of {args.ranks} ranks")
    if max(args.top_k) > args.experts:
        parser.error(f"--top-k {max(args.top_k)}: must be at most --experts {args.experts}")
    if "group-limited" in args.routing:
        if args.experts % traffic.NUM_GROUPS:
            parser.error(
                f"--routing group-limited: --experts must be a multiple of {traffic.NUM_GROUPS}"
            )
        most = args.experts // traffic.NUM_GROUPS * traffic.TOP_GROUPS
        if max(args.top_k) > most:
            parser.error(f"--routing group-limited: --top-k must be at most {most}")
    for size in args.ranks_per_node:
        if size and args.ranks % size:
            parser.error(f"--ranks-per-node {size}: must divide the {args.ranks} ranks")


def points(args: argparse.Namespace) -> list[Point]:
    """What to measure: the base at every T first, then its variations."""
    values = {name: getattr(args, name) or [None] for name in _VARIED}
    if args.product:
        combinations: Iterable[dict[str, Any]] = (
            dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())
        )
    else:
        base = {name: options[0] for name, options in values.items()}
        combinations = [base] + [
            base | {name: option} for name in values for option in values[name][1:]
        ]
    return [
        Point(tokens=tokens, **combination)
        for combination in combinations
        for tokens in args.tokens
    ]
