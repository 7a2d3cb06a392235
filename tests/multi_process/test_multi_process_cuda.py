"""Jobs of several processes on the GPUs of this host, several to a GPU if there are few."""

import importlib.util
import pathlib
import re
from collections.abc import Callable

import pytest
from gpus import count_gpus
from launcher import Finished, run_scenario

_SCENARIOS = pathlib.Path(__file__).with_name("scenarios")
# Without MPS the processes of a GPU take turns, so a wait for a peer takes milliseconds.
_SECONDS = 240
_POOL = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}
_GROWING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_ASYNC = {"XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async", **_GROWING}
_STAGED = {"JAX_EP_PATH": "staged", **_POOL}


NUM_GPUS = count_gpus()

pytestmark = [
    pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU here"),
    pytest.mark.skipif(
        importlib.util.find_spec("jax_ep._cuda") is None, reason="jax_ep is built without CUDA"
    ),
]

# What XLA replays from a command buffer runs no host code: it raises nothing, and gives NaN if it
# was recorded before finalize().
_NO_REPLAY = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}

Job = Callable[..., list[Finished]]


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Job:
    """What runs a scenario: a file of scenarios/, a function of it, and its arguments."""

    def start(file: str, scenario: str, *arguments: str, **options: object) -> list[Finished]:
        return run_scenario(
            _SCENARIOS / f"{file}.py",
            scenario,
            *arguments,
            num_devices=1,
            num_gpus=NUM_GPUS,
            out=tmp_path,
            timeout=_SECONDS,
            **options,
        )

    return start


def _check_right(finished: list[Finished], times: int = 1) -> None:
    for process in finished:
        assert process.log.splitlines().count("RIGHT") == times, process.log


# Paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_processes", [2, 4])
@pytest.mark.parametrize(
    ("path", "environment"),
    [
        ("direct", _POOL),
        ("staged", _STAGED),
        ("staged", _ASYNC),
        ("direct", _GROWING),  # and what has grown is staged
    ],
    ids=["direct", "staged", "cuda_async", "grown"],
)
def test_equals_the_oracle(
    job: Job, num_processes: int, path: str, environment: dict[str, str]
) -> None:
    num_tokens = "16384" if environment is _GROWING else "24"
    finished = job(
        "cuda_paths",
        "right",
        num_tokens,
        str(1 << 27),
        num_processes=num_processes,
        environment=environment,
    )
    _check_right(finished)
    for process in finished:
        assert f"; {path} path" in process.lines("PATH")[0]


def test_each_owner_chooses_its_path(job: Job) -> None:
    staged = dict.fromkeys((0, 2), _STAGED)
    finished = job(
        "cuda_paths",
        "right",
        "24",
        str(1 << 20),
        num_processes=4,
        environment=_POOL,
        environments=staged,
    )
    _check_right(finished)
    for i, process in enumerate(finished):
        path = "direct" if i % 2 else "staged"
        assert f"; {path} path" in process.lines("PATH")[0]


def test_memory_that_grew(job: Job) -> None:
    finished = job("cuda_paths", "grown", num_processes=2, environment=_GROWING)
    for process in finished:
        (message,) = process.lines("GROWN")
        assert "FAILED_PRECONDITION" in message
        assert "outside the part of XLA's memory that the other processes have mapped" in message
        assert "jax_ep.initialize(staging_bytes=...)" in message
    _check_right(finished)


def test_too_small_a_region(job: Job) -> None:
    finished = job("cuda_paths", "too_small", num_processes=2, environment=_STAGED)
    for process in finished:
        (message,) = process.lines("SMALL")
        assert "FAILED_PRECONDITION" in message
        # The first call is the layout: 24 tokens, 3 ids of 4 bytes, rounded up.
        assert "topk_idx" in message
        assert re.search(r"needs 512 bytes of staging region, but device \d+ has 256", message)
    _check_right(finished)


def test_memory_that_cannot_be_mapped(job: Job) -> None:
    finished = job("cuda_paths", "not_exportable", num_processes=2, environment=_ASYNC)
    for process in finished:
        (message,) = process.lines("ERROR")
        assert "other processes cannot map XLA's memory" in message
        assert "jax_ep.initialize(staging_bytes=...)" in message
    _check_right(finished)


def test_slots_that_differ(job: Job) -> None:
    differing = {i: _POOL | {"JAX_EP_SLOTS": str(i)} for i in range(2)}
    finished = job(
        "cuda_paths", "slots", num_processes=2, environment=_POOL, environments=differing
    )
    slot_bytes = (0, 64 << 20)
    for i, process in enumerate(finished):
        (message,) = process.lines("ERROR")
        told = f"process {1 - i} has slots of {slot_bytes[1 - i]} bytes a device"
        assert f"{told}, process {i} of {slot_bytes[i]}: pass the same" in message
        assert "; slots of 4194304 bytes a device" in process.lines("PATH")[0]
    _check_right(finished)


@pytest.mark.skipif(NUM_GPUS < 2, reason="a single process needs two GPUs for two ranks")
def test_one_process(job: Job) -> None:
    finished = job("cuda_paths", "alone", num_processes=1, environment=_STAGED | _NO_REPLAY)
    (small,), (after,) = finished[0].lines("SMALL"), finished[0].lines("AFTER")
    assert "jax_ep.initialize(staging_bytes=...)" in small
    assert "jax_ep.finalize() has been called. Call jax_ep.initialize()" in after
    _check_right(finished, times=2)


@pytest.mark.skipif(NUM_GPUS < 2, reason="a single process needs two GPUs for two ranks")
def test_staging_grows_while_calls_run(job: Job) -> None:
    finished = job("cuda_paths", "grown_in_flight", num_processes=1, environment=_STAGED)
    assert finished[0].lines("ERROR") == []
    assert finished[0].lines("WRONG") == ["0"]
    _check_right(finished, times=2)


# A process that does not come ---------------------------------------------------------------------


_DEVICE = r"device \d \(process \d\)"
_LATE = r"device 2 \(process 2\)"
_WAITED = rf"waited for {_LATE} to come until the timeout \(expected epoch \d+, seen \d+\)"
_TOLD = rf"was told by {_DEVICE}, which has given up on {_LATE} and says why"


@pytest.mark.parametrize("environment", [_POOL, _STAGED], ids=["direct", "staged"])
def test_stalled_rank(job: Job, environment: dict[str, str]) -> None:
    finished = job(
        "cuda_failures", "stalled", num_processes=3, environment=environment | _NO_REPLAY
    )
    for process in finished[:2]:
        assert 2.5 < float(process.lines("SECONDS")[0]) < 15
        assert process.lines("POISONED") == ["True"]
        (message,) = process.lines("CHECK")
        assert re.match(
            rf"jax_ep_layout: {_DEVICE} ({_WAITED}|{_TOLD}); the group is broken", message
        )
        (again,) = process.lines("AGAIN")
        seconds, error = again.split(" ", 1)
        assert float(seconds) < 2
        assert error.startswith(f"DEADLINE_EXCEEDED: {message}")
        printed = [x for x in process.log.splitlines() if x.startswith("jax_ep: jax_ep_")]
        assert printed == [f"jax_ep: {message}"]
    # The first to give up tells the other one, which may have given up itself by then.
    messages = [process.lines("CHECK")[0] for process in finished[:2]]
    assert any(re.search(_WAITED, message) for message in messages), messages
    _check_right(finished, times=2)


def test_late_rank(job: Job) -> None:
    """One that comes half a minute late is told of, and waited for."""
    finished = job("cuda_failures", "late", num_processes=3, environment=_POOL | _NO_REPLAY)
    _check_right(finished, times=2)
    for process in finished[:2]:
        (said,) = [x for x in process.log.splitlines() if "has waited for" in x]
        assert re.fullmatch(
            rf"jax_ep: jax_ep_layout: {_DEVICE} has waited for 30 s for {_LATE} to come; "
            r"it gives up after 600 s \(jax_ep.set_timeout\)",
            said,
        ), said


def test_a_group_that_another_one_broke(job: Job) -> None:
    """Who has given up in one group says so in the others, before anybody waits for it."""
    finished = job(
        "cuda_failures",
        "broken_in_another_group",
        num_processes=4,
        environment=_POOL | _NO_REPLAY,
    )
    assert [process.lines("POISONED") for process in finished[:3]] == [["False"]] * 2 + [["True"]]
    for process in (finished[0], finished[2]):
        (message,) = process.lines("ERROR")
        assert re.search(r"device 3 \(process 3\)", message), message
        assert float(process.lines("SECONDS")[0]) < 15


def test_killed_rank(job: Job) -> None:
    """The survivors hear of it from us, long before JAX's heartbeat, and exit with code 0."""
    finished = job(
        "cuda_failures", "killed", num_processes=3, environment=_POOL | _NO_REPLAY, expected={2: -9}
    )
    for survivor in finished[:2]:
        assert float(survivor.lines("SECONDS")[0]) < 20
        (message,) = survivor.lines("ERROR")
        assert re.search(r"jax_ep_\w+: .*(has died|was told by)", message), message
        assert re.search(r"jax_ep: process 2 \(pid \d+\) has died", survivor.log), survivor.log
        (again,) = survivor.lines("AGAIN")
        assert float(again.split(" ", 1)[0]) < 2


def test_interrupt_while_leaving(job: Job) -> None:
    """A process that leaves waits for a rank that is late, until Ctrl-C."""
    finished = job("cuda_failures", "interrupted", num_processes=2, environment=_POOL | _NO_REPLAY)
    leaver, other = finished
    assert float(leaver.lines("SECONDS")[0]) < 15
    assert "INTERRUPTED" in leaver.log.splitlines()
    assert re.search(
        r"jax_ep_layout: device 0 \(process 0\) waited for device 1 \(process 1\) to come until "
        r"this process was interrupted while it left",
        leaver.log,
    ), leaver.log
    seconds, error = other.lines("TOLD")[-1].split(" ", 1)
    assert float(seconds) < 2
    assert "was told by device 0 (process 0), which has given up" in error


# Tear-down ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["in_turn", "shutdown_first", "some_at_exit", "at_exit", "unblocked", "again"]
)
def test_tear_down(job: Job, how: str) -> None:
    """Exit code 0, whoever leaves first."""
    environment = _POOL | _NO_REPLAY if how == "again" else _POOL
    finished = job("cuda_failures", "tear_down", how, num_processes=2, environment=environment)
    _check_right(finished, times=3 if how == "again" else 1)
    if how == "again":
        for process in finished:
            (after,) = process.lines("AFTER")
            assert "jax_ep.finalize() has been called. Call jax_ep.initialize()" in after
