"""Starts the processes of a test job, watches over them, and stops whatever it started."""

import contextlib
import dataclasses
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

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
    """

    returncodes: list[int]
    late: list[int]
    seconds: float

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
    failed = False
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
            wrong = [
                i
                for i, (code, process) in enumerate(zip(codes, processes, strict=True))
                if code not in (None, process.expected)
            ]
            if wrong and not failed:
                failed = True
                deadline = min(deadline, time.monotonic() + grace)
            time.sleep(0.02)
        late = [i for i, p in enumerate(running) if p.poll() is None]
    finally:
        stop(running)
        with _lock:
            for process in running:
                _started.remove(process)
    return Ended([p.returncode for p in running], late, time.monotonic() - start)


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


def visible_devices() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    return [device for device in visible.split(",") if device.strip() not in ("", "-1")]


def count_gpus() -> int:
    """GPUs that processes will see; makes no CUDA context in this one."""
    visible = visible_devices()
    if visible is not None:
        return len(visible)
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return len(re.findall(r"^GPU \d+:", listed.stdout, re.MULTILINE))


@contextlib.contextmanager
def multi_process_service(out: pathlib.Path, ranks_per_gpu: int) -> Iterator[dict[str, str]]:
    """NVIDIA's MPS for the time of a job: its clients' kernels run side by side on one GPU.

    The ranks of one GPU wait for each other's kernels, so together they must fit its SMs: each gets
    its share less a fifth.

    Args:
        out: an existing directory with a short path; sockets are made in it.
        ranks_per_gpu: clients of each GPU.

    Yields:
        What the clients' environment needs.

    Raises:
        RuntimeError: the daemon does not start.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        raise RuntimeError("nvidia-cuda-mps-control is not installed")
    pipes, logs = out / "mps", out / "mps_log"
    pipes.mkdir()
    logs.mkdir()
    daemon = {"CUDA_MPS_PIPE_DIRECTORY": str(pipes), "CUDA_MPS_LOG_DIRECTORY": str(logs)}
    environment = {**os.environ, **daemon}
    started = subprocess.run(
        [control, "-d"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=30,
    )
    if started.returncode != 0:
        raise RuntimeError(f"nvidia-cuda-mps-control -d: exit code {started.returncode}")
    try:
        share = max(1, 80 // ranks_per_gpu)
        clients = {**daemon, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(share)}
        if visible := visible_devices():
            # The daemon has chosen; its clients count from 0 what it has.
            clients["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(len(visible))))
        yield clients
    finally:
        pids = _mps_pids(control, environment, pipes)
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [control],
                input=b"quit -t 2\n",
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=10,
            )
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(
            pathlib.Path(f"/proc/{p}").exists() for p in pids
        ):
            time.sleep(0.05)
        for pid in pids:
            with contextlib.suppress(OSError):
                if pathlib.Path(f"/proc/{pid}/comm").read_text().startswith("nvidia-cuda-mps"):
                    os.kill(pid, signal.SIGKILL)


def _mps_pids(control: str, environment: Mapping[str, str], pipes: pathlib.Path) -> list[int]:
    """The daemon that was started with these pipes, and its servers."""
    pids = []
    with contextlib.suppress(subprocess.TimeoutExpired):
        listed = subprocess.run(
            [control],
            input=b"get_server_list\n",
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=10,
        )
        pids += [int(word) for word in listed.stdout.split() if word.isdigit()]
    with contextlib.suppress(OSError, ValueError):
        pids.append(int((pipes / "nvidia-cuda-mps-control.pid").read_text()))
    return pids
