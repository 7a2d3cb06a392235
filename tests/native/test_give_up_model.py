"""Tries every order of the steps in which calls fail on GPUs (give_up_model.cc), without one."""

import pathlib
import shutil
import subprocess

import pytest

_MODEL = pathlib.Path(__file__).with_name("give_up_model.cc")
_ROOT = _MODEL.parents[2]

# What the model finds, as its exit code, where something is left out.
_WRITTEN, _NO_END = 3, 4
_CONTROLS = {
    "no-wait": _WRITTEN,
    "look": _WRITTEN,
    "two-steps": _WRITTEN,
    "early-left": _WRITTEN,
    "left-last": _NO_END,
    "no-progress": _NO_END,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("model") / "give_up_model"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{_ROOT}", _MODEL]
    subprocess.run([*command, "-o", program], check=True, timeout=120)
    return program


def _run(model: pathlib.Path, variant: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([model, variant], capture_output=True, text=True, timeout=120)


def test_nobody_writes_after_the_end_and_every_call_ends(model: pathlib.Path) -> None:
    done = _run(model, "right")
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert "2 ranks" in done.stdout
    assert "3 ranks" in done.stdout


@pytest.mark.parametrize(("variant", "code"), _CONTROLS.items())
def test_what_is_left_out_is_missed(model: pathlib.Path, variant: str, code: int) -> None:
    done = _run(model, variant)
    assert done.returncode == code, done.stdout
