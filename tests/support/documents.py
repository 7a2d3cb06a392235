"""Runs the Python of a document, and compares what it prints with what the document says."""

import contextlib
import dataclasses
import io
import itertools
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_DEVICES = "--xla_force_host_platform_device_count=8"
_LINES_BETWEEN = 4  # at most, of a block of Python and what it prints


@dataclasses.dataclass(frozen=True)
class Example:
    """A block of Python in a document.

    Attributes:
        line: of the document, of its first line.
        source: the program.
        expected: what it prints, as in the block marked ``text`` that follows; "" if none does.
    """

    line: int
    source: str
    expected: str


def read_examples(text: str) -> list[Example]:
    """The blocks of Python in Markdown."""
    examples = []
    blocks = list(_BLOCK.finditer(text))
    for block, following in itertools.zip_longest(blocks, blocks[1:]):
        if block[1] != "python":
            continue
        expected = ""
        if following is not None and following[1] == "text":
            between = text[block.end() : following.start()]
            if between.count("\n") <= _LINES_BETWEEN:
                expected = following[2]
        line = text.count("\n", 0, block.start(2)) + 1
        examples.append(Example(line, block[2], expected))
    return examples


def run_examples(path: pathlib.Path, xla_flags: str = "") -> None:
    """Runs a document's blocks as one program, in this process.

    Args:
        path: the document.
        xla_flags: added to those that the document sets.

    Raises:
        AssertionError: one printed something else than the document says.
    """
    text = path.read_text().replace(_DEVICES, f"{_DEVICES} {xla_flags}")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for example in read_examples(text):
        numbered = "\n" * (example.line - 1) + example.source  # for tracebacks
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(numbered, path, "exec"), namespace)
        if printed.getvalue() != example.expected:
            raise AssertionError(
                f"{path}, line {example.line}, printed\n{printed.getvalue()}\n"
                f"but the document says\n{example.expected or '(nothing)'}"
            )


def check_examples(path: pathlib.Path, xla_flags: str = "") -> None:
    """The same in a process of its own, in which nothing is set up but what the document does."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    result = subprocess.run(
        [sys.executable, __file__, path, xla_flags],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


if __name__ == "__main__":
    run_examples(pathlib.Path(sys.argv[1]), *sys.argv[2:])
