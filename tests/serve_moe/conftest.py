"""Tiny checkpoints for tests of the server."""

import dataclasses
import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

import checkpoint
import tiny_checkpoint


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """The tiny checkpoints by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in tiny_checkpoint.CONFIGS}
    for name, folder in folders.items():
        tiny_checkpoint.write(folder, tiny_checkpoint.CONFIGS[name])
    return folders


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint that compiles in less time, with a tokenizer: a token is a byte."""
    folder = tmp_path_factory.mktemp("one_layer")
    config = dataclasses.replace(tiny_checkpoint.CONFIGS["tied"], num_hidden_layers=1)
    tiny_checkpoint.write(folder, config)
    (folder / "tokenizer.json").write_text(json.dumps(checkpoint.byte_tokenizer()))
    return folder
