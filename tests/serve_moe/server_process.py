"""The server as a user runs it."""

import os
import pathlib
import queue
import re
import subprocess
import sys
import threading

import checkpoint
from cpu_devices import cpu_devices

SECONDS = 120  # for what is waited for
_PROGRAM = pathlib.Path(checkpoint.__file__).parent / "serve_moe"


class ServerProcess:
    """A running server; its lines can be waited for."""

    def __init__(self, folder: pathlib.Path, num_devices: int, *flags: str):
        command = [sys.executable, str(_PROGRAM), f"--checkpoint={folder}", "--port=0"]
        self._popen = subprocess.Popen(
            [*command, *flags],
            env={**os.environ, **cpu_devices(num_devices), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._seen: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self._popen.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    def port(self) -> int:
        """Of HTTP, once it listens."""
        return int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)$")[1])

    def wait_for(self, pattern: str) -> re.Match:
        while line := self._lines.get(timeout=SECONDS):
            self._seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self._seen)}")

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        return self._popen.wait(SECONDS)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join()
