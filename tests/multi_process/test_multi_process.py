"""Jobs of several processes on this host, on CPU."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
from launcher import Finished, run_scenario

_SCENARIOS = pathlib.Path(__file__).with_name("scenarios")

SHAPES = [(2, 4), (4, 2)]  # processes, devices of each


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


@pytest.mark.parametrize(("num_processes", "num_devices"), SHAPES)
def test_independent_calls_pair_rightly(job: Job, num_processes: int, num_devices: int) -> None:
    job("pairing", "pairing", num_processes=num_processes, num_devices=num_devices)


@pytest.mark.parametrize(
    "how", ["cost_analysis", "compiler_options", "lowered_twice", "local_programs"]
)
def test_one_process_compiles_more_than_the_others(job: Job, how: str) -> None:
    """The rows are right, or an error says what to look for; never silently wrong.

    Runs are numbered from a hash of the program, and the program holds the lines of code that it
    was traced from. A process that traces a function from another line cannot be paired with.
    """
    finished = job("pairing", "extra_compile", how, num_processes=2, num_devices=2)
    errors = [line for process in finished for line in process.lines("ERROR")]
    num_right = sum("RIGHT" in process.log.splitlines() for process in finished)
    assert (len(errors), num_right) in ((0, 2), (2, 0))
    if how == "local_programs":
        assert not errors
    if errors:
        assert any("traced from other lines of code" in error for error in errors), errors


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


def test_stalled_process(job: Job) -> None:
    finished = job("failures", "stalled", num_processes=2, num_devices=2)
    (message,) = finished[0].lines("ERROR")
    assert message.startswith("DEADLINE_EXCEEDED: jax_ep_layout: rank 2 (process 1), 3 (process 1)")


def test_late_process(job: Job) -> None:
    finished = job("failures", "late", num_processes=2, num_devices=2)
    (early,), (late,) = finished[0].lines("ERROR"), finished[1].lines("ERROR")
    assert early.startswith("DEADLINE_EXCEEDED: jax_ep_layout: rank 2 (process 1), 3 (process 1)")
    assert late.startswith("UNAVAILABLE: process 0 gave up: jax_ep_layout: rank 2 (process 1)")
    assert all("RIGHT" in f.log for f in finished)


# Set-up and tear-down -----------------------------------------------------------------------------


def test_missing_process(job: Job) -> None:
    finished = job("set_up", "missing", num_processes=3, num_devices=1)
    for process in range(2):
        (message,) = finished[process].lines("ERROR")
        assert message.startswith(
            "jax_ep.initialize: process 2 of 3 did not call jax_ep.initialize() within 1.5 s"
        )


def test_initialize_again_after_a_missing_process(job: Job) -> None:
    """However often each process has tried before."""
    finished = job("set_up", "retried_after_missing", num_processes=3, num_devices=1)
    for process in range(3):
        assert "RIGHT" in finished[process].log.splitlines()
        errors = finished[process].lines("ERROR")
        assert len(errors) == (2 if process < 2 else 0)
        for message in errors:
            assert "process 2 of 3 did not call jax_ep.initialize() within 1.0 s" in message


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


@pytest.mark.parametrize(
    "how",
    ["in_turn", "in_reverse", "shutdown_first", "some_at_exit", "at_exit", "unblocked", "again"],
)
def test_tear_down(job: Job, how: str) -> None:
    """Exit code 0, whoever leaves first."""
    for finished in job("set_up", "tear_down", how, num_processes=3, num_devices=1):
        (twice,) = finished.lines("TWICE")
        assert twice.startswith("jax_ep.initialize: this process is connected already")
        if how == "again":
            (after,) = finished.lines("AFTER")
            assert "call jax_ep.initialize() in each of them first" in after


def test_memory_that_may_not_be_read(job: Job) -> None:
    finished = job("set_up", "unreadable", num_processes=2, num_devices=1)
    (message,) = finished[0].lines("ERROR")
    assert "process 0 may not read the memory of process 1 (process_vm_readv: " in message
