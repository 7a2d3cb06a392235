"""run_tiers.py, tested on CPU: it must not lie about what ran, or hang."""

import os
import pathlib
import re
import subprocess
import sys

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
    assert "calls, race, K = 1: 8" in done.stdout
    assert "calls, race, K = 2: 8" in done.stdout
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


def test_what_racecheck_looks_at_exists() -> None:
    """A filter that no kernel matches would find no hazards."""
    sources = [path.read_text() for path in (_ROOT / "cuda").rglob("*.cu")]
    found = [name for text in sources for name in re.findall(r"void (\w+_kernel)\(", text)]
    assert len(found) >= 3
    assert [name for name in found if RACECHECKED_KERNEL in name] == [RACECHECKED_KERNEL]
