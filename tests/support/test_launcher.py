"""The launcher: whoever hangs or fails is found, ended and told of, with all its children."""

import os
import pathlib
import sys
import time

import launcher


def test_a_job_that_hangs_is_ended_with_all_its_children(tmp_path: pathlib.Path) -> None:
    """The leader ignores TERM, has a child that does too, and the log says how far it came."""
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child = f"{ignore}time.sleep(600)"
    parent = (
        f"{ignore}import subprocess, sys\n"
        f"print('child', subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\n"
        "time.sleep(600)"
    )
    hanging = launcher.Process([sys.executable, "-c", parent], os.environ, tmp_path / "hanging.log")
    quick = launcher.Process([sys.executable, "-c", ""], os.environ, tmp_path / "quick.log")
    start = time.monotonic()
    ended = launcher.run([hanging, quick], limit=1.5)
    assert time.monotonic() - start < 15
    assert ended.late == [0]
    assert ended.returncodes == [-9, 0]
    (problem,) = ended.problems([hanging, quick])
    assert "did not end within its time" in problem
    pid = int(hanging.log.read_text().split()[1])
    deadline = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_one_failure_ends_the_others(tmp_path: pathlib.Path) -> None:
    wrong = launcher.Process(
        [sys.executable, "-c", "raise SystemExit(7)"], os.environ, tmp_path / "a"
    )
    waiting = launcher.Process(
        [sys.executable, "-c", "import time; time.sleep(600)"], os.environ, tmp_path / "b"
    )
    start = time.monotonic()
    ended = launcher.run([wrong, waiting], limit=100, grace=0.2)
    assert time.monotonic() - start < 20
    assert ended.returncodes == [7, -15]
    assert len(ended.problems([wrong, waiting])) == 2
