"""Starts the processes of a test job, watches over them, and stops whatever it started.

`run` is for any processes; `worker_processes` describes those that run a scenario, a function that
worker.py calls; `run_scenario` is both for a test, and raises if one did not end as it should.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from cpu_devices import cpu_devices

_WORKER = pathlib.Path(__file__).with_name("worker.py")
_ROOT = _WORKER.parents[2]
_GRACE = 3.0  # seconds between TERM and KILL

_started: list[subprocess.Popen[bytes]] = []  # by all threads, as long as they run
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Process:
    """One process to start.

    Attributes:
        command: its arguments.
        environment: all of it.
        log: where both of its streams go.
        expected: the return code that is right; negative for a signal.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    log: pathlib.Path
    expected: int = 0


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        returncodes: by process.
        late: the processes that had to be stopped because time was up.
        seconds: that it took.
        failed: whether one of them ended otherwise than expected before the others were stopped.
    """

    returncodes: list[int]
    late: list[int]
    seconds: float
    failed: bool

    def problems(self, processes: Sequence[Process]) -> list[str]:
        """What was not as expected, in words, with the end of each log that belongs to it."""
        found = []
        for i, (process, code) in enumerate(zip(processes, self.returncodes, strict=True)):
            if code == process.expected and i not in self.late:
                continue
            why = f"exit code {code}, expected {process.expected}"
            if i in self.late:
                why = f"did not end within its time and was stopped ({why})"
            found.append(f"process {i} {why}; the end of {process.log}:\n{tail(process.log)}")
        return found


def tail(log: pathlib.Path, num_lines: int = 40) -> str:
    """The last lines of a log."""
    if not log.exists():
        return "(no log)"
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    | {line[:300]}" for line in lines[-num_lines:])


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(processes: Sequence[Process], limit: float, grace: float = 10.0) -> Ended:
    """Runs processes together and waits for all of them.

    Args:
        processes: each becomes the leader of a process group of its own, which is stopped as a
            whole.
        limit: seconds for the job. Whoever is left is terminated, then killed.
        grace: seconds for the others after one has ended in a way that was not expected.

    Returns:
        How they ended.
    """
    start = time.monotonic()
    deadline = start + limit
    running: list[subprocess.Popen[bytes]] = []
    late: list[int] = []
    wrong = False
    try:
        for process in processes:
            with process.log.open("wb") as stream, _lock:
                running.append(
                    subprocess.Popen(
                        process.command,
                        env=dict(process.environment),
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
                _started.append(running[-1])
        # All are polled each time: a failure of any of them ends the wait for the others.
        while None in (codes := [p.poll() for p in running]) and time.monotonic() < deadline:
            if not wrong and any(
                code not in (None, process.expected)
                for code, process in zip(codes, processes, strict=True)
            ):
                wrong = True
                deadline = min(deadline, time.monotonic() + grace)
            time.sleep(0.02)
        late = [i for i, p in enumerate(running) if p.poll() is None]
    finally:
        stop(running)
        with _lock:
            for process in running:
                _started.remove(process)
    codes = [p.returncode for p in running]
    failed = any(
        code != process.expected
        for i, (code, process) in enumerate(zip(codes, processes, strict=True))
        if i not in late
    )
    return Ended(codes, late, time.monotonic() - start, failed)


def stop_everything() -> None:
    """Ends what other threads have started and still wait for."""
    with _lock:
        running = list(_started)
    stop(running)


def stop(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends these process groups: TERM, then KILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in running:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        deadline = time.monotonic() + _GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:  # what a leader left behind in its group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


# Scenarios ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finished:
    """How one process of a scenario ended.

    Attributes:
        returncode: negative if a signal ended it, as in subprocess.
        log: what it printed, both streams.
    """

    returncode: int
    log: str

    def lines(self, word: str) -> list[str]:
        """What follows the word, of each line that begins with it."""
        start = f"{word} "
        return [x.removeprefix(start) for x in self.log.splitlines() if x.startswith(start)]

    def of(self, scenario: str) -> "Finished":
        """The same with the log of one scenario only, where the process ran several."""
        _, begin, log = self.log.partition(f"SCENARIO {scenario}\n")
        assert begin, f"{scenario} has not begun:\n{self.log}"
        return Finished(self.returncode, log.partition("SCENARIO ")[0])


def worker_processes(
    file: pathlib.Path,
    scenario: str,
    *arguments: str,
    num_processes: int,
    out: pathlib.Path,
    limit: float,
    environment: Mapping[str, str],
    environments: Mapping[int, Mapping[str, str]] | None = None,
    platform: str = "cpu",
    num_gpus: int = 0,
    expected: Mapping[int, int] | None = None,
) -> list[Process]:
    """The processes of a job that runs one function; job.py has what they know of the job.

    Args:
        file: has the function.
        scenario: its name, or several as worker.py takes them.
        *arguments: for it.
        num_processes: of the job.
        out: an existing directory for this job alone. Process i logs to process_<i>.log there.
        limit: seconds, after which the caller will stop them: before, they say where they are.
        environment: all of it, but for what describes the job.
        environments: further variables of single processes.
        platform: "cpu" or "cuda".
        num_gpus: of this host, which the processes take in turn.
        expected: return codes that are not 0, by process.

    Returns:
        What `run` takes.
    """
    port, processes = free_port(), []
    for process in range(num_processes):
        variables = {
            **environment,
            "PYTHONUNBUFFERED": "1",
            "JAX_EP_TEST_PROCESS": str(process),
            "JAX_EP_TEST_NUM_PROCESSES": str(num_processes),
            "JAX_EP_TEST_PORT": str(port),
            "JAX_EP_TEST_OUT": str(out),
            "JAX_EP_TEST_LIMIT": str(limit),
            "JAX_EP_TEST_PLATFORM": platform,
            "JAX_EP_TEST_DEVICE": str(process % max(1, num_gpus)),
            **(environments or {}).get(process, {}),
        }
        command = [sys.executable, "-X", "faulthandler", str(_WORKER), str(file), scenario]
        log = out / f"process_{process}.log"
        code = (expected or {}).get(process, 0)
        processes.append(Process([*command, *arguments], variables, log, code))
    return processes


def run_scenario(
    file: pathlib.Path,
    scenario: str,
    *arguments: str,
    num_processes: int,
    num_devices: int,
    out: pathlib.Path,
    timeout: float = 120,
    expected: Mapping[int, int] | None = None,
    environment: Mapping[str, str] | None = None,
    environments: Mapping[int, Mapping[str, str]] | None = None,
    num_gpus: int = 0,
) -> list[Finished]:
    """Runs a scenario in each process of a job and waits for all of them.

    Args:
        file: has the function.
        scenario: its name, or several as worker.py takes them.
        *arguments: for it.
        num_processes: of the job.
        num_devices: CPU devices of each process.
        out: an existing directory for this job alone.
        timeout: seconds for the whole job.
        expected: return codes that are not 0, by process.
        environment: variables that replace the caller's and the ones that set up the devices.
        environments: further variables of single processes.
        num_gpus: if not 0, the job is on the GPUs of this host, one for each process in turn.

    Returns:
        How each process ended.

    Raises:
        AssertionError: a return code was not the expected one; the message has all logs.
    """
    platform = "cuda" if num_gpus else "cpu"
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(_ROOT)]),
        "JAX_PLATFORMS": platform,
        **cpu_devices(num_devices),
        **(environment or {}),
    }
    processes = worker_processes(
        file,
        scenario,
        *arguments,
        num_processes=num_processes,
        out=out,
        limit=timeout,
        environment=variables,
        environments=environments,
        platform=platform,
        num_gpus=num_gpus,
        expected=expected,
    )
    ended = run(processes, timeout)
    logs = [process.log.read_text(errors="replace") for process in processes]
    if ended.problems(processes):
        raise AssertionError(
            "\n".join(
                f"---- process {i}: exit code {code}, expected {process.expected}\n{log}"
                for i, (process, code, log) in enumerate(
                    zip(processes, ended.returncodes, logs, strict=True)
                )
            )
        )
    return [Finished(*pair) for pair in zip(ended.returncodes, logs, strict=True)]
