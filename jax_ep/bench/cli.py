"""Times make_layout, dispatch and combine as a jitted program runs them, beside their bounds.

Runs on all local devices of one process. On GPUs the limits are measured first: W, what a link
carries in each direction while both are busy (rows pushed by bulk copies, for each pair), the time
of a flag, and B, what a copy inside a device moves. The bound of an operation is the larger of its
wire bytes over W and its memory bytes over B; with --num-sms also of the bytes that so many SMs
have to read or to store, at the rates at which they only read and at most store. A GPU's time is
the difference between a program with many dependent calls and one with half as many, over those
that it has more. On CPU a time is that of the whole call, and the bound is a copy by all cores of
the rows that the operation must write, between warm buffers, measured between the repetitions. All
times are the slowest rank's.

The first value of --hidden, --top-k, --routing, --capacity, --dtype, --fp8 and --num-sms is the
base, measured at every --tokens; every further value is measured with the others at their base
(--product: all combinations). Beside the base stand JAX's own collectives for the same rows.

With --decode few tokens are measured, in slots and without, each in a long program and as programs
of one call, and one table has them side by side.
"""

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import jax_ep
from jax_ep import _native, doctor, nodes, runtime
from jax_ep._checks import positive_argument
from jax_ep.bench import decode, measure, operations, report, timeline, traffic
from jax_ep.bench.link import Link, measure_link
from jax_ep.bench.traffic import Point, Traffic

_DEVICE_KERNEL_FLAG = "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true"
_CHILD_TIMEOUT = 900  # seconds
_LINK_SMS = (8, 16, 24, 32)  # SM counts that W is measured on without --num-sms
_SINGLE_CALLS = {"cpu": 10, "gpu": 100}  # programs of one call in a burst, unless told
_TIMELINE_OPERATION, _TIMELINE_TOKENS = "make_layout+dispatch+combine", 4096  # unless told

# Out of memory, refused by XLA, not built here: the other points are still worth measuring.
_MEASUREMENT_ERRORS = (RuntimeError, MemoryError, ValueError)
_UNSUPPORTED = "UNIMPLEMENTED"  # how XLA's error begins for what its backend has not got, at any T

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

_PRINTED_VARIABLES = ("XLA_", "NCCL_", "JAX_", "CUDA_VISIBLE", "NPROC")


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


def _parser() -> argparse.ArgumentParser:
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
        help="devices in the EP group; default: all GPUs, or 8 on CPU",
    )
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
    add("--only", nargs="+", help="only operations whose name contains one of these")
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
        help="ranks that count as a node, of jax_ep.initialize(): then what a network would carry "
        "is printed too. Groups across nodes are for CPU, or GPUs with a network",
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


def _set_up_virtual_devices(num_ranks: int) -> None:
    """For CPU, before JAX creates its client: a virtual device a rank, and threads for them."""
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={num_ranks}".strip()
    # What jaxlib 0.10.2 needs for programs that are in flight together.
    os.environ.setdefault("NPROC", str(2 * num_ranks))


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


def _environment(mesh: Mesh) -> dict[str, Any]:
    """What the figures depend on."""
    import jaxlib.version

    device = mesh.devices.flat[0]
    drivers = {gpu.driver for gpu in doctor.driver_gpus()}
    return {
        "jax_ep": jax_ep.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "platform": " ".join(device.client.platform_version.split()),
        "driver": ", ".join(sorted(filter(None, drivers))) or None,
        "device": device.device_kind,
        "ranks": mesh.size,
        "cores": os.cpu_count(),
        "timeout_s": jax_ep.get_timeout()._asdict(),
        "peers": runtime.describe() if device.platform != "cpu" else None,
        "timeline_build": timeline.is_built(_native.cuda),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PRINTED_VARIABLES)
        },
    }


class _Bench:
    """One run: its mesh, its limits, and the rows so far."""

    def __init__(self, args: argparse.Namespace, mesh: Mesh, link: Link | None) -> None:
        self.args = args
        self.mesh = mesh
        self.link = link
        self.on_gpu = mesh.devices.flat[0].platform != "cpu"
        self.rows: list[report.Row] = []
        self.path = ""  # one of decode's, or none
        self.unsupported: dict[str, Exception] = {}  # by operation: what XLA says

    def wanted(self, name: str) -> bool:
        only = self.args.only
        if self.args.decode and name not in decode.OPERATIONS:
            return False
        return not only or any(text in name for text in only)

    def measure_point(self, point: Point, with_baselines: bool) -> list[report.Row]:
        """All operations of a point; prints each as it comes."""
        args = self.args
        ids = traffic.expert_ids(point, self.mesh.size, args.experts, args.seed, args.zipf_exponent)
        room = traffic.room(point, ids, args.experts, args.alignment)
        moved = traffic.measure_traffic(ids, args.experts, room, args.alignment)
        network = self._network(point, ids)
        rows: list[report.Row] = []

        def emit(row: report.Row) -> None:
            rows.append(row | network)
            print(report.format_row(row), flush=True)

        sizes = {"num_experts": args.experts, "alignment": args.alignment}
        todo: list[operations.Operation] = []
        kind = "jax_ep"
        try:
            data = operations.make_data(point, self.mesh, ids, moved.layout.capacity, args.seed)
            if self.wants_any(_VERB_NAMES):
                todo += operations.jax_ep_operations(
                    point, self.mesh, data, moved, room=room, **sizes
                )
            kind = "baselines"
            if with_baselines and self.wants_any(_BASELINE_NAMES):
                todo += operations.baseline_operations(point, self.mesh, data, moved, **sizes)
        except _MEASUREMENT_ERRORS as error:
            emit(report.failed_row(kind, kind == "baselines", point, moved, error))
        for operation in todo:
            if not self.wanted(operation.name):
                continue
            refused = self.unsupported.get(operation.name)
            if refused is not None:  # it has been told
                rows.append(
                    report.failed_row(operation.name, operation.baseline, point, moved, refused)
                )
                continue
            try:
                emit(self._measure(operation, point, moved))
            except _MEASUREMENT_ERRORS as error:
                if str(error).startswith(_UNSUPPORTED):
                    self.unsupported[operation.name] = error
                emit(report.failed_row(operation.name, operation.baseline, point, moved, error))
        if network:
            print(report.network_line(point, network))
        return rows

    def _network(self, point: Point, ids: Any) -> report.Row:
        """What a network carries for these ids, as fields of rows; none on one node."""
        size = nodes.chosen() or self.mesh.size
        if size >= self.mesh.size:
            return {}
        counted = traffic.measure_node_traffic(ids, self.args.experts, size)
        num_bytes = counted.rows * point.wire_row_bytes
        return {"nodes_per_token": counted.nodes_per_token, "network_bytes": num_bytes}

    def show_timeline(self, point: Point, title: str) -> None:
        """Runs one operation, and tells and draws when each block of its kernels did what."""
        args = self.args
        ids = traffic.expert_ids(point, self.mesh.size, args.experts, args.seed, args.zipf_exponent)
        room = traffic.room(point, ids, args.experts, args.alignment)
        moved = traffic.measure_traffic(ids, args.experts, room, args.alignment)
        todo = operations.jax_ep_operations(
            point,
            self.mesh,
            operations.make_data(point, self.mesh, ids, moved.layout.capacity, args.seed),
            moved,
            num_experts=args.experts,
            room=room,
            alignment=args.alignment,
        )
        names = args.only or [_TIMELINE_OPERATION]
        chosen = [operation for operation in todo if operation.name in names]
        if len(chosen) != 1:
            available = ", ".join(operation.name for operation in todo)
            raise ValueError(f"--timeline shows one operation: --only one of {available}")
        marks = timeline.run(chosen[0], self.mesh, _native.cuda)
        print("\n".join(timeline.summary(marks)))
        title = f"{title}\n{chosen[0].name}, T={point.tokens}, {_describe(point)}"
        timeline.plot(args.timeline, marks, title)

    def wants_any(self, names: Sequence[str]) -> bool:
        return any(self.wanted(name) for name in names)

    def _measure(self, operation: operations.Operation, point: Point, moved: Traffic) -> report.Row:
        args = self.args
        host_copy = None
        if self.on_gpu:
            bound = 0.0
            if self.link is not None:
                bound = self.link.bound(operation.movements, point.num_sms, point.row_bytes)
            calls = args.calls or measure.chain_length(bound)
            timing = measure.time_chained_calls(
                operation.fn,
                self.mesh,
                operation.args,
                fresh=operation.fresh,
                repeats=args.repeats,
                calls=calls,
            )
        else:
            copied = self.mesh.size * moved.layout.capacity * point.row_bytes
            host_copy = measure.HostCopy(copied)
            timing = measure.time_whole_calls(
                operation.fn, self.mesh, operation.args, repeats=args.repeats, between=host_copy
            )
        row = report.result_row(operation, point, moved, timing, self.link, host_copy)
        if self.path:
            single = measure.time_single_calls(
                operation.fn,
                self.mesh,
                operation.args,
                fresh=operation.fresh,
                repeats=args.repeats,
                calls=args.calls or _SINGLE_CALLS["gpu" if self.on_gpu else "cpu"],
            )
            row |= decode.fields(self.path, single)
        return row


_VERB_NAMES = (
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
_BASELINE_NAMES = ("all_to_all", "all_to_all+gather", "all_gather+gather", operations.RAGGED)


def _check_only(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if a word of ``--only`` would choose nothing."""
    names = decode.OPERATIONS if args.decode else (*_VERB_NAMES, *_BASELINE_NAMES)
    for text in args.only or ():
        if not any(text in name for name in names):
            parser.error(f"--only {text}: no operation has that in its name: {', '.join(names)}")


def _describe(point: Point) -> str:
    fields = dataclasses.asdict(point)
    del fields["tokens"]
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _second_process(args: argparse.Namespace) -> list[report.Row]:
    """ragged_all_to_all with XLA's device kernel: flags are read once a process."""
    command = [sys.executable, "-m", "jax_ep.bench", "--no-second-process"]
    command += ["--only", operations.RAGGED, "--tokens", *map(str, args.tokens)]
    for name in ("hidden", "top_k", "routing", "capacity", "dtype"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name)[0])]
    for name in ("ranks", "experts", "alignment", "repeats", "seed", "zipf_exponent"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--fp8", "none"] + (["--platform", args.platform] if args.platform else [])
    if args.calls:
        command += ["--calls", str(args.calls)]
    environment = dict(os.environ)
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {_DEVICE_KERNEL_FLAG}".strip()
    # This process keeps its pool meanwhile.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        try:
            finished = subprocess.run(
                [*command, "--json", str(results)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_CHILD_TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"second process: no end within {_CHILD_TIMEOUT} s", flush=True)
            return []
        if not results.exists():
            lines = (finished.stderr.strip() or finished.stdout.strip()).splitlines()
            reason = lines[-1] if lines else "no message"
            print(f"second process: exit code {finished.returncode}: {reason}", flush=True)
            return []
        rows: list[report.Row] = json.loads(results.read_text())["results"]
    for row in rows:
        row["operation"] += " (device kernel)"
        row["xla_flags"] = _DEVICE_KERNEL_FLAG
        print(report.format_row(row), flush=True)
    return rows


def _measure_link(mesh: Mesh, num_sms: Sequence[int]) -> Link | None:
    """The limits of GPUs, printed; None on CPU, or with the reason printed."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "cpu":
        return None
    if _native.probe is None:
        print("W, B: n/a: this installation of jax_ep has no CUDA part (python -m jax_ep.doctor)")
        return None
    link = measure_link(_native.probe, [d.local_hardware_id for d in devices])
    for line in link.lines(num_sms):
        print(line)
    return link


def main(argv: Sequence[str] | None = None) -> list[report.Row]:
    """Runs the benchmark and prints a table.

    Args:
        argv: the command line; None for this process's.

    Returns:
        One object per operation and point, as in the JSON file: ``median_s``, ``p10_s`` and
        ``p90_s`` in seconds, ``bound_s`` (None without one) and ``ratio`` to it, bytes and bytes
        per second; or ``error`` where it could not be measured.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _check_only(parser, args)
    if args.decode and (args.plot or args.timeline):
        parser.error("--decode: it has no --plot and no --timeline")
    if (args.plot or args.timeline) and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot and --timeline need matplotlib: pip install matplotlib")
    if args.timeline and not timeline.is_built(_native.cuda):
        parser.error(
            "--timeline: the kernels of this installation note nothing; in jax_ep's source "
            f"directory run {timeline.BUILD_COMMAND}"
        )
    if args.timeline and args.tokens is None:
        args.tokens = [_TIMELINE_TOKENS]
    _set_up_virtual_devices(args.ranks or 8)
    try:
        devices = jax.local_devices(backend=args.platform)
    except RuntimeError as error:
        parser.error(f"--platform {args.platform}: {error}")
    platform = "cpu" if devices[0].platform == "cpu" else "gpu"
    if args.timeline and platform == "cpu":
        parser.error("--timeline: it is the GPU's kernels that note what they do")
    defaults = _DEFAULTS[platform]
    for name, value in (decode.defaults(defaults) if args.decode else defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.ranks = args.ranks or len(devices)
    if args.ranks > len(devices):
        parser.error(f"--ranks {args.ranks}: this process has {len(devices)} devices")
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
    if args.ranks_per_node and args.ranks % args.ranks_per_node:
        parser.error(f"--ranks-per-node {args.ranks_per_node}: must divide the {args.ranks} ranks")
    mesh = jax.make_mesh((args.ranks,), (operations.AXIS,), devices=devices[: args.ranks])

    of_path: dict[str, int | None] = {"": args.slot_bytes}
    if args.decode:
        of_path = decode.paths(platform == "gpu", args.slot_bytes)
        args.slot_bytes = next(iter(of_path.values()))
    set_up = functools.partial(
        jax_ep.initialize, staging_bytes=args.staging_bytes, ranks_per_node=args.ranks_per_node
    )
    set_up(slot_bytes=args.slot_bytes)
    environment = _environment(mesh)
    settings = {name: _plain(value) for name, value in vars(args).items()}
    for name, value in environment.items():
        print(f"{name}: {value}")
    print(f"settings: {settings}")
    title = f"{environment['ranks']} x {environment['device']}, jax {environment['jax']}"
    if args.timeline:
        _Bench(args, mesh, None).show_timeline(points(args)[0], title)
        return []
    link_sms = args.num_sms or _LINK_SMS
    link = _measure_link(mesh, link_sms)

    print("\n" + report.legend(platform == "gpu"))
    bench = _Bench(args, mesh, link)
    all_points = points(args)

    def save() -> None:
        if args.json:
            limits = None if link is None else link.as_json(link_sms)
            report.write_json(args.json, environment, settings, limits, bench.rows)

    previous = None
    for number, (bench.path, slot_bytes) in enumerate(of_path.items()):
        if number > 0:
            jax_ep.finalize()
            set_up(slot_bytes=slot_bytes)
        for point in all_points:
            description = f"{bench.path}: {_describe(point)}" if bench.path else _describe(point)
            if description != previous:
                print(f"\n{description}\n{report.HEADER}")
                previous = description
            # Baselines know neither fp8 nor num_sms: once for the others' values is enough.
            plain = point.fp8 == "none" and point.num_sms == all_points[0].num_sms
            bench.rows += bench.measure_point(point, with_baselines=plain)
            save()
    if args.decode:
        print("\n" + decode.legend(of_path))
        for description in dict.fromkeys(map(_describe, all_points)):
            of_points = [p for p in all_points if _describe(p) == description]
            print(f"\n{description}")
            print("\n".join(decode.table(of_points, bench.rows)))
    if platform == "gpu" and not args.no_second_process and bench.wanted(operations.RAGGED):
        print(f"\n{_describe(all_points[0])}, in a second process with {_DEVICE_KERNEL_FLAG}")
        bench.rows += _second_process(args)
        save()
    if args.plot:
        report.plot(args.plot, bench.rows, title)
    return bench.rows


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
