"""Texts like XLA's dumps, and where their custom calls are."""

import pathlib

import pytest
from thunks import recorded_thunks


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


def test_recorded_loops(tmp_path: pathlib.Path) -> None:
    (tmp_path / "module_0001.jit_f.thunk_sequence.txt").write_text(
        "000: kWhile\n  body\n    001: kCommandBuffer\n      002: kCustomCall\n"
        "003: kCommandBuffer\n  004: kWhile\n    005: kCustomCall\n"
    )
    assert recorded_thunks(tmp_path, "kWhile") == (1, 1)
    assert recorded_thunks(tmp_path) == (2, 0)
