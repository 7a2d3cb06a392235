"""The usage example in README.md runs as it stands, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_usage_example_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    program = tmp_path / "usage.py"
    program.write_text(blocks[0])
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    result = subprocess.run(
        [sys.executable, program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    value, shapes = result.stdout.split(" ", 1)
    assert float(value) > 0
    assert shapes.strip() == "[(256, 64), (64, 16), (16, 64, 64)]"
