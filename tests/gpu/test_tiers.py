"""run_tiers.py, tested on CPU: it must not lie about what ran, or hang."""

import os
import pathlib
import re
import subprocess
import sys
import time
import types

import launcher
import pytest
import tiers
from context import Builds, Context, Job
from tiers import RACECHECKED_KERNEL, native, run_file, slot_breaks, slots_race_control

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


_HANGING = """
import pathlib, time

def test_right():
    pass

def test_stuck():
    pathlib.Path(__file__).with_name("stuck").touch()
    time.sleep(600)
"""


def _context(out: pathlib.Path, seconds_left: float = 1e9, platform: str = "cpu") -> Context:
    return Context(
        platform=platform,
        num_gpus=2,
        package=None,
        out=out,
        quick=True,
        keyword=None,
        broken_package=None,
        broken_slots=out,
        calls=8,
        seconds=6.0,
        examples=0.05,
        builds=Builds(out, 1),
        deadline=time.monotonic() + seconds_left,
    )


def test_a_test_that_hangs_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those before it are counted, also if the job has to be ended: here as soon as it hangs."""
    test = tmp_path / "test_that_hangs.py"

    def monotonic() -> float:
        return time.monotonic() + (1000 if (tmp_path / "stuck").exists() else 0)

    clock = types.SimpleNamespace(monotonic=monotonic, sleep=time.sleep)
    monkeypatch.setattr(launcher, "time", clock)
    test.write_text(_HANGING)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(_ROOT)])
    )
    result = run_file(_context(tmp_path), "hanging", test, limit=150)
    (line,) = result.lines
    assert (line.passed, line.failed, line.skipped) == (1, 1, {})
    told = "\n".join(result.problems)
    assert "test_that_hangs.py::test_stuck was running when the process ended" in told
    assert "did not end within its time" in told


def test_what_the_budget_cuts_short_is_skipped(tmp_path: pathlib.Path) -> None:
    """Nothing of it has failed: neither the test that was running, nor what did not begin."""
    (tmp_path / "test_that_hangs.py").write_text(_HANGING)
    (tmp_path / "test_later.py").write_text("def test_later():\n    pass\n")
    tests = [str(tmp_path / name) for name in ("test_that_hangs.py", "test_later.py")]
    done = _run_tiers("--platform=cpu", "--budget=8", f"--out={tmp_path}", "--pytest", *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    assert done.stdout.count("skipped 1: cut short by --budget") == 2
    assert "FAILED" not in done.stdout


def test_a_failure_before_the_budget_ends_is_told(tmp_path: pathlib.Path) -> None:
    wrong = launcher.Process(
        [sys.executable, "-c", "raise SystemExit(7)"], os.environ, tmp_path / "a"
    )
    waiting = launcher.Process(
        [sys.executable, "-c", "import time; time.sleep(600)"], os.environ, tmp_path / "b"
    )
    job = _context(tmp_path, seconds_left=3).run([wrong, waiting], limit=100)
    assert job.cut is None
    assert "process 0 exit code 7, expected 0" in job.problems[0]


def test_a_native_run_that_the_budget_cuts_short(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is cut, those after it have no time left, and the tier has not failed."""
    program = tmp_path / "kernels_test"
    program.write_text("#!/bin/sh\nsleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(Builds, "wait", lambda *_: tmp_path)
    context = _context(tmp_path, seconds_left=2, platform="cuda")
    result = native(context)
    assert not result.problems
    ran = [line for line in result.lines if line.what.startswith("plain")]
    assert [line.skipped for line in ran] == [{"cut short by --budget": 1}] * 2
    assert not any(line.failed for line in result.lines)


def test_what_racecheck_looks_at_exists() -> None:
    """A filter that no kernel matches would find no hazards."""
    sources = [path.read_text() for path in (_ROOT / "cuda").rglob("*.cu")]
    found = [name for text in sources for name in re.findall(r"void (\w+_kernel)\(", text)]
    assert len(found) >= 3
    assert [name for name in found if RACECHECKED_KERNEL in name] == [RACECHECKED_KERNEL]


def test_a_break_of_slots_that_nothing_sees_is_a_failure(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all that slots may lack, each with a package of its own."""
    names = list(slot_breaks())
    assert len(names) > 2
    assert list(slot_breaks().values()) == list(range(1, len(names) + 1))
    ran = []

    def run_broken(ctx: Context, name: str, package: pathlib.Path, _: str) -> object:
        ran.append(package)
        seen = [] if name.endswith(names[1]) else ["E   AssertionError: stale or early rows"]
        return Job([], None, 1.0), seen

    monkeypatch.setattr(tiers, "run_broken", run_broken)
    result = slots_race_control(_context(tmp_path, seconds_left=9, platform="cuda"))
    assert ran == [tmp_path / name for name in names]
    assert [(line.what, line.failed) for line in result.lines] == [
        (name, int(name == names[1])) for name in names
    ]
    assert result.problems == [f"{names[1]}: no race was seen"]
    assert result.lines[0].notes == ["AssertionError: stale or early rows"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("E   AssertionError: wrong rows, by rank: [3 0]", set()),
        # Who waits in vain has lost what was written over; without tags nobody waits.
        ("E   x.JaxRuntimeError: DEADLINE_EXCEEDED: jax_ep_combine: a waited for b", {"kBreakTag"}),
        ("E   ImportError: jax_ep", {"kBreakTag", "kBreakParity", "kBreakWait"}),
    ],
)
def test_only_a_race_shows_a_break_of_slots(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, text: str, problems: set[str]
) -> None:
    monkeypatch.setattr(tiers, "run_broken", lambda *_: (Job([], None, 1.0), [text]))
    result = slots_race_control(_context(tmp_path, seconds_left=9, platform="cuda"))
    assert {problem.split(":")[0] for problem in result.problems} == problems


def test_blocks_without_a_place_show_no_break_of_slots(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "E   AssertionError: wrong rows\nonly 11 of 12 blocks got a streaming multiprocessor"
    monkeypatch.setattr(tiers, "run_broken", lambda *_: (Job([], None, 1.0), [text]))
    result = slots_race_control(_context(tmp_path, seconds_left=9, platform="cuda"))
    assert len(result.problems) == len(slot_breaks())
