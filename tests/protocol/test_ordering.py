"""Calls pair rightly whatever order devices take them in: short runs of stress.py."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

_STRESS = pathlib.Path(__file__).with_name("stress.py")
_ROOT = _STRESS.parents[2]

_SCENARIOS = (
    "eight_layers",
    "one_layer_twice",
    "back_to_back",
    "xla_collectives",
    "disjoint_meshes",
    "two_threads",
    "scan",
    "cond",
    "two_programs",
)


def _stress(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [os.environ.get("PYTHONPATH", ""), str(_ROOT), str(_ROOT / "tests" / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        # stress.py ends itself, with the stacks of its threads, before the outer limit.
        [sys.executable, str(_STRESS), "--timeout=60", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )


@pytest.mark.versions
def test_every_result_is_right() -> None:
    """Each scenario in turn; most of what they take is compilation."""
    run = _stress("--calls=60")
    assert run.returncode == 0, run.stdout + run.stderr
    said = re.findall(r"^(\w+): \d+ calls on 8 devices", run.stdout, re.MULTILINE)
    assert tuple(said) == _SCENARIOS


def test_thirty_two_devices() -> None:
    run = _stress("--devices=32", "--scenario=eight_layers", "--calls=16")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("scenario", "control", "ranks"),
    [("eight_layers", "cross", [0]), ("one_layer_twice", "swap", [0, 1, 2, 3, 4, 5, 6, 7])],
)
def test_a_wrong_pairing_would_be_seen(scenario: str, control: str, ranks: list[int]) -> None:
    """One rank gets what it would get from its neighbour call, or two calls change places."""
    run = _stress(f"--scenario={scenario}", "--calls=16", f"--control={control}")
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"wrong result: out of layer 0 on ranks {ranks}" in run.stdout
