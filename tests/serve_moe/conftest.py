"""One set of compiled programs, with a tiny checkpoint on dp 2 x ep 4, for tests of the server."""

import pathlib
import sys
from collections.abc import Iterator

import jax
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import checkpoint
import tiny_checkpoint
from serve_moe import steps
from serve_moe.engine import Engine
from serve_moe.metrics import Metrics


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == pathlib.Path(__file__).parent:
            item.add_marker(pytest.mark.once)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The tiny checkpoints by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in tiny_checkpoint.CONFIGS}
    for name, folder in folders.items():
        tiny_checkpoint.write(folder, tiny_checkpoint.CONFIGS[name])
    return folders


@pytest.fixture(scope="session")
def run(folders: dict[str, pathlib.Path]) -> steps.Steps:
    """The programs, compiled. One engine at a time may use them."""
    config = tiny_checkpoint.CONFIGS["normalised"]
    mesh = jax.make_mesh((2, 4), steps.AXES, devices=jax.devices()[:8])
    params = checkpoint.load_params(folders["normalised"], config, mesh, "float32")
    limits = steps.Limits(
        slots_per_device=2, max_length=60, buckets=(4, 8), end_tokens=(tiny_checkpoint.END,)
    )
    return steps.Steps(params, mesh, config, limits)


@pytest.fixture
def engine(run: steps.Steps) -> Iterator[Engine]:
    """An engine that runs until the end of the test."""
    engine = Engine(run, Metrics(run.config.num_experts), max_queue=40)
    engine.start()
    yield engine
    engine.drain()
    assert engine.join(timeout=60)
