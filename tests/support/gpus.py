"""The GPUs of this host, and NVIDIA's service by which several processes share one."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping


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
