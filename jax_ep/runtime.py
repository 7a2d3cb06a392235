"""Set-up: joining the processes of a job, and preparing this process's GPUs."""

import atexit
import functools
import os
import threading
import time
import warnings

import jax
import jax.numpy as jnp

from jax_ep import _native, compat, environment, limits, nodes, nvshmem, overlap, timeouts
from jax_ep._checks import checked_bytes, checked_count, checked_seconds
from jax_ep.errors import Watcher, say
from jax_ep.join import Attempt

_path = environment.path()
_default_slot_bytes = limits.DEFAULT_SLOT_BYTES if environment.has_slots() else 0
_slot_bytes = _default_slot_bytes  # of each CUDA device that is set up, or will be
_told_of_no_slots = False
_has_network_slots = False  # as all processes have agreed
_recordable = True  # whether XLA may record calls in command buffers; fixed at registration
_connected = False
_cpu_connected = False  # likewise, so that they can meet on CPU
_process_id = os.getpid()  # of the process that has set up; a forked child shares its memory
_set_up_lock = threading.Lock()  # programs may be lowered by several threads
_watcher: Watcher | None = None  # None: no CUDA device is set up
_LOOK_INTERVAL = 0.1  # seconds in which no signal's handler runs while devices are waited for
_END_OF_CALL = 5.0  # seconds for devices to end their calls, once the waits for others have ended
# One array a device, in XLA's pool. While they live XLA does not give back the part of the pool
# that other processes have mapped, so that its addresses cannot come to mean other memory.
_pool_anchors: list[jax.Array] = []


# Joining processes --------------------------------------------------------------------------------


def initialize(
    *,
    timeout: float = 60.0,
    staging_bytes: int = 0,
    slot_bytes: int | None = None,
    ranks_per_node: int | None = None,
    network: bool | None = None,
    heap_bytes: int | None = None,
) -> None:
    """Joins the processes of a multi-process job. Collective: every process calls it once.

    Call it after ``jax.distributed.initialize()`` and before the first program that uses this
    library is compiled. With one process there is nothing to do but for ``staging_bytes``,
    ``slot_bytes`` and ``ranks_per_node``, and after ``finalize()``. On CPU the processes must run
    on one host as one user: control messages go over Unix sockets, and rows are read straight from
    the owner's memory (``process_vm_readv``). On CUDA they may run on several hosts; a group whose
    ranks do needs a network (below), which one such group of a process can have: the same ranks in
    the same order, until ``finalize()``. docs/multi_node.md says what it cannot do yet.

    On CUDA peers read and write XLA's buffers directly, where they can map them. They cannot with
    ``XLA_PYTHON_CLIENT_ALLOCATOR=cuda_async``, nor where XLA's memory grew after this call
    (``XLA_PYTHON_CLIENT_PREALLOCATE=false``). What they would write there goes through a staging
    region: a fixed part of each device's memory, for one copy more. A call needs up to ``num_ranks
    * T * row bytes + 4 * max(capacity, T * K)`` of it, for rows and weights. Where rows cross as
    float8 with S scales each (``fp8=`` or ``scales=``) their bytes are H + 4 * S, the latter
    rounded up to 16; and unless they are dequantised, scales need ``4 * max(capacity, num_ranks * T
    + 1) * S`` more. Each part is rounded up to 256 bytes. If that is not there the call fails with
    the number. With the environment variable ``JAX_EP_PATH=staged`` all buffers take this way.

    Small calls on CUDA, as in decoding, go through slots: memory of each device that its peers
    write rows and ids to, so that ranks need not shake hands first. Such calls need no staging
    region. A device has ``slot_bytes / (2 * devices of the job)`` for a call of each peer, which
    fits if T <= 512, T * K <= 4096, R * T * K <= 16384 and some ``64 KiB + 4 / 3 * T * row bytes``
    are not above that; rows with ``scales=`` do if S is a multiple of 4. Other calls, and all
    without slots, are general ones.

    Between hosts it can start NVSHMEM, in jobs with one GPU in each process: it allocates the
    symmetric heap, three quarters of which are for calls (docs/multi_node.md has the formula), and
    sends a row between any two processes. NVSHMEM's environment variables hold
    (docs/multi_node.md has those that matter).

    If it fails, in one process or in all, it leaves nothing behind: once the cause is gone every
    process may call it again (one in which it succeeded calls ``finalize()`` before). Only NVSHMEM
    stays as it is if it has begun to start: in such a process there is no network any more.

    Args:
        timeout: seconds to wait for the other processes, in each of the few steps.
        staging_bytes: size of the staging region of each of this process's CUDA devices; 0 for
            none. A process that has one from before keeps it if it is larger.
        slot_bytes: size of the slots of each CUDA device, the same in all processes; 0 for none. By
            default 64 MiB, or none with the environment variable ``JAX_EP_SLOTS=0``; in one process
            whose devices are set up already, what they have. Where that default does not fit into
            a device's free memory no device of the job gets slots, which a line on stderr says.
        ranks_per_node: how many ranks of a group, one after the other, count as one node in the
            order of ``combine``'s sums (see there), and, where a network runs, for what crosses it,
            wherever they are: for tests on one host. It divides the ranks of every group that has
            more. The same in all processes; programs that are compiled already keep what they have.
            None: what the environment variable ``JAX_EP_RANKS_PER_NODE`` says, else processes are
            on one node where their hosts have one name.
        network: whether to start NVSHMEM. The same in all processes. None: what the environment
            variable ``JAX_EP_NETWORK`` (0 or 1) says, else where processes run on several hosts and
            each of them can take part. True demands it, also on one host.
        heap_bytes: size of NVSHMEM's symmetric heap on each device, the same in all processes.
            None: what NVSHMEM's variable ``NVSHMEM_SYMMETRIC_SIZE`` says, which this sets; 1 GiB
            without.

    Raises:
        RuntimeError: if a process is missing or late (it is named), runs on another host (on CPU),
            may not be read, or has failed; if the processes are joined already, or do not agree in
            ``ranks_per_node``, ``network`` or ``heap_bytes``; if a network is demanded and one of
            them cannot take part in it (its device has no memory for the heap, for one); if NVSHMEM
            does not start or a row does not arrive; if XLA's memory cannot be mapped by peers and
            ``staging_bytes`` is 0; if a device has no memory for the ``slot_bytes`` that are asked
            for, or they are too small for the job's devices, differ between processes, or have
            another size already.
        TypeError: if ``timeout`` is not a number, a size in bytes or ``ranks_per_node`` not an
            integer, or ``network`` not a bool.
        ValueError: if ``timeout`` is not above 0 and at most 1e8, ``staging_bytes`` negative,
            ``slot_bytes`` neither 0 nor enough for one device, or ``ranks_per_node`` or
            ``heap_bytes`` below 1.
    """
    global _connected
    timeout = checked_seconds("jax_ep.initialize: timeout", timeout)
    staging_bytes = checked_bytes("jax_ep.initialize: staging_bytes", staging_bytes)
    if slot_bytes is not None:
        slot_bytes = _checked_slot_bytes(slot_bytes)
    ranks_per_node = nodes.checked(ranks_per_node)
    if heap_bytes is not None:
        heap_bytes = checked_count("jax_ep.initialize: heap_bytes", heap_bytes)
    if network is None:
        network = environment.network()
    elif not isinstance(network, bool):
        raise TypeError(f"jax_ep.initialize: network must be a bool or None; got {network!r}")
    if _connected:
        raise RuntimeError(
            "jax_ep.initialize: this process is connected already; call jax_ep.finalize() first"
        )
    if compat.process_count() == 1:
        makes_clients = staging_bytes > 0 or slot_bytes is not None
        if _native.cuda is not None and (makes_clients or compat.has_live_client("cuda")):
            jax.local_devices()
            if compat.has_live_client("cuda"):
                _set_up_cuda(staging_bytes, slot_bytes)
        nodes.choose(ranks_per_node)
        return
    try:
        _release_cuda(must_end=True)  # what a program before this call has set up
        attempt = Attempt(compat.coordination_client(), timeout)
        try:
            _connect(
                attempt, timeout, staging_bytes, slot_bytes, ranks_per_node, network, heap_bytes
            )
        except BaseException as error:
            attempt.tell_failure(error)
            raise
    except BaseException:
        _leave()
        raise
    _connected = True
    _finalize_at_exit()


def _checked_slot_bytes(slot_bytes: int) -> int:
    slot_bytes = checked_bytes("jax_ep.initialize: slot_bytes", slot_bytes)
    if 0 < slot_bytes < limits.SLOT_BYTES_PER_DEVICE:
        raise ValueError(
            "jax_ep.initialize: slot_bytes must be 0 or at least "
            f"{limits.SLOT_BYTES_PER_DEVICE} for each device of the job; got {slot_bytes}"
        )
    return slot_bytes


def _connect(
    attempt: Attempt,
    timeout: float,
    staging_bytes: int,
    slot_bytes: int | None,
    ranks_per_node: int | None,
    network: bool | None,
    heap_bytes: int | None,
) -> None:
    global _has_network_slots
    process = compat.process_index()
    addresses = attempt.join(_native.cpu.listen())
    nodes.learn(attempt.exchange(nodes.as_told(ranks_per_node)))
    on_this_host = nodes.on_this_host(process)
    exported, ordinals = "", []

    def connect_cpu() -> None:
        global _cpu_connected
        _native.cpu.connect(process, addresses, timeout)
        _cpu_connected = True

    if all(on_this_host):
        connect_cpu()
    if _native.cuda is not None:
        # Making the clients is collective in a job of several processes; all of them come here.
        jax.local_devices()
        if compat.has_live_client("cuda"):
            ordinals = _set_up_cuda(staging_bytes, slot_bytes)
            exported = _export_cuda()
    if not all(on_this_host) and not ordinals:  # with GPUs they need not meet on CPU
        connect_cpu()
    exports = attempt.exchange(exported)
    if exported:
        here = [
            export if is_here else "" for export, is_here in zip(exports, on_this_host, strict=True)
        ]
        _native.cuda.import_memory(here)
        _tell_of_no_slots()
    told = attempt.exchange(nvshmem.offer(network, not all(on_this_host), ordinals, heap_bytes))
    if exported:
        _native.cuda.close_descriptors()
    nvshmem.start(attempt, timeout, told, process, ordinals)
    if nvshmem.is_running():
        part = nvshmem.load().part()
        _has_network_slots = _agree_on_network_slots(attempt)
        chosen = nodes.chosen() or 0
        _native.cuda.join_network(part, nodes.hosts(), chosen, _has_network_slots)
        attempt.exchange("joined")


def finalize() -> None:
    """Leaves the processes' group; also called at interpreter exit. Harmless if there is none.

    In any order with ``jax.distributed.shutdown()``. Calls of other processes that wait for this
    one end with an error that says so, on CUDA within a second or two, on other hosts some more. No
    operation may be started while it runs. On CUDA it waits for this process's devices to end their
    work, for both timeouts at most: an operation of theirs may wait for a rank that has yet to
    come. Ctrl-C ends such waits at once, in all ranks as after a timeout; ``KeyboardInterrupt`` is
    raised when all is left. Then the peers' memory is unmapped, unless this process's devices are
    still at work, and the error that ``check`` raises is forgotten. Last, where NVSHMEM runs, it
    waits for up to 5 s until all processes have come as far, and ends it, which frees the symmetric
    heap; if one does not come, or a device is still at work, that stays until this process ends,
    and no network can be started in it again. In a forked child it does nothing.

    Later calls fail with an error that says what to do, and work again after ``initialize()``.
    Where XLA replays a program from a command buffer, no code of ours runs that could raise: there
    a call gives NaN after ``finalize()``, and in a job of several processes, or with slots of
    another size, after the next ``initialize()`` too, until the program is compiled again. For such
    a replay control memory (2 MB a device) and the staging region stay allocated until the process
    ends, in one process also the slots, for the next ``initialize()``.
    """
    atexit.unregister(finalize)
    if _process_id == os.getpid():
        _leave()


def _leave() -> None:
    global _connected, _cpu_connected
    _connected = _cpu_connected = False
    nodes.forget()
    _native.cpu.disconnect()
    devices_have_ended = False
    try:
        devices_have_ended = _release_cuda()
    finally:
        nvshmem.leave(devices_have_ended)


def _finalize_at_exit() -> None:
    global _process_id
    _process_id = os.getpid()
    atexit.unregister(finalize)
    atexit.register(finalize)


def require_cpu(target: str, across_processes: bool) -> None:
    """Checks, when a program is lowered for CPU, that its groups can meet."""
    if across_processes and _connected and not _cpu_connected:
        raise RuntimeError(
            f"{target}: the mesh spans processes, and those of this job run on several hosts: on "
            "CPU a group has to lie inside a process there"
        )
    if across_processes and compat.process_count() > 1 and not _connected:
        raise RuntimeError(
            f"{target}: the mesh spans processes; call jax_ep.initialize() in every process, after "
            "jax.distributed.initialize() and before compiling"
        )
    if compat.has_live_client("cpu"):
        _look_for_few_threads()


@functools.cache  # once
def _look_for_few_threads() -> None:
    num_devices = len(jax.local_devices(backend="cpu"))
    num_threads = compat.cpu_client_threads(num_devices)
    if num_devices == 1 or num_threads is None or num_threads >= 2 * num_devices:
        return
    advice = (
        f"This jaxlib ({compat.jaxlib_version()}) runs CPU programs on {num_threads} threads, and "
        f"launches that wait for their turn can hold all of them: for {num_devices} devices set "
        f"NPROC={2 * num_devices} before JAX starts its client, and launch programs from one "
        "thread (see 'Limits' in jax_ep's README)"
    )
    _native.cpu.set_advice(advice)
    warnings.warn(f"jax_ep: {advice}", RuntimeWarning, stacklevel=2)


# CUDA ---------------------------------------------------------------------------------------------


def require_cuda(target: str, overlaps: bool = False) -> None:
    """Prepares this process's GPUs when a program is lowered for CUDA and there is a client."""
    if not compat.has_live_client("cuda"):
        return
    if _native.cuda is None:
        raise RuntimeError(
            f"{target}: this installation of jax_ep has no CUDA kernels. Install the CUDA toolkit "
            "(nvcc 13.0 or newer) and build again: pip install -e . -C cmake.define.JAX_EP_CUDA=ON"
        )
    if _recordable and not environment.command_buffers_keep_order(environment.xla_flags()):
        raise RuntimeError(
            f"{target}: since jax_ep was imported, XLA_FLAGS was given a "
            f"{environment.SCHEDULING_FLAG} in which independent calls may run at once. Set "
            "XLA_FLAGS before the import"
        )
    if overlaps and not environment.collectives_share_a_stream(environment.xla_flags()):
        raise RuntimeError(
            f"{target}: XLA_FLAGS has {environment.STREAMS_FLAG}, with which calls of "
            "overlap=True may run at once. Leave one of the two out"
        )
    _set_up_cuda()


def describe() -> str:
    """In words: what this installation has for CUDA, and how peers reach each other's buffers."""
    if _native.cuda is None:
        return "CUDA: not built"
    return f"{_native.cuda.describe()}; network: {nvshmem.describe()}"


def register_cuda() -> None:
    """Registers the CUDA handlers, if they are built."""
    global _recordable
    if _native.cuda is not None:
        _recordable = environment.command_buffers_keep_order(environment.xla_flags())
        handlers = _native.cuda.handlers(recordable=_recordable)
        overlapped = _native.cuda.handlers(recordable=False)
        handlers |= {overlap.target(name): stages for name, stages in overlapped.items()}
        compat.register_cuda_targets("jax_ep_cuda_site", _native.cuda.state_type(), handlers)


def has_slots() -> bool:
    """Whether CUDA devices are to have slots: the same in all processes, on all devices.

    Those of a device may turn out not to fit into its memory; its handlers see to that.
    """
    return _slot_bytes > 0


def has_network_slots(quantises: bool = False) -> bool:
    """Whether small calls of groups across nodes go through slots, in all processes.

    Those that quantise rows do only where slots are demanded: what turns out not to fit has no
    other way then.
    """
    return _has_network_slots and (not quantises or environment.network_slots() is True)


def _agree_on_network_slots(attempt: Attempt) -> bool:
    """Whether they do: unless it is not wanted, if the nodes' devices have slots of one size."""
    wanted = environment.network_slots()
    told = attempt.exchange(f"{wanted} {_native.cuda.slot_area_bytes()}")
    wishes, areas = ({text.split(" ")[i] for text in told} for i in range(2))
    if len(wishes) > 1:
        raise RuntimeError(
            "jax_ep.initialize: JAX_EP_NETWORK_SLOTS must be the same in all processes"
        )
    if wanted is False:
        return False
    if len(areas) > 1 or areas == {"0"}:
        is_news = wanted or len(areas) > 1
        if is_news and compat.process_index() == 0:  # all know the same
            say(
                "small calls across nodes do not go through slots, for that all nodes must have "
                "slots of one size (JAX_EP_SLOTS, jax_ep.initialize(slot_bytes=...)) and as many "
                "devices"
            )
        return False
    return True


def _set_up_cuda(staging_bytes: int = 0, slot_bytes: int | None = None) -> list[int]:
    """Returns the ordinals of this process's devices."""
    global _watcher, _slot_bytes
    devices = jax.local_devices(backend="cuda")
    ids, ordinals = [d.id for d in devices], [d.local_hardware_id for d in devices]
    with _set_up_lock:
        requires_slots = slot_bytes is not None
        slot_bytes = _slot_bytes if slot_bytes is None else slot_bytes
        _native.cuda.setup(
            compat.process_index(),
            compat.process_count(),
            ids,
            ordinals,
            staging_bytes,
            _path == "staged",
            slot_bytes,
            requires_slots,
        )
        _slot_bytes = slot_bytes
        _tell_of_no_slots()
        if _watcher is None:
            _watcher = Watcher()
            _finalize_at_exit()
    return ordinals


def _tell_of_no_slots() -> None:
    global _told_of_no_slots
    problem = _native.cuda.slots_problem()
    if problem is None or _told_of_no_slots:
        return
    _told_of_no_slots = True
    say(
        f"small calls do not go through slots on GPUs, for there are none: {problem}. Leave them "
        "memory by a smaller XLA_PYTHON_CLIENT_MEM_FRACTION, or set JAX_EP_SLOTS=0 to do without "
        "in every process. This is said once."
    )


def _export_cuda() -> str:
    if _path == "staged":
        return str(_native.cuda.export_memory([]))
    for device in jax.local_devices(backend="cuda"):
        _pool_anchors.append(jax.block_until_ready(jax.device_put(jnp.zeros(1024), device)))
    return str(
        _native.cuda.export_memory([array.unsafe_buffer_pointer() for array in _pool_anchors])
    )


def _release_cuda(must_end: bool = False) -> bool:
    """Whether the devices had no work left then."""
    global _watcher, _slot_bytes, _has_network_slots
    if _watcher is None:
        return True
    ended, interrupt = _end_work()
    try:
        _watcher.stop()
    finally:
        _watcher, _slot_bytes, _has_network_slots = None, _default_slot_bytes, False
        _native.cuda.release(ended)
        _pool_anchors.clear()
    if interrupt is not None:
        raise interrupt
    if must_end and not ended:
        raise RuntimeError(
            "jax_ep.initialize: work on this process's GPUs has not ended within "
            f"{_longest_end():g} s"
        )
    return ended


def _end_work() -> tuple[bool, BaseException | None]:
    """Whether the devices have come to an end, and what a signal's handler raised meanwhile."""
    try:
        return _await_devices(_longest_end()), None
    except BaseException as interrupt:
        try:
            _native.cuda.end_own_waits()
            return _await_devices(_END_OF_CALL), interrupt
        except BaseException as another:
            return False, another


def _longest_end() -> float:
    # A call waits once for its peers to come and once for them to finish; calls that are queued
    # behind one that timed out end at once. Other work may take its time.
    return sum(timeouts.get_timeout()) + _END_OF_CALL


def _await_devices(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        if _native.cuda.synchronize(max(0.0, min(left, _LOOK_INTERVAL))):
            return True
        if left <= 0:
            return False
