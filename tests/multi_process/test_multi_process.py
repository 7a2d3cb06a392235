"""Jobs of several processes on this host, on CPU."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from launcher import Finished, run_scenario

_SCENARIOS = pathlib.Path(__file__).with_name("scenarios")

# Processes, devices of each. What a version of JAX may change, two processes show.
SHAPES = [(2, 4), pytest.param(4, 2, marks=pytest.mark.once)]


Job = Callable[..., list[Finished]]


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Job:
    """What runs a scenario: a file of scenarios/, a function of it, and its arguments."""

    def start(file: str, scenario: str, *arguments: str, **options: object) -> list[Finished]:
        path = _SCENARIOS / f"{file}.py"
        return run_scenario(path, scenario, *arguments, out=tmp_path, **options)

    return start


# Results ------------------------------------------------------------------------------------------


def _results(out: pathlib.Path, num_processes: int, num_devices: int) -> dict[str, np.ndarray]:
    out.mkdir()
    run_scenario(
        _SCENARIOS / "results.py",
        "results",
        num_processes=num_processes,
        num_devices=num_devices,
        out=out,
    )
    merged: dict[str, np.ndarray] = {}
    for process in range(num_processes):
        with np.load(out / f"process_{process}.npz") as saved:
            assert not merged.keys() & saved.keys()
            merged |= saved
    return merged


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return _results(tmp_path_factory.mktemp("one") / "out", 1, 8)


@pytest.mark.xdist_group("same bits")  # one process runs it once for both
@pytest.mark.parametrize(("num_processes", "num_devices"), SHAPES)
def test_same_bits_as_one_process(
    tmp_path: pathlib.Path,
    one_process: dict[str, np.ndarray],
    num_processes: int,
    num_devices: int,
) -> None:
    several = _results(tmp_path / "out", num_processes, num_devices)
    assert several.keys() == one_process.keys()
    assert len(several) > 1000  # 6 meshes, 8 devices, each field
    different = [
        key
        for key, value in one_process.items()
        if value.dtype != several[key].dtype or value.tobytes() != several[key].tobytes()
    ]
    assert not different


# Pairing ------------------------------------------------------------------------------------------


def test_independent_calls_pair_rightly(job: Job) -> None:
    scenarios = ("eight_layers", "one_layer_twice", "back_to_back", "scan", "two_programs")
    job("pairing", "pairing", *scenarios, num_processes=2, num_devices=4)


@pytest.mark.once
def test_independent_calls_of_four_processes_pair_rightly(job: Job) -> None:
    """What more processes could change: calls of one program, and of two in flight together."""
    job("pairing", "pairing", "eight_layers", "two_programs", num_processes=4, num_devices=2)


@pytest.mark.parametrize(
    "how",
    [
        "cost_analysis",
        "compiler_options",
        "lowered_twice",
        "local_programs",
        "other_line",
        "serialized",
    ],
)
def test_one_process_compiles_more_than_the_others(job: Job, how: str) -> None:
    """A program is known by what it is, not by how many there were, nor by the lines it is from."""
    for process in job("pairing", "extra_compile", how, num_processes=2, num_devices=2):
        assert "RIGHT" in process.log.splitlines(), process.log


@pytest.mark.parametrize("shared", ["shared", "own"])
def test_compilation_cache(job: Job, tmp_path: pathlib.Path, shared: str) -> None:
    """One process finds the program in JAX's cache, another compiles it: on the second run."""
    for _ in range(2):
        finished = job("pairing", "cached", str(tmp_path), shared, num_processes=2, num_devices=2)
        assert all("RIGHT" in process.log.splitlines() for process in finished)
    hits = ["HIT" in process.log.splitlines() for process in finished]
    assert hits == ([True, False] if shared == "own" else [True, hits[1]])


def test_programs_in_another_order(job: Job) -> None:
    """Never rows of another call, and no waiting for a timeout."""
    for process in job("pairing", "other_order", num_processes=2, num_devices=2):
        (message,) = process.lines("ERROR")
        assert message.startswith(("FAILED_PRECONDITION: ", "UNAVAILABLE: process ")), message
        assert "waits in another program: one with 6 calls of jax_ep, here it has 3" in message or (
            "waits in another program: one with 3 calls of jax_ep, here it has 6" in message
        )
        assert float(process.lines("SECONDS")[0]) < 20
        assert "RIGHT" in process.log.splitlines()


# A process that does not come ---------------------------------------------------------------------


def test_killed_process(job: Job) -> None:
    """The survivors hear of it at once, from us, and exit with code 0."""
    finished = job(
        "failures", "killed", num_processes=3, num_devices=2, expected={2: -9}, timeout=60
    )
    for survivor in finished[:2]:
        assert float(survivor.lines("SECONDS")[0]) < 5
        for message in survivor.lines("ERROR") + survivor.lines("AGAIN"):
            assert message.startswith("UNAVAILABLE: "), message
            assert "jax_ep_" in message
            assert "process 2 (pid" in message or "process 2" in message, message
            assert "died" in message
        assert len(survivor.lines("ERROR")) == len(survivor.lines("AGAIN")) == 1


# Two devices each: JAX's ids are the process's number times 2048, and on.
_OF_PROCESS_1 = "2 (process 1, device 2048), 3 (process 1, device 2049)"


@pytest.mark.once
def test_stalled_process(job: Job) -> None:
    finished = job("failures", "stalled", num_processes=2, num_devices=2)
    (message,) = finished[0].lines("ERROR")
    assert message.startswith(f"DEADLINE_EXCEEDED: jax_ep_layout: rank {_OF_PROCESS_1} of group 0")


@pytest.mark.once
def test_who_is_waited_for_is_said_once(job: Job) -> None:
    """Long before the error, and without one where the rank comes at last."""
    finished = job("failures", "waited_for", num_processes=2, num_devices=2)
    assert all("RIGHT" in process.log.splitlines() for process in finished)
    lines = [line for line in finished[0].log.splitlines() if "waits for rank" in line]
    assert lines == [f"jax_ep: jax_ep_layout waits for rank {_OF_PROCESS_1} of group 0"]


@pytest.mark.once
def test_late_process(job: Job) -> None:
    finished = job("failures", "late", num_processes=2, num_devices=2)
    (early,), (late,) = finished[0].lines("ERROR"), finished[1].lines("ERROR")
    assert early.startswith(f"DEADLINE_EXCEEDED: jax_ep_layout: rank {_OF_PROCESS_1} of group 0")
    assert late.startswith(f"UNAVAILABLE: process 0 gave up: jax_ep_layout: rank {_OF_PROCESS_1}")
    assert all("RIGHT" in f.log for f in finished)


# Set-up and tear-down -----------------------------------------------------------------------------


@pytest.mark.once
def test_missing_process(job: Job) -> None:
    finished = job("set_up", "missing", num_processes=3, num_devices=1)
    for process in range(2):
        (message,) = finished[process].lines("ERROR")
        assert message.startswith(
            "jax_ep.initialize: process 2 of 3 did not call jax_ep.initialize() within 1.5 s"
        )


@pytest.mark.once
def test_initialize_again_after_a_missing_process(job: Job) -> None:
    """However often each process has tried before."""
    finished = job("set_up", "retried_after_missing", num_processes=3, num_devices=1)
    for process in range(3):
        assert "RIGHT" in finished[process].log.splitlines()
        errors = finished[process].lines("ERROR")
        assert len(errors) == (2 if process < 2 else 0)
        for message in errors:
            assert "process 2 of 3 did not call jax_ep.initialize() within 1.0 s" in message


@pytest.mark.once
def test_initialize_again_after_a_failure(job: Job) -> None:
    """One process finds the fault, all hear of it soon, and all can try again."""
    finished = job("set_up", "retried_after_failure", num_processes=3, num_devices=1)
    for process in finished:
        (message,) = process.lines("ERROR")
        assert "may not read the memory of process 1 (process_vm_readv: " in message, message
        assert float(process.lines("SECONDS")[0]) < 15
        (refused,) = process.lines("REFUSED")
        assert "call jax_ep.initialize() in every process" in refused
        assert "RIGHT" in process.log.splitlines()


def test_forgotten_initialize(job: Job) -> None:
    for finished in job("set_up", "forgotten", num_processes=2, num_devices=1):
        (message,) = finished.lines("ERROR")
        assert "the mesh spans processes; call jax_ep.initialize() in every process" in message


def test_groups_inside_processes_need_no_initialize(job: Job) -> None:
    for process in job("set_up", "groups_inside_processes", num_processes=2, num_devices=4):
        assert "RIGHT" in process.log.splitlines(), process.log


@pytest.mark.parametrize(
    "how",
    [
        "in_turn",
        "shutdown_first",
        "at_exit",
        *(
            pytest.param(how, marks=pytest.mark.once)
            for how in ("in_reverse", "some_at_exit", "unblocked", "again")
        ),
    ],
)
def test_tear_down(job: Job, how: str) -> None:
    """Exit code 0, whoever leaves first."""
    for finished in job("set_up", "tear_down", how, num_processes=3, num_devices=1):
        (twice,) = finished.lines("TWICE")
        assert twice.startswith("jax_ep.initialize: this process is connected already")
        if how == "again":
            (after,) = finished.lines("AFTER")
            assert "call jax_ep.initialize() in each of them first" in after


@pytest.mark.once
def test_memory_that_may_not_be_read(job: Job) -> None:
    finished = job("set_up", "unreadable", num_processes=2, num_devices=1)
    (message,) = finished[0].lines("ERROR")
    assert "process 0 may not read the memory of process 1 (process_vm_readv: " in message
