"""How the processes of a test job talk on the host: values to all, through process 0."""

import multiprocessing.connection as mpc
import os
import pathlib
import time
from typing import Any

_KEY = b"jax_ep"  # the socket lies in the job's own directory


class OutOfStepError(Exception):
    """A process is in another test, or has left."""


class SocketExchange:
    """All-gathers between processes over a Unix socket. Process 0 collects and hands out.

    Every message carries the number of the call and the name of the test, so processes that are no
    longer in step are found out, and each wait has a timeout.

    Args:
        socket: its path, the same in all processes.
        process: this process's number.
        num_processes: of the job.
        timeout: seconds to wait for the others, in each call.
    """

    def __init__(
        self, socket: pathlib.Path, process: int, num_processes: int, timeout: float = 90
    ) -> None:
        self.process, self.num_processes, self.timeout = process, num_processes, timeout
        self._num_calls = 0
        self._peers: dict[int, mpc.Connection] = {}  # process 0: all others; else process 0
        if process == 0:
            with mpc.Listener(str(socket), "AF_UNIX", num_processes, authkey=_KEY) as listener:
                for _ in range(1, num_processes):
                    peer = listener.accept()  # the launcher ends a job that is not complete
                    self._peers[self._receive(peer, "a process that joins")] = peer
        else:
            deadline = time.monotonic() + timeout
            while True:
                try:
                    peer = mpc.Client(str(socket), "AF_UNIX", authkey=_KEY)
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    if time.monotonic() > deadline:
                        raise OutOfStepError(f"process 0 did not open {socket}") from None
                    time.sleep(0.02)
            peer.send(process)
            self._peers[0] = peer

    def all_gather(self, value: Any) -> list[Any]:
        """Every process's value, by process. Collective."""
        self._num_calls += 1
        step = (self._num_calls, os.environ.get("PYTEST_CURRENT_TEST", ""))
        if self.process != 0:
            self._send(self._peers[0], (step, value), "process 0")
            reply = self._receive(self._peers[0], "process 0")
            if isinstance(reply, OutOfStepError):
                raise reply
            return list(reply)
        gathered = {0: (step, value)}
        for process, peer in self._peers.items():
            gathered[process] = self._receive(peer, f"process {process}")
        reply = [gathered[process][1] for process in range(self.num_processes)]
        others = {process: seen for process, (seen, _) in gathered.items() if seen != step}
        if others:
            reply = OutOfStepError(f"process 0 is at {step}, others at {others}")
        for process, peer in self._peers.items():
            self._send(peer, reply, f"process {process}")
        if isinstance(reply, OutOfStepError):
            raise reply
        return reply

    def _send(self, peer: mpc.Connection, value: Any, who: str) -> None:
        try:
            peer.send(value)
        except OSError as error:
            raise OutOfStepError(f"{who} has left: {error}") from error

    def _receive(self, peer: mpc.Connection, who: str) -> Any:
        try:
            if not peer.poll(self.timeout):
                raise OutOfStepError(f"{who} sent nothing for {self.timeout} s")
            return peer.recv()
        except (EOFError, OSError) as error:
            raise OutOfStepError(f"{who} has left: {error!r}") from error
