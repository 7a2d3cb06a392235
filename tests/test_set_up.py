"""Set-up in one process, and the errors that kernels record; all of it without a GPU."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
import pytest

import jax_ep
from jax_ep import _native, compat, environment, limits, nvshmem, runtime
from jax_ep.errors import Watcher

RECORD = "jax_ep_dispatch: rank 0 waited for rank 1 to come until the timeout"


class FakeCuda:
    """What is asked of the CUDA module, with a record that a test can write."""

    def __init__(self) -> None:
        self.record: str | None = None
        self.news: list[str] = []
        self.timeouts: list[tuple[float, float]] = []
        self.slot_bytes: list[int] = []  # of each set-up
        self.requires_slots: list[bool] = []
        self.no_slots: str | None = None  # why
        self.problem: str | None = None  # of the next one
        self.looked = threading.Event()
        self.awaited: list[int] = []
        self.left: list[int] = []

    def awaited_elsewhere(self) -> list[int]:
        return self.awaited

    def tell_left(self, process: int) -> None:
        self.left.append(process)
        self.awaited = []

    def watch(self) -> list[str]:
        news, self.news = self.news, []
        self.looked.set()
        return news

    def recorded_error(self) -> str | None:
        return self.record

    def set_timeout(self, arrival: float, progress: float) -> None:
        self.timeouts.append((arrival, progress))

    def setup(self, *arguments: object) -> None:
        if self.problem is not None:
            raise RuntimeError(self.problem)
        *_, slot_bytes, requires_slots = arguments
        assert isinstance(slot_bytes, int)
        assert isinstance(requires_slots, bool)
        self.slot_bytes.append(slot_bytes)
        self.requires_slots.append(requires_slots)

    def slots_problem(self) -> str | None:
        return self.no_slots

    def synchronize(self, seconds: float) -> bool:
        return True

    def release(self, devices_have_ended: bool) -> None:
        assert devices_have_ended


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(_native, "cuda", fake)
    return fake


def wait_for_look(cuda: FakeCuda) -> None:
    """Until a look has begun after this call, and ended (a second one has begun)."""
    for _ in range(2):
        cuda.looked.clear()
        assert cuda.looked.wait(30)


def test_nothing_recorded() -> None:
    jax_ep.check()


def test_check_raises_as_often_as_it_is_called(cuda: FakeCuda) -> None:
    jax_ep.check()
    cuda.record = RECORD
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{RECORD}$"):
            jax_ep.check()


def test_check_without_a_cuda_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda", None)
    jax_ep.check()
    assert runtime.describe() == "CUDA: not built"


@pytest.fixture
def watcher(cuda: FakeCuda) -> Iterator[Watcher]:
    watcher = Watcher()
    yield watcher
    watcher.stop()


def test_watcher_prints_once(
    cuda: FakeCuda, watcher: Watcher, capfd: pytest.CaptureFixture[str]
) -> None:
    wait_for_look(cuda)
    assert capfd.readouterr().err == ""
    cuda.record = RECORD
    wait_for_look(cuda)
    wait_for_look(cuda)
    watcher.stop()
    assert capfd.readouterr().err == f"jax_ep: {RECORD}\n"


def test_watcher_prints_again_what_has_changed(
    cuda: FakeCuda, watcher: Watcher, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another device may record later that a peer may yet write to it."""
    warned = f"{RECORD}; device 3 may yet write to arrays on device 1"
    for record in (RECORD, warned):
        cuda.record = record
        wait_for_look(cuda)
        wait_for_look(cuda)
    watcher.stop()
    assert capfd.readouterr().err == f"jax_ep: {RECORD}\njax_ep: {warned}\n"


def test_watcher_goes_on_after_an_error(
    cuda: FakeCuda, watcher: Watcher, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another device of this process may still wait for a process that dies."""
    cuda.record = RECORD
    wait_for_look(cuda)
    cuda.news = ["process 1 has died"]
    wait_for_look(cuda)
    watcher.stop()
    assert capfd.readouterr().err == f"jax_ep: {RECORD}\njax_ep: process 1 has died\n"


def test_watcher_asks_who_has_left(
    cuda: FakeCuda, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of processes of other hosts, once a device has waited for one."""
    monkeypatch.setattr(nvshmem, "have_left", lambda: {2, 3})
    wait_for_look(cuda)
    assert cuda.left == []
    cuda.awaited = [1, 3]
    deadline = time.monotonic() + 20
    while not cuda.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cuda.left == [3]


def test_watcher_does_not_wait_for_an_answer(
    cuda: FakeCuda, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX's service has no deadline: looks go on, the end comes, and what is heard then is late."""
    is_asked, may_answer = threading.Event(), threading.Event()

    def have_left() -> set[int]:
        is_asked.set()
        may_answer.wait(60)
        return {3}

    monkeypatch.setattr(nvshmem, "have_left", have_left)
    cuda.awaited = [3]
    assert is_asked.wait(20)
    wait_for_look(cuda)
    question = watcher._question
    assert question is not None
    watcher.stop()
    assert question.is_alive()
    may_answer.set()
    question.join(20)
    assert not question.is_alive()
    assert cuda.left == []


def test_watcher_goes_on_without_stderr(
    cuda: FakeCuda, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(sys, "stderr", closed)
    cuda.news = ["process 1 has died"]
    wait_for_look(cuda)
    wait_for_look(cuda)  # a second one, after that which printed
    assert watcher._thread.is_alive()


@pytest.mark.versions
def test_a_forked_child_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its exit would tell the peers that the parent has left, whose memory it shares."""
    left: list[bool] = []
    monkeypatch.setattr(runtime, "_leave", lambda: left.append(True))
    jax_ep.finalize()
    assert left == [True]
    monkeypatch.setattr(runtime.os, "getpid", lambda: 1)
    jax_ep.finalize()
    assert left == [True]


class WaitingCuda(FakeCuda):
    """A device with a kernel that waits for a rank which never comes.

    The first `num_interrupts` looks whether it has ended are interrupted by Ctrl-C.
    """

    def __init__(self, num_interrupts: int) -> None:
        super().__init__()
        self.waits_ended = 0
        self.released: list[bool] = []
        self.num_interrupts = num_interrupts

    def end_own_waits(self) -> None:
        self.waits_ended += 1

    def synchronize(self, seconds: float) -> bool:
        assert seconds <= 1  # no signal's handler runs meanwhile
        if self.num_interrupts > 0:
            self.num_interrupts -= 1
            signal.raise_signal(signal.SIGINT)
        time.sleep(min(seconds, 0.01))
        return self.waits_ended > 0

    def release(self, ended: bool) -> None:
        self.released.append(ended)


@pytest.fixture
def waiting(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WaitingCuda]:
    fake = WaitingCuda(request.param)
    monkeypatch.setattr(_native, "cuda", fake)
    monkeypatch.setattr(runtime, "_watcher", Watcher())
    # A shell starts what runs in its background with SIGINT ignored, which Python leaves as it is.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield fake
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = jax_ep.get_timeout()
    jax_ep.set_timeout(arrival=0.2, progress=0.1)
    monkeypatch.setattr(runtime, "_END_OF_CALL", 0.1)
    yield
    jax_ep.set_timeout(**before._asdict())


@pytest.mark.usefixtures("short_timeouts")
@pytest.mark.parametrize("waiting", [0], indirect=True)
def test_leaving_waits_for_ranks_that_are_late(waiting: WaitingCuda) -> None:
    """For both timeouts; who is late finds its peers as it left them."""
    start = time.monotonic()
    jax_ep.finalize()
    assert time.monotonic() - start > 0.4
    assert waiting.waits_ended == 0
    assert waiting.released == [False]
    assert runtime._watcher is None
    jax_ep.finalize()
    assert waiting.released == [False]


@pytest.mark.parametrize(("waiting", "ended"), [(1, True), (2, False)], indirect=["waiting"])
def test_interrupt_while_leaving(waiting: WaitingCuda, ended: bool) -> None:
    """Ctrl-C ends the waits at once, and the process has left; a second one ends that too."""
    with pytest.raises(KeyboardInterrupt):
        jax_ep.finalize()
    assert waiting.waits_ended == 1
    assert waiting.released == [ended]
    assert runtime._watcher is None


def test_an_interrupt_of_the_watchers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever Ctrl-C comes, the process has left afterwards."""

    class Interrupted(Watcher):
        def stop(self) -> None:
            super().stop()
            raise KeyboardInterrupt

    fake = WaitingCuda(0)
    fake.waits_ended = 1  # nothing waits
    monkeypatch.setattr(_native, "cuda", fake)
    monkeypatch.setattr(runtime, "_watcher", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        jax_ep.finalize()
    assert fake.released == [True]
    assert runtime._watcher is None


LEAVE_AT_EXIT = """
import atexit, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from test_set_up import Watcher, WaitingCuda, jax_ep, runtime
jax_ep._native.cuda = cuda = WaitingCuda(int(sys.argv[1]))
runtime._watcher = Watcher()
atexit.register(lambda: print(cuda.waits_ended, cuda.released))  # after the next one
runtime._finalize_at_exit()
"""


@pytest.mark.versions
@pytest.mark.parametrize(
    ("num_interrupts", "left"),
    [(1, "1 [True]"), (2, "1 [False]")],
)
def test_leaving_at_exit(num_interrupts: int, left: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_AT_EXIT, str(num_interrupts)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == [left], done.stderr
    assert done.returncode == 0
    assert "KeyboardInterrupt" in done.stderr


def test_watcher_takes_a_last_look(
    cuda: FakeCuda, watcher: Watcher, capfd: pytest.CaptureFixture[str]
) -> None:
    watcher._stopped.set()
    watcher._thread.join(30)
    cuda.record = RECORD
    watcher.stop()
    assert capfd.readouterr().err == f"jax_ep: {RECORD}\n"


def test_set_timeout_reaches_cuda_at_once(cuda: FakeCuda) -> None:
    before = jax_ep.get_timeout()
    try:
        jax_ep.set_timeout(7)
        with pytest.raises(ValueError, match="must be above 0"):
            jax_ep.set_timeout(-1)
        jax_ep.set_timeout(progress=3)
        assert cuda.timeouts == [(7, 7), (7, 3)]
    finally:
        jax_ep.set_timeout(**before._asdict())


@pytest.mark.versions
def test_initialize_alone() -> None:
    for staging_bytes in (0, 4096):
        jax_ep.initialize(staging_bytes=staging_bytes)
        jax_ep.initialize()
        jax_ep.finalize()
        jax_ep.finalize()
    jax_ep.initialize()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("staging_bytes", -1, ValueError, "must be at least 0; got -1"),
        ("staging_bytes", 1.5, TypeError, "must be an integer; got 1.5"),
        ("staging_bytes", "1", TypeError, "must be an integer; got '1'"),
        ("slot_bytes", -1, ValueError, "must be at least 0; got -1"),
        ("slot_bytes", 6.5e7, TypeError, "must be an integer; got 65000000.0"),
        (
            *("slot_bytes", 131327, ValueError),
            "must be 0 or at least 131328 for each device of the job; got 131327",
        ),
    ],
)
def test_bad_sizes(name: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"jax_ep.initialize: {name} {message}"):
        jax_ep.initialize(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("default", [0, limits.DEFAULT_SLOT_BYTES])
def test_slots_of_one_process(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, default: int
) -> None:
    """What initialize() says holds until finalize(), whatever is lowered meanwhile."""
    monkeypatch.setattr(compat, "has_live_client", lambda platform: True)
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [])
    monkeypatch.setattr(runtime, "_default_slot_bytes", default)
    monkeypatch.setattr(runtime, "_slot_bytes", default)
    try:
        runtime.require_cuda("a first program")
        assert runtime.has_slots() == (default > 0)
        cuda.problem = "devices are set up with slots of another size"
        with pytest.raises(RuntimeError, match=cuda.problem):
            jax_ep.initialize(slot_bytes=1 << 20)
        cuda.problem = None
        jax_ep.initialize(staging_bytes=4096)
        jax_ep.finalize()
        jax_ep.initialize(slot_bytes=1 << 21)
        assert runtime.has_slots()
        runtime.require_cuda("a program")
        jax_ep.initialize(staging_bytes=4096)
        jax_ep.finalize()
        jax_ep.initialize(slot_bytes=0)
        assert not runtime.has_slots()
        jax_ep.finalize()
        assert runtime.has_slots() == (default > 0)
        runtime.require_cuda("another program")
    finally:
        jax_ep.finalize()
    assert cuda.slot_bytes == [default, default, 1 << 21, 1 << 21, 1 << 21, 0, default]
    assert cuda.requires_slots == [False, False, True, False, False, True, False]


def test_no_memory_for_slots(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is said once, and changes no program: other processes may have them."""
    monkeypatch.setattr(compat, "has_live_client", lambda platform: True)
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [])
    monkeypatch.setattr(runtime, "_slot_bytes", 1 << 26)
    monkeypatch.setattr(runtime, "_told_of_no_slots", False)
    cuda.no_slots = "slots of 67108864 bytes on CUDA device 0: out of memory"
    try:
        for _ in range(2):
            runtime.require_cuda("a program")
            jax_ep.initialize()
            assert runtime.has_slots()
    finally:
        jax_ep.finalize()
    line = capfd.readouterr().err
    assert line.count("\n") == 1, line
    assert f"for there are none: {cuda.no_slots}. Leave them memory" in line
    assert "JAX_EP_SLOTS=0" in line


def test_path_and_slots_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_EP_SLOTS", raising=False)
    assert environment.has_slots()
    monkeypatch.setenv("JAX_EP_PATH", "staged")
    monkeypatch.setenv("JAX_EP_SLOTS", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from jax_ep import runtime; print(runtime._path, runtime._slot_bytes)",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["staged", "0"], done.stderr
    monkeypatch.setenv("JAX_EP_PATH", "fast")
    message = "environment variable JAX_EP_PATH must be one of direct, staged; got 'fast'"
    with pytest.raises(ValueError, match=message):
        environment.path()
    monkeypatch.setenv("JAX_EP_SLOTS", "on")
    message = "environment variable JAX_EP_SLOTS must be 0 or 1; got 'on'"
    with pytest.raises(ValueError, match=message):
        environment.has_slots()


@pytest.mark.skipif(_native.cuda is None, reason="jax_ep is built without CUDA")
def test_cuda_module_before_set_up() -> None:
    """Nothing of this calls into CUDA, so it needs neither GPU nor driver."""
    if "not set up" not in runtime.describe():
        pytest.skip("CUDA devices are set up in this process")
    assert _native.cuda.recorded_error() is None
    assert _native.cuda.synchronize(1.0)
    _native.cuda.release(True)
    _native.cuda.release(False)
    _native.cuda.close_descriptors()
