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
    """A running server; its lines can be waited for.

    On virtual devices; on GPUs where JAX_EP_SERVE_ON says cuda: all of them, or, for one of several
    processes, the one that has its number.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        num_devices: int,
        *flags: str,
        process_id: int | None = None,
    ):
        command = [sys.executable, str(_PROGRAM), f"--checkpoint={folder}", "--port=0"]
        environment = {**cpu_devices(num_devices), "JAX_PLATFORMS": "cpu"}
        if os.environ.get("JAX_EP_SERVE_ON") == "cuda":
            environment = {"JAX_PLATFORMS": "cuda,cpu"}
            if process_id is not None:
                environment["JAX_LOCAL_DEVICE_IDS"] = str(process_id)
        if process_id is not None:
            command += [f"--process-id={process_id}"]
        self._popen = subprocess.Popen(
            [*command, *flags],
            env={**os.environ, **environment},
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
        """Of HTTP, once it listens; nothing that it has said is a warning."""
        port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)$")[1])
        assert not [line for line in self._seen if "Warning" in line]
        return port

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
