"""Set-up: timeouts, joining processes, device errors, and which backends this installation has."""

import atexit
import contextlib
import importlib
import importlib.util
import numbers
import operator
import os
import pathlib
import re
import secrets
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ep import _cpu, compat

# None if this build has no CUDA part; one that is installed but does not load is an error.
_cuda: Any = None
if importlib.util.find_spec("jax_ep._cuda") is not None:
    _cuda = importlib.import_module("jax_ep._cuda")

_TIMEOUT_VARIABLE = "JAX_EP_TIMEOUT"
_PATH_VARIABLE = "JAX_EP_PATH"
_PATHS = ("direct", "staged")
_SCHEDULING_FLAG = "--xla_gpu_command_buffer_scheduling_mode"
_ORDERED_MODES = ("LHS", "SERIALIZE")  # the first is XLA's default
_LONGEST_TIMEOUT = 1e8  # seconds; fits 64-bit nanoseconds with room to add to a clock
_KEY_PREFIX = "jax_ep"
_WATCH_INTERVAL = 0.25  # seconds

_path = "direct"
_recordable = True  # whether XLA may record calls in command buffers; fixed at registration
_connected = False
_set_up_lock = threading.Lock()  # programs may be lowered by several threads
_watcher: "_Watcher | None" = None  # None: no CUDA device is set up
# One array a device, in XLA's pool. While they live XLA does not give back the part of the pool
# that other processes have mapped, so that its addresses cannot come to mean other memory.
_pool_anchors: list[jax.Array] = []


# Timeouts -----------------------------------------------------------------------------------------


def set_timeout(seconds: float) -> None:
    """Sets how long an operation waits for a rank that does not come.

    On CPU the operation then ends with DEADLINE_EXCEEDED, naming the operation and the rank, and
    the runtime stays usable. On CUDA the kernel ends with NaN in its results, and the group is
    broken (see ``check``). The default is 30 s, or the environment variable ``JAX_EP_TIMEOUT``. It
    holds in this process, for compiled programs too: on CPU for calls that start afterwards, on
    CUDA at once.

    Args:
        seconds: the time in seconds, above 0 and at most 1e8 (three years).

    Raises:
        TypeError: if ``seconds`` is not a number.
        ValueError: if ``seconds`` is not above 0 and at most 1e8.
    """
    seconds = _checked_seconds("jax_ep.set_timeout: seconds", seconds)
    _cpu.set_timeout(seconds)
    if _cuda is not None:
        _cuda.set_timeout(seconds)


def _checked_seconds(what: str, seconds: float) -> float:
    if not isinstance(seconds, numbers.Real):
        raise TypeError(f"{what} must be a number; got {seconds!r}")
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ValueError(f"{what} must be above 0 and at most {_LONGEST_TIMEOUT:g}; got {seconds}")
    return float(seconds)


def get_timeout() -> float:
    """The time in seconds that ``set_timeout`` sets."""
    return float(_cpu.timeout())


# Errors that kernels record -----------------------------------------------------------------------


def check() -> None:
    """Raises the error that a CUDA kernel of this process has recorded, if one has.

    A kernel that waits in vain for a rank cannot raise: after the timeout it fills its results with
    NaN (integers with 0, rows with -1) and records what it waited for. The group is broken then:
    later calls fail at once, in this process and, after their own timeout, in the others.
    ``jax.block_until_ready`` does not show it, so call ``check`` after it where NaN would go
    unnoticed, say before a checkpoint is written. The next call of an operation raises the error
    too, and it is printed once to stderr within a second; neither happens by itself in a program
    that XLA replays from a command buffer, the printing does.

    Once every rank can come again, ``finalize()`` and ``initialize()`` in all processes mend the
    group. On CPU the operations raise by themselves, and this does nothing.

    Raises:
        RuntimeError: the record in words: the operation, the rank, the rank it waited for, and the
            epochs (calls of this pair of ranks) that it expected and saw.
    """
    error = None if _cuda is None else _cuda.recorded_error()
    if error is not None:
        raise RuntimeError(error)


class _Watcher:
    """Prints the first error that a kernel records, once.

    It looks at host memory that the kernels write, without a call into CUDA.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._printed = False
        self._thread = threading.Thread(target=self._watch, name="jax_ep watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._printed and not self._stopped.wait(_WATCH_INTERVAL):
            self._look()

    def _look(self) -> None:
        error = _cuda.recorded_error()
        if error is not None and not self._printed:
            self._printed = True
            print(f"jax_ep: {error}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Ends the thread, after a last look."""
        self._stopped.set()
        self._thread.join()
        self._look()


# Joining processes --------------------------------------------------------------------------------


def initialize(*, timeout: float = 60.0, staging_bytes: int = 0) -> None:
    """Joins the processes of a multi-process job. Collective: every process calls it once.

    Call it after ``jax.distributed.initialize()`` and before the first program that uses this
    library is compiled. With one process there is nothing to do but for ``staging_bytes``, and
    after ``finalize()``. On CPU the processes must run on one host as one user: control messages go
    over Unix sockets, and rows are read straight from the owner's memory (``process_vm_readv``).

    On CUDA peers read and write XLA's buffers directly, where they can map them. They cannot with
    ``XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async``, nor where XLA's memory grew after this call
    (``XLA_PYTHON_CLIENT_PREALLOCATE=false``). What they would write there goes through a staging
    region: a fixed part of each device's memory, for one copy more. A call needs up to ``num_ranks
    * T * row bytes + 4 * max(capacity, T * K)`` of it, for rows and weights, and fp8 dispatch
    without ``dequantize`` ``capacity * H / 32`` for scales, each rounded up to 256 bytes. If that
    is not there the call fails with the number. With the environment variable
    ``JAX_EP_PATH=staged`` all buffers take this way.

    If it fails, in one process or in all, it leaves nothing behind: once the cause is gone every
    process may call it again (one in which it succeeded calls ``finalize()`` before).

    Args:
        timeout: seconds to wait for the other processes, in each of the few steps.
        staging_bytes: size of the staging region of each of this process's CUDA devices; 0 for
            none. A process that has one from before keeps it if it is larger.

    Raises:
        RuntimeError: if a process is missing or late (it is named), runs on another host, may not
            be read, or has failed; if the processes are joined already; if XLA's memory cannot be
            mapped by peers and ``staging_bytes`` is 0.
        TypeError: if ``timeout`` is not a number or ``staging_bytes`` not an integer.
        ValueError: if ``timeout`` is not above 0 and at most 1e8, or ``staging_bytes`` negative.
    """
    global _connected
    timeout = _checked_seconds("jax_ep.initialize: timeout", timeout)
    staging_bytes = _checked_bytes("jax_ep.initialize: staging_bytes", staging_bytes)
    if _connected:
        raise RuntimeError(
            "jax_ep.initialize: this process is connected already; call jax_ep.finalize() first"
        )
    if compat.process_count() == 1:
        if _cuda is not None and (staging_bytes > 0 or compat.has_live_client("cuda")):
            jax.local_devices()  # makes the clients
            if compat.has_live_client("cuda"):
                _set_up_cuda(staging_bytes)
        return
    try:
        _release_cuda(must_end=True)  # what a program before this call has set up
        attempt = _Attempt(compat.coordination_client(), timeout)
        try:
            _connect(attempt, timeout, staging_bytes)
        except BaseException as error:
            attempt.tell_failure(error)
            raise
    except BaseException:
        _leave()
        raise
    _connected = True
    _finalize_at_exit()


def _checked_bytes(what: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} must be an integer; got {value!r}") from None
    if value < 0:
        raise ValueError(f"{what} must be at least 0; got {value}")
    return value


def _connect(attempt: "_Attempt", timeout: float, staging_bytes: int) -> None:
    addresses = attempt.join(_cpu.listen())
    _cpu.connect(compat.process_index(), addresses, timeout)
    attempt.exchange("connected")
    exported = ""
    if _cuda is not None:
        # Making the clients is collective in a job of several processes; all of them come here.
        jax.local_devices()
        if compat.has_live_client("cuda"):
            _set_up_cuda(staging_bytes)
            exported = _export_cuda()
    exports = attempt.exchange(exported)
    if exported:
        _cuda.import_memory(exports)
    attempt.exchange("ready")
    if exported:
        _cuda.close_descriptors()


class _Attempt:
    """One attempt of all processes to join: a few rounds over the coordination service.

    Processes may have tried before, and not all of them as often. So an attempt of a process has a
    random name. Process 0 takes what each process offers at present, and tells each one, under the
    name of its attempt, whom it has met. From there on all keys carry the name of process 0's
    attempt, so nothing that an earlier one has left is ever read.
    """

    def __init__(self, client: Any, timeout: float) -> None:
        self._client = client
        self._timeout = timeout
        self._name = secrets.token_hex(8)
        self._num_processes = compat.process_count()
        self._process = compat.process_index()
        self._keys = ""  # prefix of the rounds after join
        self._round = 0

    def join(self, value: str) -> list[str]:
        """Every process's ``value``, by process."""
        offer = f"{_KEY_PREFIX}/join/{self._process}"
        self._client.key_value_set(offer, f"{self._name} {value}", allow_overwrite=True)
        try:
            roster = self._gather() if self._process == 0 else self._await_roster()
        finally:
            with contextlib.suppress(Exception):  # the service may be gone
                self._client.key_value_delete(offer)
        lines = roster.split("\n")
        self._keys = f"{_KEY_PREFIX}/{lines[0].split(' ')[0]}"
        return [line.split(" ", 1)[1] for line in lines]

    def _gather(self) -> str:
        deadline = time.monotonic() + self._timeout
        offers: list[str] = []
        for process in range(self._num_processes):
            try:
                offers.append(self._get(f"{_KEY_PREFIX}/join/{process}", deadline))
            except TimeoutError as error:
                missing = self._missing([process], error)
                self._dismiss(f"!{missing}")
                raise missing from error
        for offer in offers:
            self._send_roster(offer, "\n".join(offers))
        return "\n".join(offers)

    def _dismiss(self, roster: str) -> None:
        """Tells those who have come why nobody is met; what they offer then is a new attempt."""
        offers = self._offers()
        with contextlib.suppress(Exception):
            for process in offers:
                self._client.key_value_delete(f"{_KEY_PREFIX}/join/{process}")
            for offer in offers.values():
                self._send_roster(offer, roster)

    def _send_roster(self, offer: str, roster: str) -> None:
        self._client.key_value_set(f"{_KEY_PREFIX}/roster/{offer.split(' ')[0]}", roster)

    def _await_roster(self) -> str:
        key = f"{_KEY_PREFIX}/roster/{self._name}"
        try:
            roster = self._get(key, time.monotonic() + self._timeout)
        except TimeoutError as error:
            absent = set(range(self._num_processes)) - {self._process} - self._offers().keys()
            try:  # if process 0 gives up just now, it removes the offers and then says why
                roster = self._get(key, time.monotonic() + 1)
            except TimeoutError:
                raise self._missing(sorted(absent) or [0], error) from error
        if roster.startswith("!"):
            raise RuntimeError(roster[1:])
        return roster

    def _offers(self) -> dict[int, str]:
        with contextlib.suppress(Exception):
            offers = self._client.key_value_dir_get(f"{_KEY_PREFIX}/join/")
            return {int(key.rsplit("/", 1)[1]): offer for key, offer in offers}
        return {}

    def _missing(self, processes: list[int], error: Exception) -> RuntimeError:
        which = "processes" if len(processes) > 1 else "process"
        return RuntimeError(
            f"jax_ep.initialize: {which} {', '.join(map(str, processes))} of {self._num_processes} "
            f"did not call jax_ep.initialize() within {self._timeout} s: {error}"
        )

    def exchange(self, value: str) -> list[str]:
        """Every process's ``value`` in this round, by process."""
        keys = self._publish("=" + value)
        deadline = time.monotonic() + self._timeout
        values = []
        for process in range(self._num_processes):
            try:
                got = self._get(f"{keys}/{process}", deadline)
            except TimeoutError as error:
                raise RuntimeError(
                    f"jax_ep.initialize: process {process} of {self._num_processes} did not get as "
                    f"far within {self._timeout} s: {error}"
                ) from error
            if got.startswith("!"):
                raise RuntimeError(f"jax_ep.initialize: process {process} failed: {got[1:]}")
            values.append(got[1:])
        return values

    def tell_failure(self, error: BaseException) -> None:
        """Ends the others' wait in the next round."""
        if self._keys:
            with contextlib.suppress(Exception):
                self._publish(f"!{error or type(error).__name__}")

    def _publish(self, value: str) -> str:
        keys = f"{self._keys}/{self._round}"
        self._round += 1
        self._client.key_value_set(f"{keys}/{self._process}", value)
        return keys

    def _get(self, key: str, deadline: float) -> str:
        milliseconds = max(1, int((deadline - time.monotonic()) * 1000))
        try:
            return str(self._client.blocking_key_value_get(key, milliseconds))
        except Exception as error:  # the client's errors have no common type across versions
            raise TimeoutError(str(error)) from error


def finalize() -> None:
    """Leaves the processes' group; also called at interpreter exit. Harmless if there is none.

    In any order with ``jax.distributed.shutdown()``. Calls of other processes that wait for this
    one end with an error that says so (CPU) or at their timeout (CUDA). No operation may be started
    while it runs; the CUDA devices are given time to end theirs. Then the peers' memory is
    unmapped, and the error that ``check`` raises is forgotten.

    Later calls fail with an error that says what to do, and work again after ``initialize()``.
    Where XLA replays a program from a command buffer, no code of ours runs that could raise: there
    a call gives NaN after ``finalize()``, and in a job of several processes after the next
    ``initialize()`` too, until the program is compiled again. For such a replay control memory (2
    MB a device) and the staging region stay allocated until the process ends.
    """
    atexit.unregister(finalize)
    _leave()


def _leave() -> None:
    global _connected
    _connected = False
    _cpu.disconnect()
    _release_cuda()


def _finalize_at_exit() -> None:
    atexit.unregister(finalize)
    atexit.register(finalize)


def require_cpu(target: str, members: np.ndarray) -> None:
    """Checks, when a program is lowered for CPU, that its groups can meet."""
    if len(np.unique(members >> 32)) > 1 and compat.process_count() > 1 and not _connected:
        raise RuntimeError(
            f"{target}: the mesh spans processes; call jax_ep.initialize() in every process, after "
            "jax.distributed.initialize() and before compiling"
        )


# CUDA ---------------------------------------------------------------------------------------------


def require_cuda(target: str) -> None:
    """Prepares this process's GPUs when a program is lowered for CUDA and there is a client."""
    if not compat.has_live_client("cuda"):
        return
    if _cuda is None:
        raise RuntimeError(
            f"{target}: this installation of jax_ep has no CUDA kernels. Install the CUDA toolkit "
            "(nvcc 13.0 or newer) and build again: pip install . -C cmake.define.JAX_EP_CUDA=ON"
        )
    if _recordable and not command_buffers_keep_order(_xla_flags()):
        raise RuntimeError(
            f"{target}: since jax_ep was imported, XLA_FLAGS was given a {_SCHEDULING_FLAG} in "
            "which independent calls may run at once. Set XLA_FLAGS before the import"
        )
    _set_up_cuda()


def describe() -> str:
    """In words: what this installation has for CUDA, and how peers reach each other's buffers."""
    return "CUDA: not built" if _cuda is None else str(_cuda.describe())


def register_cuda() -> None:
    """Registers the CUDA handlers, if they are built."""
    global _recordable
    if _cuda is not None:
        _recordable = command_buffers_keep_order(_xla_flags())
        handlers = _cuda.handlers(recordable=_recordable)
        compat.register_cuda_targets("jax_ep_cuda_site", _cuda.state_type(), handlers)


def _set_up_cuda(staging_bytes: int = 0) -> None:
    global _watcher
    devices = jax.local_devices(backend="cuda")
    ids, ordinals = [d.id for d in devices], [d.local_hardware_id for d in devices]
    with _set_up_lock:
        _cuda.setup(
            compat.process_index(),
            compat.process_count(),
            ids,
            ordinals,
            staging_bytes,
            _path == "staged",
        )
        if _watcher is None:
            _watcher = _Watcher()
            _finalize_at_exit()


def _export_cuda() -> str:
    if _path == "staged":
        return str(_cuda.export_memory([]))
    for device in jax.local_devices(backend="cuda"):
        _pool_anchors.append(jax.block_until_ready(jax.device_put(jnp.zeros(1024), device)))
    return str(_cuda.export_memory([array.unsafe_buffer_pointer() for array in _pool_anchors]))


def _release_cuda(must_end: bool = False) -> None:
    global _watcher
    if _watcher is None:
        return
    # A call waits once for its peers to come and once for them to finish; calls that are queued
    # behind one that timed out end at once.
    seconds = 2 * get_timeout() + 5
    ended = _cuda.synchronize(seconds)
    _watcher.stop()
    _watcher = None
    _cuda.release(ended)
    _pool_anchors.clear()
    if must_end and not ended:
        raise RuntimeError(
            f"jax_ep.initialize: work on this process's GPUs has not ended within {seconds:g} s"
        )


# Environment --------------------------------------------------------------------------------------


def command_buffers_keep_order(xla_flags: str) -> bool:
    """Whether command buffers made under these flags run a device's calls one after the other.

    The kernels need that, in the same order on all ranks: they wait for their peers, and share the
    device's control memory. Outside command buffers a device's stream sees to it. A mode that is
    not known to keep the order counts as one that does not.
    """
    modes = re.findall(rf"""(?:^|\s){_SCHEDULING_FLAG}=("[^"]*"|'[^']*'|\S*)""", xla_flags)
    return not modes or modes[-1].strip("\"'") in _ORDERED_MODES


def _xla_flags() -> str:
    """What XLA takes as its flags: the variable's text, or that of the file which it names."""
    text = os.environ.get("XLA_FLAGS", "")
    if not text.strip() or text.lstrip().startswith("-"):
        return text
    try:
        return pathlib.Path(text).read_text()
    except OSError:
        return ""  # XLA ends the process over it


def _read_environment() -> None:
    global _path
    text = os.environ.get(_TIMEOUT_VARIABLE)
    if text is not None:
        try:
            set_timeout(float(text))
        except ValueError as error:
            raise ValueError(
                f"environment variable {_TIMEOUT_VARIABLE} must be a number of seconds above 0; "
                f"got {text!r}"
            ) from error
    _path = os.environ.get(_PATH_VARIABLE, _path)
    if _path not in _PATHS:
        raise ValueError(
            f"environment variable {_PATH_VARIABLE} must be one of {', '.join(_PATHS)}; "
            f"got {_path!r}"
        )


_read_environment()
