"""Jobs of several processes on this host, on CPU."""

import functools
import pathlib
import re
from collections.abc import Callable

import numpy as np
import pytest
from launcher import Finished, run_scenario

_SCENARIOS = pathlib.Path(__file__).with_name("scenarios")

NUM_PROCESSES = [2, 4]

Job = Callable[..., list[Finished]]


def _job(out: pathlib.Path) -> Job:
    """What runs scenarios: a file of scenarios/, functions of it, and arguments."""

    def start(file: str, scenario: str, *arguments: str, **options: object) -> list[Finished]:
        path = _SCENARIOS / f"{file}.py"
        return run_scenario(path, scenario, *arguments, out=out, **options)

    return start


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Job:
    return _job(tmp_path)


# Jobs of several scenarios. Each ran when its fixture is there; the tests look at what it left.


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Finished]]:
    """Jobs of eight devices, by number of processes: what each printed, and saved as RESULTS."""

    @functools.cache
    def run(num_processes: int) -> list[Finished]:
        scenarios = ["results"]
        if num_processes > 1:
            scenarios.append("pairing.pairing")
        if num_processes == 2:
            scenarios.append("hosts.on_hosts")
            scenarios.insert(0, "set_up.groups_inside_processes")
        return _job(tmp_path_factory.mktemp("job"))(
            "results",
            "+".join(scenarios),
            num_processes=num_processes,
            num_devices=8 // num_processes,
        )

    return run


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    return _job(tmp_path_factory.mktemp("job"))(
        "pairing",
        "extra_compile+other_order+hosts.other_programs",
        num_processes=2,
        num_devices=2,
    )


@pytest.fixture(scope="module")
def slow_process(tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    return _job(tmp_path_factory.mktemp("job"))(
        "failures", "late+stalled+waited_for", num_processes=2, num_devices=2
    )


@pytest.fixture(scope="module")
def set_up(tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    """Three processes, of which the last is killed in the end."""
    scenarios = "forgotten+retried_after_missing+retried_after_failure+leave_and_join"
    return _job(tmp_path_factory.mktemp("job"))(
        "set_up",
        f"{scenarios}+failures.killed",
        num_processes=3,
        num_devices=2,
        expected={2: -9},
        # JAX lets the others exit with code 0, as long as the coordinator, process 0, leaves last.
        environment={"JAX_ENABLE_RECOVERABILITY": "1"},
    )


# Results ------------------------------------------------------------------------------------------


def _results(job: list[Finished]) -> dict[str, np.ndarray]:
    merged: dict[str, np.ndarray] = {}
    for process in job:
        (path,) = process.lines("RESULTS")
        with np.load(path) as saved:
            assert not merged.keys() & saved.keys()
            merged |= saved
    return merged


@pytest.mark.parametrize("num_processes", NUM_PROCESSES)
def test_same_bits_as_one_process(
    eight_devices: Callable[[int], list[Finished]], num_processes: int
) -> None:
    one_process, several = _results(eight_devices(1)), _results(eight_devices(num_processes))
    if num_processes == 2:
        assert several.keys() == one_process.keys()
    assert len(several) > (700 if num_processes == 2 else 400)  # 4 or 2 meshes, 8 devices, fields
    different = [
        key
        for key, value in several.items()
        if value.dtype != one_process[key].dtype or value.tobytes() != one_process[key].tobytes()
    ]
    assert not different


# Nodes --------------------------------------------------------------------------------------------


def test_processes_on_several_hosts(eight_devices: Callable[[int], list[Finished]]) -> None:
    """Four ranks on each of two hosts; what initialize() is told goes before that."""
    for process in eight_devices(2):
        seen = process.of("hosts.on_hosts")
        assert seen.lines("RIGHT") == ["4", "2", "8"], process.log
        scattered, disagreeing = seen.lines("ERROR")
        assert "group 0 has ranks 0 on host0, 1 on host1" in scattered
        assert "it is 1 in process 0 and 2 in process 1" in disagreeing


# Pairing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", NUM_PROCESSES)
def test_independent_calls_pair_rightly(
    eight_devices: Callable[[int], list[Finished]], num_processes: int
) -> None:
    for process in eight_devices(num_processes):
        right = process.of("pairing.pairing").lines("RIGHT")
        assert len(right) == (4 if num_processes == 2 else 1), process.log


@pytest.mark.versions
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
def test_one_process_compiles_more_than_the_others(programs: list[Finished], how: str) -> None:
    """A program is known by what it is, not by how many there were, nor by the lines it is from."""
    for process in programs:
        assert how in process.of("extra_compile").lines("RIGHT"), process.log


@pytest.mark.versions
def test_compilation_cache(job: Job, tmp_path: pathlib.Path) -> None:
    """One process finds the program in JAX's cache, another compiles it: on the second run."""
    for _ in range(2):
        finished = job("pairing", "cached", str(tmp_path), num_processes=2, num_devices=2)
        assert all(process.lines("RIGHT") == ["shared", "own"] for process in finished)
    hits = [process.lines("HIT") for process in finished]
    assert hits[0] == ["shared", "own"]
    assert "own" not in hits[1]


@pytest.mark.versions
def test_programs_in_another_order(programs: list[Finished]) -> None:
    """Never rows of another call, and no waiting for a timeout."""
    for process in [finished.of("other_order") for finished in programs]:
        (message,) = process.lines("ERROR")
        assert message.startswith(("FAILED_PRECONDITION: ", "UNAVAILABLE: process ")), message
        assert "waits in another program: one with 6 calls of jax_ep, here it has 3" in message or (
            "waits in another program: one with 3 calls of jax_ep, here it has 6" in message
        )
        assert float(process.lines("SECONDS")[0]) < 20
        assert "RIGHT" in process.log.splitlines()


@pytest.mark.versions
def test_programs_that_sum_in_another_order(programs: list[Finished]) -> None:
    """Of other ``ranks_per_node``: an error at once, not a mixed order."""
    for process in [finished.of("hosts.other_programs") for finished in programs]:
        (message,) = process.lines("ERROR")
        assert message.startswith(("FAILED_PRECONDITION: ", "UNAVAILABLE: process ")), message
        assert float(process.lines("SECONDS")[0]) < 20
        assert "RIGHT" in process.log.splitlines()


# A process that does not come ---------------------------------------------------------------------


@pytest.mark.versions
def test_killed_process(set_up: list[Finished]) -> None:
    """The survivors hear of it at once, from us, and exit with code 0."""
    for finished in set_up[:2]:
        survivor = finished.of("failures.killed")
        assert float(survivor.lines("SECONDS")[0]) < 5
        for message in survivor.lines("ERROR") + survivor.lines("AGAIN"):
            assert message.startswith("UNAVAILABLE: "), message
            assert "jax_ep_" in message
            assert "process 2 (pid" in message or "process 2" in message, message
            assert "died" in message
        assert len(survivor.lines("ERROR")) == len(survivor.lines("AGAIN")) == 1


# Two devices each: JAX's ids are the process's number times 2048, and on.
_OF_PROCESS_1 = "2 (process 1, device 2048), 3 (process 1, device 2049)"


def test_stalled_process(slow_process: list[Finished]) -> None:
    (message,) = slow_process[0].of("stalled").lines("ERROR")
    assert message.startswith(f"DEADLINE_EXCEEDED: jax_ep_layout: rank {_OF_PROCESS_1} of group 0")


def test_who_is_waited_for_is_said_once(slow_process: list[Finished]) -> None:
    """Long before the error, and without one where the rank comes at last."""
    finished = [process.of("waited_for") for process in slow_process]
    assert all("RIGHT" in process.log.splitlines() for process in finished)
    lines = [line for line in finished[0].log.splitlines() if "waits for rank" in line]
    assert lines == [f"jax_ep: jax_ep_layout waits for rank {_OF_PROCESS_1} of group 0"]


def test_late_process(slow_process: list[Finished]) -> None:
    finished = [process.of("late") for process in slow_process]
    (early,), (late,) = finished[0].lines("ERROR"), finished[1].lines("ERROR")
    assert early.startswith(f"DEADLINE_EXCEEDED: jax_ep_layout: rank {_OF_PROCESS_1} of group 0")
    assert late.startswith(f"UNAVAILABLE: process 0 gave up: jax_ep_layout: rank {_OF_PROCESS_1}")
    assert all("RIGHT" in f.log for f in finished)


# Set-up and tear-down -----------------------------------------------------------------------------


@pytest.mark.versions
def test_forgotten_initialize(set_up: list[Finished]) -> None:
    for finished in set_up:
        (message,) = finished.of("forgotten").lines("ERROR")
        assert "the mesh spans processes; call jax_ep.initialize() in every process" in message


@pytest.mark.versions
def test_initialize_again_after_a_missing_process(set_up: list[Finished]) -> None:
    """However often each process has tried before."""
    for process, finished in enumerate(set_up):
        finished = finished.of("retried_after_missing")
        assert "RIGHT" in finished.log.splitlines()
        errors = finished.lines("ERROR")
        assert len(errors) == (2 if process < 2 else 0)
        for message in errors:
            assert message.startswith(
                "jax_ep.initialize: process 2 of 3 did not call jax_ep.initialize() within 1.0 s"
            )


@pytest.mark.versions
def test_initialize_again_after_a_failure(set_up: list[Finished]) -> None:
    """Two processes find that they may not read the third, all hear of it soon and try again."""
    for finished in set_up:
        finished = finished.of("retried_after_failure")
        (message,) = finished.lines("ERROR")
        assert re.search(
            r"process [02] may not read the memory of process 1 \(process_vm_readv: ", message
        ), message
        assert float(finished.lines("SECONDS")[0]) < 15
        (refused,) = finished.lines("REFUSED")
        assert "call jax_ep.initialize() in every process" in refused
        assert "RIGHT" in finished.log.splitlines()


@pytest.mark.versions
def test_leave_and_join_again(set_up: list[Finished]) -> None:
    """Whoever leaves first."""
    for finished in set_up:
        finished = finished.of("leave_and_join")
        twice = finished.lines("TWICE")
        assert len(twice) == 2
        for message in twice:
            assert message.startswith("jax_ep.initialize: this process is connected already")
        (after,) = finished.lines("AFTER")
        assert "call jax_ep.initialize() in each of them first" in after


def test_groups_inside_processes_need_no_initialize(
    eight_devices: Callable[[int], list[Finished]],
) -> None:
    for process in eight_devices(2):
        log = process.of("set_up.groups_inside_processes").log
        assert "RIGHT" in log.splitlines(), process.log


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("shutdown_first", marks=pytest.mark.versions),
        "some_at_exit",
        "unblocked",
    ],
)
def test_tear_down(job: Job, how: str) -> None:
    """Exit code 0, whoever leaves first."""
    job("set_up", "tear_down", how, num_processes=2, num_devices=1)
