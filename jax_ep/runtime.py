"""Set-up: timeouts, joining processes, and which backends this installation has."""

import atexit
import importlib
import importlib.util
import numbers
import os
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
_LONGEST_TIMEOUT = 1e8  # seconds; fits 64-bit nanoseconds with room to add to a clock
_KEY_PREFIX = "jax_ep/cpu"

_connected = False
_generation = 0  # of initialize() calls: each one's keys are new


def set_timeout(seconds: float) -> None:
    """Sets how long an operation waits for a rank that does not come.

    After it the operation ends with DEADLINE_EXCEEDED, naming the operation and the rank, and the
    runtime stays usable. The default is 30 s, or the environment variable ``JAX_EP_TIMEOUT``. It
    holds for calls that start afterwards, in this process.

    Args:
        seconds: the time in seconds, above 0 and at most 1e8 (three years).

    Raises:
        TypeError: if ``seconds`` is not a number.
        ValueError: if ``seconds`` is not above 0 and at most 1e8.
    """
    _cpu.set_timeout(_checked_seconds("jax_ep.set_timeout: seconds", seconds))


def _checked_seconds(what: str, seconds: float) -> float:
    if not isinstance(seconds, numbers.Real):
        raise TypeError(f"{what} must be a number; got {seconds!r}")
    if not 0 < seconds <= _LONGEST_TIMEOUT:
        raise ValueError(f"{what} must be above 0 and at most {_LONGEST_TIMEOUT:g}; got {seconds}")
    return float(seconds)


def get_timeout() -> float:
    """The time in seconds that ``set_timeout`` sets."""
    return float(_cpu.timeout())


def initialize(*, timeout: float = 60.0) -> None:
    """Joins the processes of a multi-process job. Collective: every process calls it once.

    Call it after ``jax.distributed.initialize()`` and before the first program whose EP groups span
    processes is compiled. With one process there is nothing to do, and it does nothing. On CPU the
    processes must run on one host as one user: control messages go over Unix sockets, and rows are
    read straight from the owner's memory (``process_vm_readv``).

    Args:
        timeout: seconds to wait for each of the other processes.

    Raises:
        RuntimeError: if a process is missing or late (it is named), runs on another host, or may
            not be read; or if the processes are joined already. After a failure the job must be
            started again.
        TypeError: if ``timeout`` is not a number.
        ValueError: if ``timeout`` is not above 0 and at most 1e8.
    """
    global _connected, _generation
    timeout = _checked_seconds("jax_ep.initialize: timeout", timeout)
    if _connected:
        raise RuntimeError(
            "jax_ep.initialize: this process is connected already; call jax_ep.finalize() first"
        )
    num_processes, index = compat.process_count(), compat.process_index()
    if num_processes == 1:
        return
    client = compat.coordination_client()
    prefix = f"{_KEY_PREFIX}/{_generation}"
    _generation += 1
    addresses = _exchange(client, prefix, _cpu.listen(), timeout)
    _cpu.connect(index, addresses, timeout)
    if _cuda is not None and compat.has_live_client("cuda"):
        _connect_cuda(client, prefix, timeout)
    _connected = True
    atexit.register(finalize)


def _exchange(client: Any, prefix: str, value: str, timeout: float) -> list[str]:
    """Every process's ``value``, by process, through the coordination service."""
    num_processes = compat.process_count()
    client.key_value_set(f"{prefix}/{compat.process_index()}", value)
    values = []
    for process in range(num_processes):
        try:
            values.append(client.blocking_key_value_get(f"{prefix}/{process}", int(timeout * 1000)))
        except Exception as error:  # the client's errors have no common type across versions
            raise RuntimeError(
                f"jax_ep.initialize: process {process} of {num_processes} did not call "
                f"jax_ep.initialize() within {timeout} s: {error}"
            ) from error
    return values


def finalize() -> None:
    """Leaves the processes' group; also called at interpreter exit. Harmless if there is none.

    Calls of other processes that wait for this one end with an error that says so.
    """
    global _connected
    atexit.unregister(finalize)
    _cpu.disconnect()
    _connected = False


def require_cpu(target: str, members: np.ndarray) -> None:
    """Checks, when a program is lowered for CPU, that its groups can meet."""
    if len(np.unique(members >> 32)) > 1 and compat.process_count() > 1 and not _connected:
        raise RuntimeError(
            f"{target}: the mesh spans processes; call jax_ep.initialize() in every process, after "
            "jax.distributed.initialize() and before compiling"
        )


def require_cuda(target: str) -> None:
    """Prepares this process's GPUs when a program is lowered for CUDA and there is a client."""
    if not compat.has_live_client("cuda"):
        return
    if _cuda is None:
        raise RuntimeError(
            f"{target}: this installation of jax_ep has no CUDA kernels. Install the CUDA toolkit "
            "(nvcc 13.0 or newer) and build again: pip install . -C cmake.define.JAX_EP_CUDA=ON"
        )
    _set_up_cuda()


def _set_up_cuda() -> None:
    _cuda.set_timeout(get_timeout())
    devices = jax.local_devices(backend="cuda")
    ids, ordinals = [d.id for d in devices], [d.local_hardware_id for d in devices]
    _cuda.setup(compat.process_index(), ids, ordinals)


def register_cuda() -> None:
    """Registers the CUDA handlers, if they are built."""
    if _cuda is not None:
        compat.register_cuda_targets("jax_ep_cuda_site", _cuda.state_type(), _cuda.handlers())


def _connect_cuda(client: Any, prefix: str, timeout: float) -> None:
    _set_up_cuda()
    # Any array lies in XLA's pool, which is what peers map.
    arrays = [jax.device_put(jnp.zeros(1024), d) for d in jax.local_devices(backend="cuda")]
    pointers = [jax.block_until_ready(array).unsafe_buffer_pointer() for array in arrays]
    exports = _exchange(client, f"{prefix}/cuda", _cuda.export_memory(pointers), timeout)
    _cuda.import_memory(exports)


def _read_environment() -> None:
    text = os.environ.get(_TIMEOUT_VARIABLE)
    if text is None:
        return
    try:
        set_timeout(float(text))
    except ValueError as error:
        raise ValueError(
            f"environment variable {_TIMEOUT_VARIABLE} must be a number of seconds above 0; "
            f"got {text!r}"
        ) from error


_read_environment()
