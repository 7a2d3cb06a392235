"""The command: what is measured, in which order, and what is printed. See options.py."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

import jax_ep
from jax_ep import _native, doctor, nodes, runtime
from jax_ep.bench import decode, measure, operations, options, overlap, report, timeline, traffic
from jax_ep.bench.link import Link, measure_link
from jax_ep.bench.processes import Processes
from jax_ep.bench.traffic import Point, Traffic, point_fields

_Result = TypeVar("_Result")

_DEVICE_KERNEL_FLAG = "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel=true"
_CHILD_TIMEOUT = 900  # seconds
_LINK_SMS = (8, 16, 24, 32)  # SM counts that W is measured on without --num-sms
_SINGLE_CALLS = {"cpu": 10, "gpu": 100}  # programs of one call in a burst, unless told
_TIMELINE_OPERATION = "make_layout+dispatch+combine"  # unless told

# Out of memory, refused by XLA, not built here: the other points are still worth measuring.
_MEASUREMENT_ERRORS = (RuntimeError, MemoryError, ValueError)
_UNSUPPORTED = "UNIMPLEMENTED"  # how XLA's error begins for what its backend has not got, at any T

_OF_PROCESS = ("process_id", "json", "plot")  # options that processes may have of their own
_PRINTED_VARIABLES = ("XLA_", "NCCL_", "NVSHMEM_", "JAX_", "CUDA_VISIBLE", "NPROC")


def _set_up_virtual_devices(num_devices: int) -> None:
    """For CPU, before JAX creates its client: so many virtual devices, and threads for them."""
    flag = "--xla_force_host_platform_device_count"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={num_devices}".strip()
    # What jaxlib 0.10.2 needs for programs that are in flight together.
    os.environ.setdefault("NPROC", str(2 * num_devices))


def _environment(mesh: Mesh, num_processes: int) -> dict[str, Any]:
    """What the figures depend on, as this process sees it."""
    import jaxlib.version

    device = mesh.local_devices[0]
    drivers = {gpu.driver for gpu in doctor.driver_gpus()}
    return {
        "jax_ep": jax_ep.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "platform": " ".join(device.client.platform_version.split()),
        "driver": ", ".join(sorted(filter(None, drivers))) or None,
        "device": device.device_kind,
        "ranks": mesh.size,
        "processes": num_processes,
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

    def __init__(
        self,
        args: argparse.Namespace,
        mesh: Mesh,
        link: Link | None,
        processes: Processes | None = None,
    ) -> None:
        self.args = args
        self.mesh = mesh
        self.link = link
        self.processes = processes or Processes()
        self.on_gpu = mesh.devices.flat[0].platform != "cpu"
        self.rows: list[report.Row] = []
        self.path = ""  # one of decode's, or none
        self.unsupported: dict[str, Exception] = {}  # by operation: what XLA says

    def wanted(self, name: str) -> bool:
        only = self.args.only
        if self.args.decode and name not in decode.OPERATIONS:
            return False
        return not only or any(options.chooses(text, name) for text in only)

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
            data = self._together(
                lambda: operations.make_data(
                    point, self.mesh, ids, moved.layout.capacity, args.seed
                )
            )
            if self.wants_any(options.VERB_NAMES):
                todo += self._together(
                    lambda: operations.jax_ep_operations(
                        point, self.mesh, data, moved, room=room, **sizes
                    )
                )
            kind = "baselines"
            if with_baselines and self.wants_any(options.BASELINE_NAMES):
                todo += self._together(
                    lambda: operations.baseline_operations(point, self.mesh, data, moved, **sizes)
                )
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
                measure_one = functools.partial(self._measure, operation, point, moved)
                emit(self._together(measure_one))
            except _MEASUREMENT_ERRORS as error:
                # What one process sees, another only hears of.
                if any(self.processes.exchange(str(error).startswith(_UNSUPPORTED))):
                    self.unsupported[operation.name] = error
                emit(report.failed_row(operation.name, operation.baseline, point, moved, error))
        if network:
            print(report.network_line(point, network))
        return rows

    def _together(self, work: Callable[[], _Result]) -> _Result:
        return self.processes.together(work, _MEASUREMENT_ERRORS)

    def _network(self, point: Point, ids: Any) -> report.Row:
        """What a network carries for these ids, as fields of rows; none on one node."""
        size = nodes.of_mesh(self.mesh, (operations.AXIS,), self.mesh.size, "jax_ep.bench")
        if size == self.mesh.size:
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
            calls = args.calls or self.processes.least(measure.chain_length(bound))
            timing = measure.time_chained_calls(
                operation.fn,
                self.mesh,
                operation.args,
                fresh=operation.fresh,
                repeats=args.repeats,
                calls=calls,
                processes=self.processes,
            )
        else:
            copied = len(self.mesh.local_devices) * moved.layout.capacity * point.row_bytes
            host_copy = measure.HostCopy(copied)
            timing = measure.time_whole_calls(
                operation.fn,
                self.mesh,
                operation.args,
                repeats=args.repeats,
                between=host_copy,
                processes=self.processes,
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
                processes=self.processes,
            )
            row |= decode.fields(self.path, single)
        return row


def _describe(point: Point) -> str:
    fields = dataclasses.asdict(point)
    del fields["tokens"]
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _measure_overlap(args: argparse.Namespace, mesh: Mesh) -> Iterator[report.Row]:
    """Times the programs of every point, its SMs left out; prints each as it comes."""
    print("\n" + overlap.legend(args.layers))
    all_points = (dataclasses.replace(point, num_sms=None) for point in options.points(args))
    for point in dict.fromkeys(all_points):
        seeds = range(args.seed, args.seed + overlap.NUM_MICRO_BATCHES)
        ids = [
            traffic.expert_ids(point, mesh.size, args.experts, seed, args.zipf_exponent)
            for seed in seeds
        ]
        capacities = [
            traffic.measure_traffic(
                of_one,
                args.experts,
                traffic.room(point, of_one, args.experts, args.alignment),
                args.alignment,
            ).layout.capacity
            for of_one in ids
        ]
        print(f"\nT={point.tokens}, {_describe(point)}\n{overlap.HEADER}")
        programs = None
        for variant in overlap.variants(args.num_sms):
            row = {"operation": variant.name, "baseline": False} | point_fields(point)
            try:
                programs = programs or overlap.Layers(
                    point,
                    mesh,
                    ids,
                    num_experts=args.experts,
                    capacity=max(capacities),
                    expert_hidden=args.expert_hidden,
                    num_layers=args.layers,
                    seed=args.seed,
                )
                row |= programs.time(variant, args.repeats)
            except _MEASUREMENT_ERRORS as error:
                row["error"] = (str(error).splitlines() or [type(error).__name__])[0]
            print(overlap.format_row(row), flush=True)
            yield row


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
    devices = mesh.local_devices
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
    """Runs the benchmark and prints a table; in a job of several processes, process 0 does.

    Args:
        argv: the command line; None for this process's.

    Returns:
        One object per operation and point, as in the JSON file: ``median_s``, ``p10_s`` and
        ``p90_s`` in seconds, ``bound_s`` (None without one) and ``ratio`` to it, bytes and bytes
        per second; or ``error`` where it could not be measured.
    """
    parser = options.make_parser()
    args = parser.parse_args(argv)
    options.check(parser, args)
    if args.distributed:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    processes = Processes()
    devices = processes.together(lambda: _devices(parser, args, processes), ())
    try:
        processes.require_alike(
            {name: _plain(value) for name, value in vars(args).items() if name not in _OF_PROCESS}
        )
    except ValueError as error:
        parser.error(str(error))
    with contextlib.ExitStack() as stack:
        if processes.number > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            args.json = args.plot = None
        return _run(args, devices, processes)


def _devices(
    parser: argparse.ArgumentParser, args: argparse.Namespace, processes: Processes
) -> list[jax.Device]:
    """The ranks' devices; fills in what the command line leaves to the platform."""
    _set_up_virtual_devices(-(-(args.ranks or 8) // processes.count))
    try:
        devices = jax.devices(args.platform)
    except RuntimeError as error:
        parser.error(f"--platform {args.platform}: {error}")
    platform = "cpu" if devices[0].platform == "cpu" else "gpu"
    options.complete(parser, args, platform, len(devices), processes.count)
    return devices[: args.ranks]


@dataclasses.dataclass(frozen=True)
class _SetUp:
    """What ``jax_ep.initialize`` is told before points are measured.

    Attributes:
        path: of a table for decoding; else none.
        slot_bytes: for it.
        ranks_per_node: likewise.
    """

    path: str
    slot_bytes: int | None
    ranks_per_node: int | None

    def describe(self, point: Point) -> str:
        """The point's sizes, and what differs between set-ups."""
        size = self.ranks_per_node
        words = [self.path, "" if size is None else f"{size} ranks a node", _describe(point)]
        return ": ".join(filter(None, words))

    def initialize(self, staging_bytes: int, num_ranks: int, spans_gpus: bool) -> None:
        """Collective. Between GPUs of one host there is a network only where it is demanded."""
        demanded = spans_gpus and (self.ranks_per_node or num_ranks) < num_ranks
        jax_ep.initialize(
            staging_bytes=staging_bytes,
            slot_bytes=self.slot_bytes,
            ranks_per_node=self.ranks_per_node,
            network=demanded or None,
        )


def _run(
    args: argparse.Namespace, devices: Sequence[jax.Device], processes: Processes
) -> list[report.Row]:
    on_gpu = devices[0].platform != "cpu"
    mesh = jax.make_mesh((args.ranks,), (operations.AXIS,), devices=devices)
    of_path: dict[str, int | None] = {"": args.slot_bytes}
    if args.decode:
        of_path = decode.paths(on_gpu, args.slot_bytes)
        args.slot_bytes = next(iter(of_path.values()))
    set_ups = [
        _SetUp(path, slot_bytes, size)
        for size in args.ranks_per_node
        for path, slot_bytes in of_path.items()
    ]
    spans_gpus = on_gpu and processes.count > 1
    set_ups[0].initialize(args.staging_bytes, args.ranks, spans_gpus)
    environment = _environment(mesh, processes.count)
    settings = {name: _plain(value) for name, value in vars(args).items()}
    for name, value in environment.items():
        print(f"{name}: {value}")
    print(f"settings: {settings}")
    title = f"{environment['ranks']} x {environment['device']}, jax {environment['jax']}"
    if args.timeline:
        _Bench(args, mesh, None).show_timeline(options.points(args)[0], title)
        return []
    if args.overlap:
        rows: list[report.Row] = []
        for row in _measure_overlap(args, mesh):
            rows.append(row)
            if args.json:
                report.write_json(args.json, environment, settings, None, rows)
        return rows
    link_sms = args.num_sms or _LINK_SMS
    link = processes.together(lambda: _measure_link(mesh, link_sms), ())

    print("\n" + report.legend(on_gpu))
    bench = _Bench(args, mesh, link, processes)
    all_points = options.points(args)

    def save() -> None:
        if args.json:
            limits = None if link is None else link.as_json(link_sms)
            report.write_json(args.json, environment, settings, limits, bench.rows)

    previous = None
    for number, set_up in enumerate(set_ups):
        if number > 0:
            jax_ep.finalize()
            set_up.initialize(args.staging_bytes, args.ranks, spans_gpus)
        bench.path = set_up.path
        for point in all_points:
            description = set_up.describe(point)
            if description != previous:
                print(f"\n{description}\n{report.HEADER}")
                previous = description
            # Baselines know neither fp8 nor num_sms nor nodes: once is enough.
            plain = point.fp8 == "none" and point.num_sms == all_points[0].num_sms
            plain = plain and set_up.ranks_per_node == args.ranks_per_node[0]
            of_set_up = {"ranks_per_node": set_up.ranks_per_node}
            bench.rows += [
                of_set_up | row for row in bench.measure_point(point, with_baselines=plain)
            ]
            save()
    if args.decode:
        print("\n" + decode.legend(of_path))
        for description in dict.fromkeys(map(_describe, all_points)):
            of_points = [p for p in all_points if _describe(p) == description]
            print(f"\n{description}")
            print("\n".join(decode.table(of_points, bench.rows)))
    is_alone = processes.count == 1 and not args.no_second_process
    if on_gpu and is_alone and bench.wanted(operations.RAGGED):
        print(f"\n{_describe(all_points[0])}, in a second process with {_DEVICE_KERNEL_FLAG}")
        bench.rows += _second_process(args)
        save()
    if args.plot:
        of_first = [r for r in bench.rows if r["ranks_per_node"] == args.ranks_per_node[0]]
        report.plot(args.plot, of_first, title)
    return bench.rows


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
