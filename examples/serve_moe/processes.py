"""Several processes of one host: process 0 serves and schedules, the others start what it starts.

Every process has some of the devices, so each has to start the same programs in the same order. The
leader tells the others over a socket, for a program of the devices would wait for those before it.
"""

import collections
import contextlib
import secrets
import select
import signal
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from serve_moe import steps

import jax_ep

_HOST = "127.0.0.1"  # jax_ep's processes share a host
_KEY_BYTES = 32
_HELLO_SECONDS = 1.0  # for who connects to say the key
_MOST_AHEAD = 8  # programs that a follower starts before it waits for one


class Leader:
    """`Steps` whose programs all processes start."""

    def __init__(self, run: steps.Steps, followers: list[socket.socket]):
        self.mesh, self.limits = run.mesh, run.limits
        self._run, self._followers = run, followers

    def decode(self, keep: np.ndarray) -> dict[str, jax.Array]:
        """As Steps.decode."""
        self._tell(0, keep)
        return self._run.decode(keep)

    def prefill(self, chunk: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """As Steps.prefill."""
        self._tell(chunk["tokens"].shape[1], *chunk.values())
        return self._run.prefill(chunk)

    def check(self) -> None:
        """Raises what jax_ep.check does, or that a process has ended: followers say nothing."""
        jax_ep.check()
        ended, _, _ = select.select(self._followers, [], [], 0)
        if ended:
            raise RuntimeError(f"{len(ended)} of the other processes have ended")

    def _tell(self, bucket: int, *arrays: np.ndarray) -> None:
        """Says what to start, in as many bytes as it has: a chunk of a bucket, 0: a step."""
        message = b"".join([bucket.to_bytes(4, "little"), *(a.tobytes() for a in arrays)])
        for follower in self._followers:
            follower.sendall(len(message).to_bytes(4, "little") + message)


@contextlib.contextmanager
def leading(run: steps.Steps, seconds: float) -> Iterator[Leader]:
    """Process 0: gathers the others, and lets them end after the block.

    Args:
        run: this process's programs.
        seconds: for the others to come, and for one to take what it is told.
    """
    key = np.frombuffer(secrets.token_bytes(_KEY_BYTES), np.uint8)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server((_HOST, 0)))
        port = listening.getsockname()[1]
        _of_process_0(run.mesh, np.append(key.astype(np.int32), port))
        followers: list[socket.socket] = []
        deadline = time.monotonic() + seconds
        while len(followers) < jax.process_count() - 1:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError(
                    f"{len(followers)} of {jax.process_count() - 1} other processes have come in "
                    f"{seconds} s"
                )
            listening.settimeout(left)
            with contextlib.suppress(TimeoutError):
                follower = stack.enter_context(listening.accept()[0])
                follower.settimeout(_HELLO_SECONDS)
                if secrets.compare_digest(_read(follower, _KEY_BYTES), key.tobytes()):
                    follower.settimeout(seconds)
                    followers.append(follower)
        yield Leader(run, followers)


def follow(run: steps.Steps, seconds: float) -> None:
    """Another process: starts what process 0 starts, until that ends.

    Args:
        run: this process's programs.
        seconds: to reach process 0.
    """
    # Whoever ends the job signals all its processes: this one ends when process 0 has finished.
    for ending in signal.SIGTERM, signal.SIGINT:
        signal.signal(ending, signal.SIG_IGN)
    *key, port = _of_process_0(run.mesh, np.zeros(_KEY_BYTES + 1, np.int32)).tolist()
    running: collections.deque[dict[str, jax.Array]] = collections.deque()
    with socket.create_connection((_HOST, port), seconds) as leader:
        leader.sendall(bytes(key))
        leader.settimeout(None)  # an idle server tells nothing; its end closes the socket
        while size := _read(leader, 4):
            running.append(_start(run, _read(leader, int.from_bytes(size, "little"))))
            if len(running) > _MOST_AHEAD:
                jax.block_until_ready(running.popleft())
                jax_ep.check()


def _start(run: steps.Steps, message: bytes) -> dict[str, jax.Array]:
    """Starts what `Leader._tell` says."""
    if (bucket := int.from_bytes(message[:4], "little")) == 0:
        return run.decode(np.frombuffer(message, bool, offset=4))
    chunk, offset = steps.empty_chunk(run.mesh.size, bucket), 4
    for name, array in chunk.items():
        told = np.frombuffer(message, array.dtype, array.size, offset)
        chunk[name] = told.reshape(array.shape)
        offset += array.nbytes
    return run.prefill(chunk)


def _of_process_0(mesh: Mesh, values: np.ndarray) -> np.ndarray:
    """What process 0 has called this with, which all processes do: int32 [n]."""
    sharding = NamedSharding(mesh, P(steps.AXES))
    rows = jax.make_array_from_callback(
        (mesh.size, values.size), sharding, lambda index: np.tile(values, (mesh.size, 1))[index]
    )
    share = jax.shard_map(
        lambda row: steps.gather(row[0])[None],
        mesh=mesh,
        in_specs=P(steps.AXES),
        out_specs=P(steps.AXES),
    )
    return np.asarray(jax.jit(share)(rows).addressable_data(0))[0, 0]


def _read(source: socket.socket, size: int) -> bytes:
    """Reads so many bytes; fewer only if the other side has closed the socket."""
    data = b""
    while len(data) < size and (part := source.recv(size - len(data))):
        data += part
    return data
