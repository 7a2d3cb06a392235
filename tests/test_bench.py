"""The benchmark: what it counts, that its baselines compute what dispatch does, how it times."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_point import POINT, RANKS, FakeProbe
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_ep
from jax_ep.bench import cli, decode, link, measure, operations, options, overlap, report, traffic
from jax_ep.bench.traffic import Movement

EXPERTS, ALIGNMENT = 8, 4

VERBS = [
    "make_layout",
    "dispatch",
    operations.NOT_EXPANDED[0],
    "make_layout+dispatch",
    "layout_and_dispatch",
    "combine",
    "round trip",
    operations.NOT_EXPANDED[1],
    "make_layout+dispatch+combine",
    "forward+backward",
]


@pytest.fixture(scope="module")
def mesh() -> Any:
    return jax.make_mesh((RANKS,), ("ep",), devices=jax.devices("cpu")[:RANKS])


@dataclasses.dataclass(frozen=True)
class Prepared:
    traffic: traffic.Traffic
    data: operations.Data
    operations: dict[str, operations.Operation]


@pytest.fixture(scope="module")
def prepared(mesh: Any) -> Prepared:
    ids = traffic.expert_ids(POINT, RANKS, EXPERTS, seed=3, zipf_exponent=1.0)
    room = traffic.room(POINT, ids, EXPERTS, ALIGNMENT)
    moved = traffic.measure_traffic(ids, EXPERTS, room, ALIGNMENT)
    data = operations.make_data(POINT, mesh, ids, moved.layout.capacity, seed=0)
    sizes = {"num_experts": EXPERTS, "alignment": ALIGNMENT}
    todo = operations.jax_ep_operations(POINT, mesh, data, moved, room=room, **sizes)
    todo += operations.baseline_operations(POINT, mesh, data, moved, **sizes)
    return Prepared(moved, data, {o.name: o for o in todo})


def _run(mesh: Any, operation: operations.Operation) -> Any:
    mapped = jax.shard_map(operation.fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    return jax.jit(mapped)(*operation.args)


# What is timed ------------------------------------------------------------------------------------


def test_baselines_compute_what_dispatch_does(mesh: Any, prepared: Prepared) -> None:
    """Else they would be compared with something that users do not need."""
    expected = np.asarray(_run(mesh, prepared.operations["dispatch"])[0])
    assert np.any(expected)
    for name in ("all_to_all+gather", "all_gather+gather"):
        result = np.asarray(_run(mesh, prepared.operations[name]))
        np.testing.assert_array_equal(result.view(np.uint16), expected.view(np.uint16), name)


def test_ragged_baseline_computes_what_dispatch_does(
    mesh: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA has no ragged_all_to_all for CPU, so its definition stands in for it here."""

    def ragged_all_to_all(
        operand: jax.Array,
        output: jax.Array,
        input_offsets: jax.Array,
        send_sizes: jax.Array,
        output_offsets: jax.Array,
        recv_sizes: jax.Array,
        *,
        axis_name: str,
    ) -> jax.Array:
        rank = lax.axis_index(axis_name)
        everything = [
            lax.all_gather(a, axis_name)
            for a in (operand, input_offsets, send_sizes, output_offsets)
        ]
        segments = send_sizes.shape[0] // RANKS
        place = jnp.arange(operand.shape[0])
        for source in range(RANKS):
            rows, begins, sizes, ends_at = (a[source] for a in everything)
            for i in range(segments):
                at = rank * segments + i
                inside = (place >= begins[at]) & (place < begins[at] + sizes[at])
                target = jnp.where(inside, place - begins[at] + ends_at[at], output.shape[0])
                output = output.at[target].set(rows, mode="drop")
        expected = jnp.stack(
            [
                lax.dynamic_slice_in_dim(everything[2][s], rank * segments, segments)
                for s in range(RANKS)
            ]
        )
        # Rows that do not match what the receiver announced would be lost: poison the result.
        agree = jnp.all(expected.reshape(-1) == recv_sizes)
        return jnp.where(agree, output, jnp.nan)

    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    result = np.asarray(_run(mesh, prepared.operations[operations.RAGGED]))
    expected = np.asarray(_run(mesh, prepared.operations["dispatch"])[0])
    np.testing.assert_array_equal(result.view(np.uint16), expected.view(np.uint16))


def test_forward_backward_returns_result_and_both_gradients(mesh: Any, prepared: Prepared) -> None:
    """What the loss does not use, the compiler would drop: on CPU four calls are all of it."""
    operation = prepared.operations["forward+backward"]
    program = measure.compile_calls(operation.fn, mesh, operation.args, 1)
    assert measure.count_calls(program) == 4
    (results,) = program.compiled(*program.args)
    shapes = [(RANKS * 6, 64), (RANKS * 6, 64), (RANKS * 6, 3)]
    assert [r.shape for r in results] == shapes


@pytest.mark.parametrize("name", [*VERBS, "all_to_all+gather", "all_gather+gather"])
def test_a_chain_keeps_all_its_calls(name: str, mesh: Any, prepared: Prepared) -> None:
    operation = prepared.operations[name]
    single = measure.compile_calls(operation.fn, mesh, operation.args, 1)
    many = measure.compile_calls(
        operation.fn, mesh, operation.args, 3, operation.fresh, returns_results=False
    )
    assert measure.count_calls(single) > 0
    assert measure.count_calls(many) == 3 * measure.count_calls(single)
    measure.require_all_calls(single, many, 3)
    results = jax.tree.leaves(single.compiled(*single.args))
    assert single.call_bytes == many.call_bytes == sum(a.nbytes for a in results) // RANKS
    # One array leaves the long program, however many there are: what it costs is not the calls'.
    numbers = np.asarray(many.compiled(*many.args)).reshape(RANKS, 3, len(results))
    for i, array in enumerate(results):
        first = np.asarray(array).reshape(RANKS, -1)[:, :1].astype(np.float32)
        np.testing.assert_array_equal(numbers[:, :, i], np.broadcast_to(first, (RANKS, 3)))


def test_merged_calls_are_noticed(mesh: Any, prepared: Prepared) -> None:
    """Of equal operands the compiler makes one call, and a time would be too good."""
    operation = prepared.operations["dispatch"]
    single = measure.compile_calls(operation.fn, mesh, operation.args, 1)
    merged = measure.compile_calls(
        lambda *args: [operation.fn(*args) for _ in range(3)], mesh, operation.args, 1
    )
    with pytest.raises(RuntimeError, match="merged or dropped calls: 1 are left of 3"):
        measure.require_all_calls(single, merged, 3)


def _fake_clock(start: float, per_call: float, calls: int) -> Callable[..., float]:
    turns = iter(range(10**6))

    def seconds(call: Callable[[], Any]) -> float:
        turn = next(turns)
        call()
        # A repeat times bursts of the short program, then of the long one with twice its calls; the
        # machine gets slower.
        once = start + per_call * calls * (1 + turn % 2)
        return measure.BURST * once + 1e-3 * (turn // 2)

    return seconds


def test_a_call_takes_the_difference_over_the_calls(
    mesh: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = prepared.operations["dispatch"]
    monkeypatch.setattr(measure, "_seconds", _fake_clock(1e-4, 7e-6, calls=4))
    timing = measure.time_chained_calls(
        operation.fn, mesh, operation.args, fresh=2, repeats=5, calls=4
    )
    assert timing.seconds == pytest.approx([7e-6] * 5)
    assert timing.calls == 4
    assert timing.output_bytes >= prepared.traffic.layout.capacity * POINT.row_bytes


def test_calls_are_fewer_where_results_do_not_fit(
    mesh: Any, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = prepared.operations["all_gather+gather"]
    single = measure.compile_calls(operation.fn, mesh, operation.args, 1, returns_results=False)
    output, temp = measure._memory_of_call(single)
    # Of N calls more: results of 2 N in the long program, copies of 3 N - 2 in both.
    of_both = 2 * output + 3 * POINT.tokens * POINT.row_bytes
    monkeypatch.setattr(measure, "_free_bytes", lambda mesh: (2.5 * of_both + temp) / 0.9)
    timing = measure.time_chained_calls(
        operation.fn, mesh, operation.args, fresh=0, repeats=1, calls=9
    )
    assert timing.calls == 2
    monkeypatch.setattr(measure, "_free_bytes", lambda mesh: (0.9 * of_both + temp) / 0.9)
    with pytest.raises(MemoryError, match="two calls need"):
        measure.time_chained_calls(operation.fn, mesh, operation.args, fresh=0, repeats=1, calls=9)


def test_chain_length() -> None:
    assert measure.chain_length(0.0) == 40
    assert measure.chain_length(100e-6) == 10
    assert measure.chain_length(1.0) == 5


# The command --------------------------------------------------------------------------------------


def _main(arguments: str) -> list[report.Row]:
    return cli.main(["--platform", "cpu", *arguments.split()])


def test_points_vary_one_thing_at_a_time() -> None:
    arguments = (
        "--tokens 1 2 --hidden 8 16 --top-k 1 --routing uniform zipf --capacity tight --fp8 none"
    )
    args = options.make_parser().parse_args(arguments.split())
    found = [(p.tokens, p.hidden, p.routing) for p in options.points(args)]
    base = [(1, 8, "uniform"), (2, 8, "uniform")]
    assert found[:2] == base
    assert found[2:] == [(1, 16, "uniform"), (2, 16, "uniform"), (1, 8, "zipf"), (2, 8, "zipf")]
    args.product = True
    assert len(set(options.points(args))) == 8


def test_run_on_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every operation has a time, and a bound where it moves rows; JSON and plot are written."""
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    rows = _main(
        "--ranks 4 --tokens 2 5 --hidden 128 --top-k 2 --experts 8 --fp8 none float32 --repeats 3 "
        f"--json {file} --plot {picture}"
    )
    text = capsys.readouterr().out
    assert "'ranks': 4" in text
    assert "XLA_FLAGS" in text
    assert "times in us (microseconds) of the slowest rank" in text
    assert "copying the rows takes" in text
    # XLA has none for CPU, whatever the number of tokens: it is told once.
    assert text.count(f"\n{operations.RAGGED}") == 1
    written = json.loads(file.read_text())
    assert written["results"] == json.loads(json.dumps(rows))
    assert written["environment"]["jax"] == jax.__version__
    base = [row for row in rows if row["tokens"] == 5 and row["fp8"] == "none"]
    baselines = ["all_to_all", "all_to_all+gather", "all_gather+gather", operations.RAGGED]
    assert [row["operation"] for row in base] == VERBS + baselines
    assert [r["operation"] for r in rows if r["tokens"] == 5 and r["fp8"] == "float32"] == [
        "dispatch",
        operations.NOT_EXPANDED[0],
        "make_layout+dispatch",
        "layout_and_dispatch",
        "round trip",
    ]
    for row in rows:
        if row["operation"] == operations.RAGGED:  # XLA has none for CPU
            assert "not supported" in row["error"]
            continue
        assert row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["median_s"] > 0
        assert (row["bound_s"] is None) == (row["operation"] == "make_layout")
        if row["bound_s"]:
            assert row["ratio"] == pytest.approx(row["median_s"] / row["bound_s"])
            assert row["wire_bytes"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_decoding_in_slots_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both paths as on a GPU, each set up anew; on CPU either is the general one."""
    set_up: list[Any] = []
    finalize, initialize = jax_ep.finalize, jax_ep.initialize

    def initialized(**options: Any) -> None:
        set_up.append(options["slot_bytes"])
        initialize(**options)

    def finalized() -> None:
        set_up.append("finalize")
        finalize()

    monkeypatch.setattr(jax_ep, "initialize", initialized)
    monkeypatch.setattr(jax_ep, "finalize", finalized)
    of_gpu = functools.partial(decode.paths, True)
    monkeypatch.setattr(decode, "paths", lambda on_gpu, slot_bytes: of_gpu(slot_bytes))
    rows = _main(
        "--decode --ranks 2 --tokens 3 --hidden 64 --top-k 1 --experts 2 --repeats 2 --calls 2 "
        f"--only trip --json {tmp_path / 'bench.json'}"
    )
    assert set_up == [64 << 20, "finalize", 0]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["settings"]["slot_bytes"] == 64 << 20
    assert len(written["results"]) == len(rows)
    # Without fp8 and with it, which are in two tables.
    assert [(row["path"], row["fp8"]) for row in rows] == [
        (path, fp8) for path in ("slots", "general") for fp8 in ("none", "float32")
    ]
    for row in rows:
        assert row["operation"] == "round trip"
        assert row["single_calls"] == 2
        assert 0 < row["single_p10_s"] <= row["single_median_s"] <= row["single_p90_s"]
    text = capsys.readouterr().out
    assert "slots: with 64 MiB of them on each device; general: set up without slots" in text
    tables = text[text.index("slots: with 64") :].split("operation ")[1:]
    for of_table, fp8 in zip(tables, ("none", "float32"), strict=True):
        cells = [
            f"{row[kind + 'median_s'] * 1e6:.1f} [{row[kind + 'p10_s'] * 1e6:.1f} - "
            f"{row[kind + 'p90_s'] * 1e6:.1f}]"
            for row in rows
            if row["fp8"] == fp8
            for kind in ("", "single_")
        ]
        line = of_table.splitlines()[1]
        assert line.split() == ["round", "trip", "3", *" ".join(cells).split(), "-"]


def test_overlap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs with calls on given SMs beside those without; wrong results are no times."""
    arguments = "--overlap --ranks 2 --tokens 8 --hidden 128 --expert-hidden 64 --num-sms 8 16 "
    arguments += f"--layers 2 --repeats 2 --json {tmp_path / 'bench.json'}"
    make_layout, made = jax_ep.make_layout, []

    def noted(ids: Any, **options: Any) -> Any:
        made.append((options["num_sms"], options["overlap"]))
        return make_layout(ids, **options)

    monkeypatch.setattr(jax_ep, "make_layout", noted)
    rows = _main(arguments)
    on_sms = [(None, False)] * 2 + [(8, False), (16, False), (8, True), (16, True)]
    assert made == [of_program for of_program in on_sms for _ in range(4)]
    assert [row["operation"] for row in rows] == [v.name for v in overlap.variants([8, 16])]
    assert rows[0]["of_plain"] == 1
    assert all(0 < row["p10_s"] <= row["median_s"] <= row["p90_s"] for row in rows)
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == len(rows)

    combine = jax_ep.combine
    monkeypatch.setattr(
        jax_ep, "combine", lambda y, layout: combine(y * (1 + layout.overlap), layout)
    )
    rows = _main(arguments)
    assert not any(row["baseline"] for row in rows)  # which the command asks of each
    errors = [row.get("error") for row in rows]
    assert errors == [None] * 5 + ["results are not those of the plain program"] * 2
    assert "n/a: results are not those" in capsys.readouterr().out


def test_products_beside_calls() -> None:
    """A call counts if a product, in a fusion or alone, lies between its start and its done."""
    text = """
%products.1 (x: bf16[8,8]) -> bf16[8,8] {
  ROOT %g = (bf16[8,8]{1,0}, s8[32]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
}

%products.2 (x: bf16[8,8]) -> bf16[8,8] {
  ROOT %d = bf16[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {
  %a = (bf16[8,8]) call-start(%x), to_apply=%body.1
  %b = (bf16[8,8]) call-start(%x), to_apply=%body.1
  %a.done = bf16[8,8] call-done(%a)
  %fusion = (bf16[8,8]{1,0}, s8[32]{0}) fusion(%x), kind=kCustom, calls=%products.1
  %b.done = bf16[8,8] call-done(%b)
  %alone = (bf16[8,8]{1,0}, s8[32]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %c = (bf16[8,8]) call-start(%x), to_apply=%body.1
  %d = bf16[8,8]{1,0} fusion(%x), kind=kCustom, calls=%products.2, metadata={}
  %c.done = bf16[8,8] call-done(%c)
}
"""
    assert overlap.beside(text) == (2, 3)


def test_single_calls_are_chained_without_copies(mesh: Any, prepared: Prepared) -> None:
    """What is handed on lies where it lay, and the operands that were given are left alone."""
    operation = prepared.operations["round trip"]
    before = [np.asarray(argument) for argument in operation.args]
    timing = measure.time_single_calls(
        operation.fn, mesh, operation.args, fresh=operation.fresh, repeats=3, calls=2
    )
    assert (timing.calls, timing.extra_copies, len(timing.seconds)) == (2, 0, 3)
    assert timing.output_bytes > 0
    for argument, value in zip(operation.args, before, strict=True):
        np.testing.assert_array_equal(argument, value)


def test_a_point_on_a_gpu(mesh: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The way a GPU is measured, on CPU devices with the limits of a made-up machine."""
    text = "--ranks 4 --experts 8 --alignment 4 --repeats 2 --calls 2 --fp8 none"
    bench = cli._Bench(
        options.make_parser().parse_args(text.split()),
        mesh,
        link.measure_link(FakeProbe(), range(RANKS)),
    )
    bench.on_gpu = True
    rows = bench.measure_point(POINT, with_baselines=True)
    measured = [row for row in rows if "error" not in row]
    assert [r["operation"] for r in measured] == [
        *VERBS,
        "all_to_all",
        "all_to_all+gather",
        "all_gather+gather",
    ]
    for row in measured:
        assert (row["calls"], row["sms"]) == (2, 10)
        if row["operation"] == "make_layout":
            continue
        # All rows move over a link of 100 bytes a second, ten times slower than the memory.
        assert row["bound_s"] >= row["wire_bytes"] / 100
        if row["median_s"] > 0:
            assert row["fraction_of_w"] == pytest.approx(row["wire_bytes_per_s"] / 100)
    assert "forward+backward" in capsys.readouterr().out


def test_second_process_measures_with_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """On CPU XLA cannot run the operation, and that comes back from the other process."""
    text = (
        "--platform cpu --ranks 2 --tokens 2 3 --hidden 64 --top-k 1 --experts 2 --repeats 1 "
        "--routing uniform --capacity tight --fp8 none"
    )
    args = options.make_parser().parse_args(text.split())
    rows = cli._second_process(args)
    printed = capsys.readouterr().out
    if not rows:  # a jaxlib that does not know the flag ends with that
        assert "second process: exit code" in printed
        return
    assert [(r["operation"], r["tokens"]) for r in rows] == [
        (f"{operations.RAGGED} (device kernel)", tokens) for tokens in (2, 3)
    ]
    assert all("not supported" in row["error"] for row in rows)
    assert rows[0]["xla_flags"] == cli._DEVICE_KERNEL_FLAG


def test_a_failing_operation_is_told_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("this combine is broken\nin two lines")

    monkeypatch.setattr(jax_ep, "combine", fail)
    rows = _main(
        "--ranks 2 --tokens 2 --hidden 64 --top-k 1 --experts 2 --repeats 1 --only dispatch combine"
    )
    failed = {row["operation"] for row in rows if "error" in row}
    assert failed == {"combine", "make_layout+dispatch+combine"}
    others = {"dispatch", "make_layout+dispatch", "layout_and_dispatch", *operations.NOT_EXPANDED}
    assert {row["operation"] for row in rows} - failed == others
    assert "n/a: ValueError: this combine is broken" in capsys.readouterr().out


def test_only_chooses_by_a_part_of_the_name_or_all_of_it() -> None:
    chosen = [name for name in options.VERB_NAMES if options.chooses("combine", name)]
    assert chosen == ["combine", "make_layout+dispatch+combine"]
    assert [name for name in options.VERB_NAMES if options.chooses("=combine", name)] == ["combine"]


def test_exit_code_tells_that_an_operation_failed() -> None:
    """A hidden size that fp8 cannot take fails dispatch; the process says so at its end."""
    command = (
        "--ranks 2 --tokens 2 --hidden 72 --top-k 1 --experts 2 --repeats 1 --only dispatch --fp8"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    environment |= {"JAX_PLATFORMS": "cpu"}
    for fp8, code in (("float32", 1), ("none", 0)):
        run = subprocess.run(
            [sys.executable, "-m", "jax_ep.bench", *command.split(), fp8],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert run.returncode == code, run.stdout + run.stderr
        assert ("that is a multiple of 16" in run.stdout) == (code == 1), run.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--capacity loose", "give tight, default, or a factor"),
        ("--capacity expert-default", "expert-tight or expert-FACTOR"),
        ("--ranks 3 --experts 64", "must be a multiple of 3 ranks"),
        ("--ranks 99 --experts 99", "this process has"),
        ("--top-k 9 --experts 8", "must be at most --experts 8"),
        (
            "--only dispatch gather_all",
            "--only gather_all: no operation has that in its name: make",
        ),
        ("--tokens 0", "must be at least 1"),
        ("--routing group-limited --experts 20 --ranks 2", "--experts must be a multiple of 8"),
        ("--routing group-limited --experts 8 --top-k 5", "--top-k must be at most 4"),
        ("--ranks-per-node 3", "--ranks-per-node 3: must divide the 8 ranks"),
        ("--platform nowhere", "invalid choice"),
        ("--decode --only dispatch+", "no operation has that in its name: layout_and_dispatch, "),
        ("--decode --plot a.png", "--decode: it has no --plot"),
        ("--overlap --timeline a.png", "--overlap: it has no --plot and no --timeline"),
        ("--overlap --decode", "--overlap: it has no --decode"),
        ("--overlap --ranks-per-node 4 2", "--overlap: it has no --ranks-per-node"),
        ("--overlap --calls 3", "--overlap: it has no --calls"),
        ("--overlap --capacity expert-tight", "--overlap: experts have neither"),
    ],
)
def test_bad_arguments(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _main(arguments)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("num_sms", [None, 24])
def test_num_sms_reaches_every_call(mesh: Any, prepared: Prepared, num_sms: int | None) -> None:
    """Each operation's calls carry it: operations use the layout that they are given."""
    point = dataclasses.replace(POINT, num_sms=num_sms)
    ids = traffic.expert_ids(point, RANKS, EXPERTS, seed=3, zipf_exponent=1.0)
    todo = operations.jax_ep_operations(
        point,
        mesh,
        prepared.data,
        prepared.traffic,
        num_experts=EXPERTS,
        room=traffic.room(point, ids, EXPERTS, ALIGNMENT),
        alignment=ALIGNMENT,
    )
    for operation in todo:
        sharded = jax.shard_map(operation.fn, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        text = jax.jit(sharded).lower(*operation.args).as_text()
        found = set(re.findall(r"num_sms = (\d+)", text))
        assert found == {str(num_sms or 0)}, operation.name


def test_a_negative_difference_is_shown_as_it_is() -> None:
    """Where jitter exceeds the time, no rate is invented from it."""
    operation = operations.Operation("dispatch", lambda: None, (), (Movement(10, 10, 10),))
    ids = traffic.expert_ids(POINT, RANKS, EXPERTS, 0, 1.0)
    moved = traffic.measure_traffic(ids, EXPERTS, {}, 1)
    timing = measure.Timing((-3e-6, -1e-6, 2e-6), 5, 0, 0)
    row = report.result_row(operation, POINT, moved, timing, None, None)
    assert row["median_s"] == -1e-6
    assert "wire_bytes_per_s" not in row
    assert "-1.0 us" in report.format_row(row)


@pytest.mark.parametrize("wire", [0, 10])
def test_no_bound_without_the_rate_of_the_wire(wire: int) -> None:
    """A process with one GPU knows no W: the memory alone is no bound of what crosses the wire."""
    operation = operations.Operation("dispatch", lambda: None, (), (Movement(wire, 10, 10),))
    ids = traffic.expert_ids(POINT, RANKS, EXPERTS, 0, 1.0)
    moved = traffic.measure_traffic(ids, EXPERTS, {}, 1)
    timing = measure.Timing((1e-6, 2e-6, 3e-6), 5, 0, 0)
    alone = link.measure_link(FakeProbe(), [0])
    assert alone.wire_bytes_per_s is None
    row = report.result_row(operation, POINT, moved, timing, alone, None)
    assert (row["bound_s"] is None) == (wire > 0)
    assert (row["ratio"] is None) == (wire > 0)


def test_plot_has_a_bound_for_each_operation_and_ticks_where_it_was_measured() -> None:
    pytest.importorskip("matplotlib")
    operation_names = ["dispatch", "combine", "all_to_all"]
    point = {
        "hidden": 8,
        "top_k": 1,
        "routing": "uniform",
        "capacity_kind": "tight",
        "dtype": "bfloat16",
        "fp8": "none",
        "num_sms": None,
    }
    rows = [
        point
        | {"operation": name, "baseline": name == "all_to_all", "tokens": tokens}
        | {"median_s": 3e-6 * tokens, "p10_s": 3e-6 * tokens, "p90_s": 3e-6 * tokens}
        | {"bound_s": scale * 1e-6 * tokens}
        for scale, name in enumerate(operation_names, 1)
        for tokens in (1, 48, 3)
    ]
    (axes,) = report.draw(rows, "a machine").axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3", "48"]
    assert list(axes.get_xticks()) == [1, 3, 48]
    lines = {line.get_label(): line for line in axes.get_lines()}
    for scale, name in enumerate(operation_names[:2], 1):
        bound = lines[f"bound of {name}"]
        assert list(bound.get_ydata()) == pytest.approx([scale, 3 * scale, 48 * scale])
        assert bound.get_linestyle() == ":"
    assert not any("bound of all_to_all" in str(label) for label in lines)
    _, labels = axes.get_legend_handles_labels()
    assert labels[-1] == "all_to_all (JAX's own)"
