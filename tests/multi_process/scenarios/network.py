"""NVSHMEM's start and end with a native module that does what a test says, in several processes."""

import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from job import NUM_PROCESSES, PROCESS, join, mark, wait_for_marks

import jax_ep
from jax_ep import _native, compat, nodes, nvshmem, runtime
from jax_ep.join import Attempt

LAST = NUM_PROCESSES - 1


class FakeCall:
    """A call on a thread, as the native module's."""

    def __init__(self, call: Callable[[], list[str]]) -> None:
        self._results: list[list[str]] = []
        self._errors: list[Exception] = []
        self._ended = threading.Event()
        threading.Thread(target=self._run, args=(call,), daemon=True).start()

    def _run(self, call: Callable[[], list[str]]) -> None:
        try:
            self._results.append(call())
        except Exception as error:
            self._errors.append(error)
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        return self._ended.wait(seconds)

    def result(self) -> list[str]:
        if self._errors:
            raise self._errors[0]
        return self._results[0]


class FakeNative:
    """A module whose calls are collective as NVSHMEM's: all processes have to come to `start`."""

    def __init__(self, name: str) -> None:
        self.name, self.version, self.links = name, "3.4.5", ["good"] * NUM_PROCESSES
        self.problem = ""
        self.ends = self.ended = False

    def loaded_version(self) -> str:
        return self.version

    def free_bytes(self, ordinal: int) -> int:
        return 1 << 30

    def bus_id(self, ordinal: int) -> str:
        return f"bus{PROCESS}"

    def unique_id(self) -> bytes:
        assert PROCESS == 0
        return b"unique" + bytes(122)

    def start(
        self,
        unique_id: bytes,
        rank: int,
        num_ranks: int,
        ordinal: int,
        region_bytes: int,
        has_slots: bool,
    ) -> FakeCall:
        assert unique_id == b"unique" + bytes(122)
        assert (rank, num_ranks, ordinal) == (PROCESS, NUM_PROCESSES, 3)
        self.region_bytes, self.has_slots = region_bytes, has_slots
        return FakeCall(self._start)

    def part(self) -> str:
        return "part"

    def _start(self) -> list[str]:
        if self.problem == "hangs":
            threading.Event().wait(60)
        if self.problem:
            raise RuntimeError(self.problem)
        mark(f"{self.name} started")
        wait_for_marks(f"{self.name} started", NUM_PROCESSES)
        return []

    def check_links(self, timeout: float) -> FakeCall:
        return FakeCall(lambda: self.links)

    def finalize(self) -> FakeCall:
        self.ends = True
        return FakeCall(self._finalize)

    def _finalize(self) -> list[str]:
        mark(f"{self.name} ended")
        wait_for_marks(f"{self.name} ended", NUM_PROCESSES)
        self.ended = True
        return []


def start(
    native: FakeNative,
    *,
    wanted: bool | None = True,
    spans_nodes: bool = False,
    ordinals: tuple[int, ...] = (3,),
    heap_bytes: int = 1 << 20,
    timeout: float = 20,
) -> float:
    """What initialize() does; its seconds, if nothing is raised."""
    nvshmem.load = lambda: native
    begin = time.monotonic()
    attempt = Attempt(compat.coordination_client(), timeout)
    attempt.join("an address")
    try:
        told = attempt.exchange(nvshmem.offer(wanted, spans_nodes, ordinals, heap_bytes))
        nvshmem.start(attempt, timeout, told, PROCESS, ordinals)
    except BaseException as error:
        attempt.tell_failure(error)
        raise
    return time.monotonic() - begin


def error_of(native: FakeNative, **options: Any) -> tuple[str, float]:
    """The error of start(), and its seconds."""
    begin = time.monotonic()
    try:
        start(native, **options)
    except RuntimeError as error:
        assert not nvshmem.is_running()
        return str(error), time.monotonic() - begin
    raise AssertionError("nothing was raised")


def cases() -> None:
    """All of them, one after the other."""
    join()
    for case in (
        all_start_and_end,
        one_cannot_take_part,
        they_differ,
        one_fails,
        one_hangs,
        a_row_is_missing,
        one_does_not_leave,
        a_device_is_at_work,
        gpus_on_two_hosts,
        the_service_is_gone,  # for good
    ):
        importlib.reload(nvshmem)
        case(FakeNative(case.__name__))
        mark(case.__name__)
        wait_for_marks(case.__name__, NUM_PROCESSES)
        print("RIGHT", case.__name__)


def the_service_is_gone(native: FakeNative) -> None:
    """jax.distributed has been shut down before: nobody can agree to end, nor waits for that."""
    start(native)
    jax.distributed.shutdown()
    begin = time.monotonic()
    nvshmem.leave(devices_have_ended=True)
    assert time.monotonic() - begin < 2
    assert not native.ends


def all_start_and_end(native: FakeNative) -> None:
    for again in ("", " again"):
        native.name, native.ended = f"all{again}", False
        start(native)
        assert nvshmem.is_running()
        assert native.has_slots
        assert nvshmem.have_left() == set(), "those of an earlier network do not count"
        mark(f"{native.name} seen")
        wait_for_marks(f"{native.name} seen", NUM_PROCESSES)
        nvshmem.leave(devices_have_ended=True)
        assert native.ended
        assert not nvshmem.is_running()
        nvshmem.leave(devices_have_ended=True)


def one_cannot_take_part(native: FakeNative) -> None:
    """Nobody starts: where it was demanded with an error, else for the reason that is kept."""
    two: dict[str, Any] = {"ordinals": (3, 4)} if PROCESS == LAST else {}
    text, seconds = error_of(native, **two)
    assert f"process {LAST}: it has 2 CUDA devices" in text, text
    assert seconds < 10
    start(native, wanted=None, spans_nodes=True, **two)
    assert not nvshmem.is_running()
    assert f"process {LAST}: it has 2 CUDA devices" in nvshmem.describe()
    start(native, wanted=None, spans_nodes=False, **two)
    assert "the job lies on one node" in nvshmem.describe()
    start(native, wanted=False, spans_nodes=True)
    assert not nvshmem.is_running()
    start(native, wanted=None, spans_nodes=True)
    assert nvshmem.is_running()
    nvshmem.leave(devices_have_ended=True)


def they_differ(native: FakeNative) -> None:
    for what, options in (
        ("network", {"wanted": PROCESS != LAST}),
        ("heap_bytes", {"heap_bytes": 1 << 20 if PROCESS else 1 << 21}),
        ("version of NVSHMEM", {}),
    ):
        native.version = "3.8.0" if what.startswith("version") and PROCESS == LAST else "3.4.5"
        text, _ = error_of(native, **options)
        assert what in text, text
        assert "must be the same in all processes" in text, text


def cannot_again(native: FakeNative) -> None:
    """NVSHMEM stands half way in this process; the others hear of that."""
    text, seconds = error_of(native)
    assert "NVSHMEM cannot be started again" in text, text
    assert seconds < 10


def one_fails(native: FakeNative) -> None:
    """While the others wait for it inside NVSHMEM: they hear of it at once."""
    native.problem = "no transport" if PROCESS == LAST else "hangs"
    text, seconds = error_of(native)
    expected = "no transport" if PROCESS == LAST else f"process {LAST} failed: no transport"
    assert expected in text, text
    assert seconds < 10, "the timeout is 20 s"
    cannot_again(native)


def one_hangs(native: FakeNative) -> None:
    native.problem = "hangs" if PROCESS == LAST else ""
    text, seconds = error_of(native, timeout=1.5)
    assert "NVSHMEM has not started within 1.5 s" in text, text
    assert seconds < 10
    cannot_again(native)


def a_row_is_missing(native: FakeNative) -> None:
    if PROCESS == LAST:
        native.links = ["silent", *native.links[1:]]
    text, seconds = error_of(native)
    assert "no row of process 0 has arrived" in text, text
    assert (f"process {LAST} failed" in text) == (PROCESS != LAST), text
    assert seconds < 10


def one_does_not_leave(native: FakeNative) -> None:
    nvshmem._LEAVE_TIMEOUT = 1.0
    start(native)
    begin = time.monotonic()
    if PROCESS != LAST:
        nvshmem.leave(devices_have_ended=True)
        assert 0.9 < time.monotonic() - begin < 6
        assert not native.ended
        mark("left")
    wait_for_marks("left", NUM_PROCESSES - 1)
    if PROCESS == LAST:
        assert nvshmem.have_left() == set(range(LAST)), "who waits for them is to hear of it"
    nvshmem.leave(devices_have_ended=True)
    assert nvshmem.have_left() == set()
    assert not native.ends, "NVSHMEM's end would wait for those who have gone"
    cannot_again(native)


def a_device_is_at_work(native: FakeNative) -> None:
    start(native)
    begin = time.monotonic()
    nvshmem.leave(devices_have_ended=False)
    assert time.monotonic() - begin < 1
    assert not native.ended
    cannot_again(native)


class FakeCuda:
    """What initialize() asks of the CUDA module."""

    def import_memory(self, exports: list[str]) -> None:
        self.imported = exports

    def close_descriptors(self) -> None:
        pass

    def join_network(self, *arguments: object) -> None:
        self.joined = arguments

    def slots_problem(self) -> None:
        pass

    slot_areas = (4096, 4096, 4096)  # by process

    def slot_area_bytes(self) -> int:
        return self.slot_areas[PROCESS]


def gpus_on_two_hosts(native: FakeNative) -> None:
    """The last process is on another host: memory is mapped within a host, all start NVSHMEM."""
    nvshmem.load = lambda: native
    nodes.socket.gethostname = lambda: f"host{PROCESS // LAST}"
    cuda = _native.cuda = FakeCuda()
    compat.has_live_client = lambda platform: platform == "cuda"
    runtime._set_up_cuda = lambda *options: [3]
    runtime._export_cuda = lambda: f"memory {PROCESS}"
    runtime._release_cuda = lambda must_end=False: True
    os.environ.pop("JAX_EP_NETWORK_SLOTS", None)
    jax_ep.initialize()
    assert nvshmem.is_running()
    assert runtime.has_network_slots()
    everywhere = [f"memory {p}" for p in range(NUM_PROCESSES)]
    assert cuda.imported == (
        ["", "", everywhere[LAST]] if PROCESS == LAST else [*everywhere[:2], ""]
    )
    assert native.has_slots
    assert native.region_bytes == 3 << 18  # of the heap that the cases before have asked for
    assert cuda.joined == ("part", ("host0", "host0", "host1"), 0, True)
    refusal = ""
    try:
        runtime.require_cpu("a call", across_processes=True)
    except RuntimeError as error:
        refusal = str(error)
    assert "run on several hosts" in refusal, "ranks of two hosts would wait for each other on CPU"
    jax_ep.finalize()
    assert native.ended
    # Without slots on one host none has them across nodes.
    FakeCuda.slot_areas = (4096, 4096, 0)
    jax_ep.initialize()
    assert cuda.joined[-1] is False
    assert not runtime.has_network_slots()
    jax_ep.finalize()
    # Nor where they are not wanted.
    FakeCuda.slot_areas = (4096, 4096, 4096)
    os.environ["JAX_EP_NETWORK_SLOTS"] = "0"
    jax_ep.initialize()
    assert not native.has_slots
    assert cuda.joined[-1] is False
    jax_ep.finalize()
