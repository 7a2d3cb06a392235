"""Models of protocols, of which every order of steps is tried, without GPU or network.

How calls fail (give_up_model.cc), how other nodes hear of it (tell_model.cc), how rows cross rails
(rail_model.cc), and sums (rail_combine_model.cc), how calls in slots cross (far_slots_model.cc).
"""

import functools
import pathlib
import shutil
import subprocess

import pytest

_FOLDER = pathlib.Path(__file__).parent

# By model: what it finds, as its exit code, where something is left out or done otherwise.
_WRITTEN_AFTER, _WRONG_CHUNK, _TOLD_TWICE, _NO_END, _WRONG_ROWS = 3, 3, 3, 4, 5
_WRONG_UNIT, _FALLS = 3, 5
_CONTROLS = {
    "give_up_model": {
        "no-wait": _WRITTEN_AFTER,
        "look": _WRITTEN_AFTER,
        "two-steps": _WRITTEN_AFTER,
        "early-left": _WRITTEN_AFTER,
        "left-last": _NO_END,
        "no-progress": _NO_END,
    },
    "tell_model": {
        "not-told": _NO_END,
        "rail": _NO_END,
        "own-only": _NO_END,
        "no-record": _TOLD_TWICE,
    },
    "rail_model": {
        "no-credit": _WRONG_CHUNK,
        "early-credit": _WRONG_CHUNK,
        "head-first": _WRONG_CHUNK,
        "counter": _WRONG_CHUNK,
        "restart": _WRONG_CHUNK,
        "one-warp": _NO_END,
        "no-start": _WRONG_ROWS,
        "no-peers": _WRONG_ROWS,
    },
    "rail_combine_model": {
        "one-sender": _NO_END,
        "first-leaves": _WRONG_CHUNK,
        "one-count": _WRONG_CHUNK,
    },
    "far_slots_model": {
        "one-area": _WRONG_UNIT,
        "one-word": _WRONG_UNIT,
        "not-told": _FALLS,
        "dropped-unit": _FALLS,
        "signal-first": _WRONG_UNIT,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def _built(folder: pathlib.Path, name: str) -> pathlib.Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{_FOLDER.parents[1]}"]
    command += [str(_FOLDER / f"{name}.cc"), "-o", str(folder / name)]
    subprocess.run(command, check=True, timeout=120)
    return folder / name


def _run(model: pathlib.Path, variant: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([model, variant], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("name", "num_sizes"),
    [
        ("give_up_model", 2),
        ("tell_model", 4),
        ("rail_model", 3),
        ("rail_combine_model", 5),
        ("far_slots_model", 2),
    ],
)
def test_every_order_is_right(folder: pathlib.Path, name: str, num_sizes: int) -> None:
    done = _run(_built(folder, name), "right")
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(", right") == num_sizes


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name, variants in _CONTROLS.items() for variant in variants],
)
def test_what_is_left_out_is_missed(folder: pathlib.Path, name: str, variant: str) -> None:
    done = _run(_built(folder, name), variant)
    assert done.returncode == _CONTROLS[name][variant], done.stdout
