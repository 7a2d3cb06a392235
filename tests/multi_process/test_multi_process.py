"""Jobs of several processes on this host, on CPU."""

import functools
import pathlib
import re

import numpy as np
import pytest
from launcher import Finished, run

_WORKER = pathlib.Path(__file__).with_name("worker.py")

SHAPES = [(2, 4), (4, 2)]  # processes, devices of each


@pytest.fixture
def job(tmp_path: pathlib.Path):
    return functools.partial(run, _WORKER, out=tmp_path)


def _lines(finished: Finished, word: str) -> list[str]:
    return re.findall(rf"^{word} (.*)$", finished.log, re.MULTILINE)


# Results ------------------------------------------------------------------------------------------


def _results(out: pathlib.Path, num_processes: int, num_devices: int) -> dict[str, np.ndarray]:
    out.mkdir()
    run(_WORKER, "results", num_processes=num_processes, num_devices=num_devices, out=out)
    merged: dict[str, np.ndarray] = {}
    for process in range(num_processes):
        with np.load(out / f"process_{process}.npz") as saved:
            assert not merged.keys() & saved.keys()
            merged |= saved
    return merged


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return _results(tmp_path_factory.mktemp("one") / "out", 1, 8)


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
def test_independent_calls_pair_rightly(job, num_processes: int, num_devices: int) -> None:
    job("pairing", num_processes=num_processes, num_devices=num_devices)


@pytest.mark.parametrize(
    "how", ["cost_analysis", "compiler_options", "lowered_twice", "local_programs"]
)
def test_one_process_compiles_more_than_the_others(job, how: str) -> None:
    """The rows are right, or an error says what to look for; never silently wrong.

    Runs are numbered from a hash of the program, and the program holds the lines of code that it
    was traced from. A process that traces a function from another line cannot be paired with.
    """
    finished = job("extra_compile", how, num_processes=2, num_devices=2)
    errors = [line for process in finished for line in _lines(process, "ERROR")]
    num_right = sum("RIGHT" in process.log.splitlines() for process in finished)
    assert (len(errors), num_right) in ((0, 2), (2, 0))
    if how == "local_programs":
        assert not errors
    if errors:
        assert any("traced from other lines of code" in error for error in errors), errors


# A process that does not come ---------------------------------------------------------------------


def test_killed_process(job) -> None:
    """The survivors hear of it at once, from us, and exit with code 0."""
    finished = job("killed", num_processes=3, num_devices=2, expected={2: -9}, timeout=60)
    for survivor in finished[:2]:
        assert float(_lines(survivor, "SECONDS")[0]) < 5
        for message in _lines(survivor, "ERROR") + _lines(survivor, "AGAIN"):
            assert message.startswith("UNAVAILABLE: "), message
            assert "jax_ep_" in message
            assert "process 2 (pid" in message or "process 2" in message, message
            assert "died" in message
        assert len(_lines(survivor, "ERROR")) == len(_lines(survivor, "AGAIN")) == 1


def test_stalled_process(job) -> None:
    finished = job("stalled", num_processes=2, num_devices=2)
    (message,) = _lines(finished[0], "ERROR")
    assert message.startswith("DEADLINE_EXCEEDED: jax_ep_layout: rank 2 (process 1), 3 (process 1)")


def test_late_process(job) -> None:
    finished = job("late", num_processes=2, num_devices=2)
    (early,), (late,) = _lines(finished[0], "ERROR"), _lines(finished[1], "ERROR")
    assert early.startswith("DEADLINE_EXCEEDED: jax_ep_layout: rank 2 (process 1), 3 (process 1)")
    assert late.startswith("UNAVAILABLE: process 0 gave up: jax_ep_layout: rank 2 (process 1)")
    assert all("RIGHT" in f.log for f in finished)


# Set-up and tear-down -----------------------------------------------------------------------------


def test_missing_process(job) -> None:
    finished = job("missing", num_processes=3, num_devices=1)
    for process in range(2):
        (message,) = _lines(finished[process], "ERROR")
        assert message.startswith(
            "jax_ep.initialize: process 2 of 3 did not call jax_ep.initialize() within 1.5 s"
        )


def test_initialize_again_after_a_missing_process(job) -> None:
    """However often each process has tried before."""
    finished = job("retried_after_missing", num_processes=3, num_devices=1)
    for process in range(3):
        assert "RIGHT" in finished[process].log.splitlines()
        errors = _lines(finished[process], "ERROR")
        assert len(errors) == (2 if process < 2 else 0)
        for message in errors:
            assert "process 2 of 3 did not call jax_ep.initialize() within 1.0 s" in message


def test_initialize_again_after_a_failure(job) -> None:
    """One process finds the fault, all hear of it soon, and all can try again."""
    finished = job("retried_after_failure", num_processes=3, num_devices=1)
    for process in finished:
        (message,) = _lines(process, "ERROR")
        assert "may not read the memory of process 1 (process_vm_readv: " in message, message
        assert float(_lines(process, "SECONDS")[0]) < 15
        (refused,) = _lines(process, "REFUSED")
        assert "call jax_ep.initialize() in every process" in refused
        assert "RIGHT" in process.log.splitlines()


def test_forgotten_initialize(job) -> None:
    for finished in job("forgotten", num_processes=2, num_devices=1):
        (message,) = _lines(finished, "ERROR")
        assert "the mesh spans processes; call jax_ep.initialize() in every process" in message


@pytest.mark.parametrize(
    "how",
    ["in_turn", "in_reverse", "shutdown_first", "some_at_exit", "at_exit", "unblocked", "again"],
)
def test_tear_down(job, how: str) -> None:
    """Exit code 0, whoever leaves first."""
    for finished in job("tear_down", how, num_processes=3, num_devices=1):
        (twice,) = _lines(finished, "TWICE")
        assert twice.startswith("jax_ep.initialize: this process is connected already")
        if how == "again":
            (after,) = _lines(finished, "AFTER")
            assert "call jax_ep.initialize() in each of them first" in after


def test_memory_that_may_not_be_read(job) -> None:
    finished = job("unreadable", num_processes=2, num_devices=1)
    (message,) = _lines(finished[0], "ERROR")
    assert "process 0 may not read the memory of process 1 (process_vm_readv: " in message
