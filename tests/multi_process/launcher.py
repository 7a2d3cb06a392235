"""Runs a program as a job of several processes on this host, and watches over them."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_GRACE = 5.0  # seconds between TERM and KILL


@dataclasses.dataclass(frozen=True)
class Finished:
    """How one process ended.

    Attributes:
        returncode: negative if a signal ended it, as in subprocess.
        log: what it printed, both streams.
    """

    returncode: int
    log: str


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(
    program: pathlib.Path,
    *arguments: str,
    num_processes: int,
    num_devices: int,
    out: pathlib.Path,
    timeout: float = 120,
    expected: dict[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Finished]:
    """Runs `program` once per process and waits for all of them.

    Each gets JAX_EP_TEST_{PROCESS,NUM_PROCESSES,PORT,OUT} and `num_devices` CPU devices. What it
    prints goes to OUT/process_<i>.log. Whoever is left after `timeout`, or ten seconds after
    another process has ended in a way that was not expected, is terminated, then killed.

    Args:
        program: a Python file.
        *arguments: for the program.
        num_processes: of the job.
        num_devices: of each process.
        out: an existing directory.
        timeout: seconds for the whole job.
        expected: return codes that are not 0, by process.
        environment: variables that replace those above and the caller's.

    Returns:
        How each process ended.

    Raises:
        AssertionError: a return code was not the expected one; the message has all logs.
    """
    expected = {process: (expected or {}).get(process, 0) for process in range(num_processes)}
    port = free_port()
    logs = [out / f"process_{process}.log" for process in range(num_processes)]
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + timeout
    try:
        for process, log in enumerate(logs):
            variables = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(_ROOT)]),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
                "NPROC": str(2 * num_devices),
                "JAX_EP_TEST_PROCESS": str(process),
                "JAX_EP_TEST_NUM_PROCESSES": str(num_processes),
                "JAX_EP_TEST_PORT": str(port),
                "JAX_EP_TEST_OUT": str(out),
                **(environment or {}),
            }
            with log.open("wb") as stream:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-X", "faulthandler", str(program), *arguments],
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
                )
        # All are polled each time: one that has ended would stay a zombie, for which others wait.
        while None in (codes := [p.poll() for p in processes]) and time.monotonic() < deadline:
            if any(code not in (None, expected[i]) for i, code in enumerate(codes)):
                deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.02)
    finally:
        _end(processes)
    finished = [
        Finished(p.returncode, log.read_text(errors="replace"))
        for p, log in zip(processes, logs, strict=True)
    ]
    if any(f.returncode != expected[i] for i, f in enumerate(finished)):
        raise AssertionError(
            "\n".join(
                f"---- process {i}: exit code {f.returncode}, expected {expected[i]}\n{f.log}"
                for i, f in enumerate(finished)
            )
        )
    return finished


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
