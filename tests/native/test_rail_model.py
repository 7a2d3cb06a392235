"""Tries every order of the steps in which rows cross a rail (rail_model.cc), without a GPU."""

import pathlib
import shutil
import subprocess

import pytest

_MODEL = pathlib.Path(__file__).with_name("rail_model.cc")

# What the model finds, as its exit code, where something is left out.
_WRONG_CHUNK, _NO_END, _WRONG_ROWS = 3, 4, 5
_CONTROLS = {
    "no-credit": _WRONG_CHUNK,
    "early-credit": _WRONG_CHUNK,
    "head-first": _WRONG_CHUNK,
    "counter": _WRONG_CHUNK,
    "restart": _WRONG_CHUNK,
    "one-warp": _NO_END,
    "no-start": _WRONG_ROWS,
    "no-peers": _WRONG_ROWS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("model") / "rail_model"
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", _MODEL, "-o", program]
    subprocess.run(command, check=True, timeout=120)
    return program


def _run(model: pathlib.Path, variant: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([model, variant], capture_output=True, text=True, timeout=120)


def test_chunks_are_whole_rows_arrive_and_calls_end(model: pathlib.Path) -> None:
    done = _run(model, "right")
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(", right") == 3


@pytest.mark.parametrize(("variant", "code"), _CONTROLS.items())
def test_what_is_left_out_is_missed(model: pathlib.Path, variant: str, code: int) -> None:
    done = _run(model, variant)
    assert done.returncode == code, done.stdout
