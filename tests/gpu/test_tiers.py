"""The launcher for machines with GPUs, tested on CPU: it must not lie about what ran or hang."""

import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import jobs
import pytest
from exchange import OutOfStepError, SocketExchange
from thunks import recorded_thunks
from tiers import RACECHECKED_KERNEL

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parents[1]


def _run_tiers(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [os.environ.get("PYTHONPATH", ""), str(_ROOT)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_EP_TEST")}
    return subprocess.run(
        [sys.executable, str(_HERE / "run_tiers.py"), *arguments],
        env=inherited | {"PYTHONPATH": os.pathsep.join(p for p in paths if p)} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_without_a_gpu_all_is_skipped_with_a_reason() -> None:
    done = _run_tiers("--quick", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped 1: no GPU here" in done.stdout
    assert "failed in" not in done.stdout  # nothing was started


def test_two_processes_in_step(tmp_path: pathlib.Path) -> None:
    """Some tests of the suite and the race, one rank a process."""
    done = _run_tiers(
        "--platform=cpu",
        "--tiers=process-per-gpu",
        "-k=test_race or test_one_token or test_moe_is or test_static_fields",
        "--calls=8",
        f"--out={tmp_path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    assert "calls, race: 8" in done.stdout
    logs = list(tmp_path.glob("run_*/process-per-gpu/process_*.log"))
    assert len(logs) == 2
    assert all(" passed" in log.read_text() for log in logs)


def test_a_failure_is_told(tmp_path: pathlib.Path) -> None:
    test = tmp_path / "test_that_fails.py"
    test.write_text(
        "def test_right():\n    pass\n\ndef test_wrong():\n    assert 1 == 2, 'see me'\n"
    )
    done = _run_tiers("--platform=cpu", f"--pytest={test}", f"--out={tmp_path}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "see me" in done.stdout
    assert "1 passed, 1 failed" in done.stdout
    assert "process 0 exit code 1, expected 0" in done.stdout


def test_a_test_that_hangs_is_named(tmp_path: pathlib.Path) -> None:
    """Those before it are counted, also if the job has to be ended."""
    test = tmp_path / "test_that_hangs.py"
    test.write_text(
        "import time\n\ndef test_right():\n    pass\n\ndef test_stuck():\n    time.sleep(600)\n"
    )
    done = _run_tiers("--platform=cpu", f"--pytest={test}", f"--out={tmp_path}", "--budget=10")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 passed, 1 failed" in done.stdout
    assert "test_that_hangs.py::test_stuck was running when the process ended" in done.stdout
    assert "did not end within its time" in done.stdout


def test_a_job_that_hangs_is_ended_with_all_its_children(tmp_path: pathlib.Path) -> None:
    """The leader ignores TERM, has a child that does too, and the log says how far it came."""
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    child = f"{ignore}time.sleep(600)"
    parent = (
        f"{ignore}import subprocess, sys\n"
        f"print('child', subprocess.Popen([sys.executable, '-c', {child!r}]).pid, flush=True)\n"
        "time.sleep(600)"
    )
    hanging = jobs.Process([sys.executable, "-c", parent], os.environ, tmp_path / "hanging.log")
    quick = jobs.Process([sys.executable, "-c", ""], os.environ, tmp_path / "quick.log")
    start = time.monotonic()
    ended = jobs.run([hanging, quick], limit=1.5)
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


def test_what_racecheck_looks_at_exists() -> None:
    """A filter that no kernel matches would find no hazards."""
    sources = [path.read_text() for path in (_ROOT / "cuda" / "kernels").glob("*.cu")]
    found = [name for text in sources for name in re.findall(r"void (\w+_kernel)\(", text)]
    assert len(found) >= 3
    assert [name for name in found if RACECHECKED_KERNEL in name] == [RACECHECKED_KERNEL]


def test_one_failure_ends_the_others(tmp_path: pathlib.Path) -> None:
    wrong = jobs.Process([sys.executable, "-c", "raise SystemExit(7)"], os.environ, tmp_path / "a")
    waiting = jobs.Process(
        [sys.executable, "-c", "import time; time.sleep(600)"], os.environ, tmp_path / "b"
    )
    start = time.monotonic()
    ended = jobs.run([wrong, waiting], limit=100, grace=0.2)
    assert time.monotonic() - start < 20
    assert ended.returncodes == [7, -15]
    assert len(ended.problems([wrong, waiting])) == 2


def _exchange(socket: pathlib.Path, values: list[list[int]]) -> list[object]:
    """What two processes, here threads, get for the values that each of them sends in turn."""
    results: list[object] = [None, None]

    def work(process: int) -> None:
        try:
            exchange = SocketExchange(socket, process, 2, timeout=2)
            results[process] = [exchange.all_gather(value) for value in values[process]]
        except OutOfStepError as error:
            results[process] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_exchange(tmp_path: pathlib.Path) -> None:
    results = _exchange(tmp_path / "socket", [[1, 2], [10, 20]])
    assert results == [[[1, 10], [2, 20]]] * 2


def test_a_process_that_does_less_is_found_out(tmp_path: pathlib.Path) -> None:
    results = _exchange(tmp_path / "socket", [[1, 2], [10]])
    assert isinstance(results[0], OutOfStepError)
    assert "process 1" in str(results[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("000: kCommandBuffer\t\n  001: kKernel\tfusion\n  002: kCustomCall\tcall\n\n", (1, 0)),
        (
            "000: kCommandBuffer\t\n001:   kCustomCall\n002:   kCustomCall\n003: kCustomCall\n",
            (2, 1),
        ),
        ("001: kCustomCall\tcall\n002: kKernel\tfusion_kCommandBuffer_like\n", (0, 1)),
        (
            "000: kWhile\n  condition\n    001: kKernel\n  body\n    002: kCommandBuffer\n"
            "      003: kCustomCall\n    004: kCustomCall\n005: kCustomCall\n",
            (1, 2),
        ),
    ],
)
def test_recorded_thunks(tmp_path: pathlib.Path, text: str, expected: tuple[int, int]) -> None:
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text("001: kKernel\n")
    with_passes = tmp_path / "module_0001.jit_f.thunk_sequence_after_thunk_passes.txt"
    with_passes.write_text(text)
    assert recorded_thunks(tmp_path) == expected
