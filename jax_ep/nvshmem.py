"""The network between nodes: NVSHMEM's start and end, by all processes of the job together.

NVSHMEM starts and ends collectively and without a timeout. So processes first tell each other,
over JAX's coordination service, whether each of them can; then all call it, on threads that can be
left behind, and look meanwhile whether another one has failed. What cannot be brought to an orderly
end is left to the end of the process.
"""

import collections
import contextlib
import ctypes
import importlib
import importlib.util
import os
import pathlib
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

from jax_ep import environment
from jax_ep.join import Attempt

INTERFACE_VARIABLE = "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"
HEAP_VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"  # NVSHMEM's own; it takes the size from nowhere else
DEFAULT_HEAP_BYTES = 1 << 30  # likewise

_MODULE = "jax_ep._nvshmem"
_HOST_LIBRARY = "libnvshmem_host.so.3"
_LEAVE_TIMEOUT = 5.0  # seconds in which all processes come to the end, once one has
_LOOK_INTERVAL = 0.1  # seconds between looks at what the others say
_DEFAULT = "default"  # of the heap
_NONE = "none"  # of a process that is not to take part in a network
_TROUBLES = {
    "silent": "no row of process {} has arrived",
    "wrong": "what has arrived from process {} is not its row, or has come after its signal",
    "unknown": "nothing is known of process {}",
}

_attempt: Attempt | None = None  # by which the network was started; None: it is not running
_absence = "jax_ep.initialize() has not been called"  # why it is not
_lost = ""  # why NVSHMEM cannot be started again in this process


class UnavailableError(Exception):
    """This process cannot take part in a network; the message says why, and what to do."""


# The module ---------------------------------------------------------------------------------------


def load() -> Any:
    """The native module, with NVSHMEM's library: the copy that JAX has loaded, if it has.

    Raises:
        UnavailableError: if one of them is not here, or does not load.
    """
    if importlib.util.find_spec(_MODULE) is None:
        raise UnavailableError(
            "this installation of jax_ep was built without NVSHMEM: install nvidia-nvshmem-cu13 "
            "where the build finds it, and build again with -C cmake.define.JAX_EP_NVSHMEM=ON"
        )
    _load_host_library()
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise UnavailableError(
            f"{_MODULE} does not load ({error}): it was built with another version of NVSHMEM than "
            f"the {_HOST_LIBRARY} here; it runs with that one and later ones"
        ) from error


def _load_host_library() -> None:
    with contextlib.suppress(OSError):  # it is not loaded yet
        ctypes.CDLL(_HOST_LIBRARY, mode=os.RTLD_NOLOAD)
        return
    folder = package_folder()
    try:
        ctypes.CDLL(str(folder / "lib" / _HOST_LIBRARY) if folder else _HOST_LIBRARY)
    except OSError as error:
        raise UnavailableError(
            f"NVSHMEM's library does not load ({error}): pip install nvidia-nvshmem-cu13"
        ) from error


def package_folder() -> pathlib.Path | None:
    """Where the package nvidia-nvshmem-cu13 keeps NVSHMEM, if it is installed."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return pathlib.Path(places[0]) if places else None


# Start --------------------------------------------------------------------------------------------


def offer(
    wanted: bool | None, spans_nodes: bool, ordinals: Sequence[int], heap_bytes: int | None
) -> str:
    """What this process tells the others before `start`, which takes what all have told.

    Args:
        wanted: whether there is to be a network; None: if the job spans nodes and every process can
            take part.
        spans_nodes: whether it does; the same in all processes.
        ordinals: of this process's CUDA devices.
        heap_bytes: size of NVSHMEM's symmetric heap; None: what the environment says.
    """
    if heap_bytes is not None:
        os.environ[HEAP_VARIABLE] = str(heap_bytes)
    heap = os.environ.get(HEAP_VARIABLE, _DEFAULT).replace(" ", "")
    ability, gpu, free = _NONE, "", 0
    if wanted or (wanted is None and spans_nodes):
        try:
            native = _able_module(ordinals, heap)
            ability = f"NVSHMEM {native.loaded_version()}"
            gpu = f"{socket.gethostname()}/{native.bus_id(ordinals[0])}"
            free = native.free_bytes(ordinals[0])
        except UnavailableError as error:
            ability = f"!{error}"
    return f"{wanted} {heap} {free} {gpu} {ability}"


def start(
    attempt: Attempt, timeout: float, told: Sequence[str], process: int, ordinals: Sequence[int]
) -> None:
    """Starts NVSHMEM in all processes of the job, or in none. Collective.

    Args:
        attempt: to join, which all processes have come to.
        timeout: seconds for each step.
        told: what `offer` gave, by process.
        process: the number of this one, which becomes its rank in NVSHMEM.
        ordinals: of this process's CUDA devices.

    Raises:
        RuntimeError: in all processes, if one does not agree in the options, fails, or is late; or
            if one cannot take part in a network that is wanted.
    """
    global _attempt, _absence, _lost
    wishes, heaps, frees, gpus, abilities = zip(*(text.split(" ", 4) for text in told), strict=True)
    _require_same("network (or JAX_EP_NETWORK)", wishes)
    unable = [f"process {i}: {a[1:]}" for i, a in enumerate(abilities) if a.startswith("!")]
    if not unable and abilities[0] != _NONE:
        unable = _without_room(heaps, frees, gpus)
    if unable:
        _absence = "; ".join([*unable[:2], *(["and others"] if len(unable) > 2 else [])])
        if wishes[0] == str(True):
            raise RuntimeError(f"jax_ep.initialize: there can be no network. {_absence}")
        return
    if abilities[0] == _NONE:
        _absence = "the job lies on one node, or network=False was passed"
        return
    _require_same("heap_bytes (or NVSHMEM_SYMMETRIC_SIZE)", heaps)
    _require_same("the loaded version of NVSHMEM", abilities)

    num_region_bytes = region_bytes(heaps[0])
    native, (ordinal,) = load(), ordinals
    ids = attempt.exchange(native.unique_id().hex() if process == 0 else "")
    _lost = "it was started before in this process, and not all came to its end"
    call = native.start(
        bytes.fromhex(ids[0]),
        process,
        len(told),
        ordinal,
        num_region_bytes,
        environment.network_slots() is not False,
    )
    _result(call, timeout, "NVSHMEM has not started", attempt)
    attempt.exchange("started")
    links = _result(native.check_links(timeout), 2 * timeout, "the network's check has not ended")
    troubles = [_TROUBLES[link].format(i) for i, link in enumerate(links) if link != "good"]
    if troubles:
        raise RuntimeError(f"jax_ep.initialize: over the network {'; '.join(troubles)}")
    attempt.exchange("linked")
    _attempt = attempt


def region_bytes(heap: str) -> int:
    """What calls have of the heap: three quarters, the rest is NVSHMEM's own and for its checks.

    Args:
        heap: as for `num_heap_bytes`.
    """
    return num_heap_bytes(heap) // 4 * 3 // 128 * 128


def num_heap_bytes(heap: str) -> int:
    """The size of the heap, in bytes.

    Args:
        heap: the size as NVSHMEM takes it: a number, with K, M, G or T behind it; or "default".

    Raises:
        UnavailableError: if it is no such size.
    """
    if heap == _DEFAULT:
        return DEFAULT_HEAP_BYTES
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([kmgt]?)b?", heap.lower())
    if match is None:
        raise UnavailableError(
            f"{HEAP_VARIABLE} must be a number of bytes, or one with K, M, G or T behind it; got "
            f"{heap!r}"
        )
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


def _able_module(ordinals: Sequence[int], heap: str) -> Any:
    if _lost:
        raise UnavailableError(f"NVSHMEM cannot be started again: {_lost}. Start the job again")
    if len(ordinals) != 1:
        raise UnavailableError(
            f"it has {len(ordinals)} CUDA devices, and NVSHMEM takes one in a process: start one "
            "process for each GPU (jax.distributed.initialize(local_device_ids=...))"
        )
    wish = os.environ.get(INTERFACE_VARIABLE, "")
    if wish and not has_interface(wish):
        # NVSHMEM would end the process.
        raise UnavailableError(f"no network interface is as {INTERFACE_VARIABLE}={wish} says")
    num_heap_bytes(heap)
    return load()


def _without_room(heaps: Sequence[str], frees: Sequence[str], gpus: Sequence[str]) -> list[str]:
    """Of processes whose GPU has no room for its heaps: why. Those of tests may share one."""
    num_sharers = collections.Counter(gpus)
    problems = []
    for process, (heap, free, gpu) in enumerate(zip(heaps, frees, gpus, strict=True)):
        num_bytes = num_heap_bytes(heap) * num_sharers[gpu]
        if int(free) < num_bytes:
            problems.append(
                f"process {process}: its GPU has {free} bytes left, but NVSHMEM's heap takes "
                f"{num_bytes}: leave it memory by a smaller XLA_PYTHON_CLIENT_MEM_FRACTION, or "
                "pass heap_bytes"
            )
    return problems


def has_interface(wish: str) -> bool:
    """Whether the machine has a network interface that NVSHMEM would take.

    Args:
        wish: NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME: how names begin, with commas; after ``=`` whole
            names; after ``^`` those that it shall not take.
    """
    without, exact = wish.startswith("^"), wish.lstrip("^").startswith("=")
    names = wish.lstrip("^=").split(",")

    def matches(interface: str) -> bool:
        return any(interface == n if exact else interface.startswith(n) for n in names)

    return any(matches(interface) != without for _, interface in socket.if_nameindex())


def _require_same(what: str, values: Sequence[str]) -> None:
    for process, value in enumerate(values):
        if value != values[0]:
            raise RuntimeError(
                f"jax_ep.initialize: {what} must be the same in all processes; it is {values[0]} "
                f"in process 0 and {value} in process {process}"
            )


def _result(call: Any, timeout: float, late: str, attempt: Attempt | None = None) -> list[str]:
    """What the native call gives, or raises. It is left behind if it is late, or another fails."""
    deadline = time.monotonic() + timeout
    while not call.wait(_LOOK_INTERVAL):
        if attempt is not None:
            attempt.raise_failure()
        if time.monotonic() > deadline:
            raise RuntimeError(f"jax_ep.initialize: {late} within {timeout:g} s")
    return list(call.result())


# End ----------------------------------------------------------------------------------------------


def leave(devices_have_ended: bool) -> None:
    """Ends NVSHMEM if all processes come to that; else it stays until the process ends.

    Args:
        devices_have_ended: whether this process's GPUs have no work left. A kernel that still runs
            may write to a peer's heap.
    """
    global _attempt, _absence, _lost
    attempt, _attempt = _attempt, None
    _absence = "jax_ep.finalize() has been called"
    if attempt is None or not devices_have_ended:
        return
    attempt.tell_left()
    if attempt.meet("leave", _LEAVE_TIMEOUT):
        return
    with contextlib.suppress(Exception):  # what `_lost` says is true then
        _result(load().finalize(), _LEAVE_TIMEOUT, "NVSHMEM has not ended")
        _lost = ""


def have_left() -> set[int]:
    """Processes whose GPUs take part in no call over the network any more, for they have left."""
    return _attempt.have_left() if _attempt is not None else set()


def is_running() -> bool:
    """Whether this process can reach others over the network."""
    return _attempt is not None


def describe() -> str:
    """In words: whether there is a network, and why not."""
    return "NVSHMEM runs" if is_running() else f"none ({_absence})"
