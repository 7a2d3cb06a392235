"""Reads XLA's dump of its thunks: what is in a command buffer?"""

import pathlib
import re


def recorded_thunks(dump: pathlib.Path, kind: str = "kCustomCall") -> tuple[int, int]:
    """Thunks of a kind inside and outside of command buffers, as XLA's dump has them.

    The dump is one line a thunk, "number: kind ...", those inside another one indented under it. If
    the passes that make command buffers change anything they dump once more.
    """
    found = sorted(dump.glob("*thunk_sequence_after_thunk_passes*.txt"))
    found = found or sorted(dump.glob("*thunk_sequence.txt"))
    if not found:
        names = sorted(p.name for p in dump.glob("*"))
        raise AssertionError(f"XLA left no thunk sequence in {dump}: {names[:20]}")
    inside = outside = 0
    for path in found:
        buffer_at: int | None = None  # the column of the command buffer that we are in
        for line in path.read_text(errors="replace").splitlines():
            found_kind = re.search(r"\bk[A-Z]\w*", line)
            if found_kind is None:
                continue
            if buffer_at is not None and found_kind.start() <= buffer_at:
                buffer_at = None
            if found_kind.group() == "kCommandBuffer" and buffer_at is None:
                buffer_at = found_kind.start()
            if found_kind.group() == kind:
                inside += buffer_at is not None
                outside += buffer_at is None
    return inside, outside
