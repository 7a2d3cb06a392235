"""Calls pair rightly whatever order devices take them in: short runs of stress.py."""

import os
import pathlib
import subprocess
import sys

import pytest

_STRESS = pathlib.Path(__file__).with_name("stress.py")
_ROOT = _STRESS.parents[2]

# Together they take about 20 s on two cores; most of it is compilation.
_SCENARIOS = (
    ("eight_layers", 80),
    ("one_layer_twice", 60),
    ("back_to_back", 90),
    ("xla_collectives", 60),
    ("disjoint_meshes", 60),
    ("two_threads", 60),
    ("scan", 60),
    ("cond", 60),
    ("two_programs", 60),
)


def _stress(*arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [os.environ.get("PYTHONPATH", ""), str(_ROOT), str(_ROOT / "tests" / "support")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        # stress.py ends itself, with the stacks of its threads, before the outer limit.
        [sys.executable, str(_STRESS), "--timeout=120", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


@pytest.mark.parametrize(("scenario", "calls"), _SCENARIOS)
def test_every_result_is_right(scenario: str, calls: int) -> None:
    run = _stress(f"--scenario={scenario}", f"--calls={calls}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{scenario}: " in run.stdout


@pytest.mark.once
def test_thirty_two_devices() -> None:
    run = _stress("--devices=32", "--scenario=eight_layers", "--calls=16")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.once
@pytest.mark.parametrize("control", ["cross", "swap"])
@pytest.mark.parametrize("scenario", ["eight_layers", "one_layer_twice"])
def test_a_wrong_pairing_would_be_seen(scenario: str, control: str) -> None:
    """One rank gets what it would get from its neighbour call, or two calls change places."""
    run = _stress(f"--scenario={scenario}", "--calls=16", f"--control={control}")
    assert run.returncode == 1, run.stdout + run.stderr
    ranks = {"cross": "[0]", "swap": "[0, 1, 2, 3, 4, 5, 6, 7]"}[control]
    assert f"wrong result: out of layer 0 on ranks {ranks}" in run.stdout
