"""The program as a user runs it: in one process, and in two."""

import contextlib
import os
import pathlib
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import checkpoint
import openai
import pytest
from cpu_devices import cpu_devices

_SECONDS = 120
_PROGRAM = pathlib.Path(checkpoint.__file__).parent / "serve_moe"


class _Process:
    """A running server; its lines can be waited for."""

    def __init__(self, folder: pathlib.Path, num_devices: int, *flags: str):
        command = [sys.executable, str(_PROGRAM), f"--checkpoint={folder}", "--port=0"]
        self._popen = subprocess.Popen(
            [*command, "--chunk=16", "--slots=1", "--rank-seconds=20", *flags],
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

    def wait_for(self, pattern: str) -> re.Match:
        while line := self._lines.get(timeout=_SECONDS):
            self._seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self._seen)}")

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        return self._popen.wait(_SECONDS)

    def close(self) -> None:
        self._popen.kill()
        self._popen.wait()
        self._reader.join()


@contextlib.contextmanager
def _client(process: _Process) -> Iterator[openai.OpenAI]:
    port = process.wait_for(r"listening on http://127\.0\.0\.1:(\d+)$")[1]
    url = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=_SECONDS) as client:
        yield client


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_one_process_and_two_serve_the_same_and_end_as_they_are_told(
    one_layer: pathlib.Path,
) -> None:
    """The same bits; SIGTERM lets what runs come to its end; who loses a process says so."""
    asked = {"model": one_layer.name, "prompt": "a", "max_tokens": 150, "seed": 3}
    together = f"--distributed --coordinator=127.0.0.1:{_free_port()} --num-processes=2".split()
    with contextlib.ExitStack() as stack:
        one = _Process(one_layer, 2)
        stack.callback(one.close)
        two = []
        for i in range(2):
            two.append(_Process(one_layer, 1, *together, f"--process-id={i}"))
            stack.callback(two[-1].close)
        client = stack.enter_context(_client(one))
        other = stack.enter_context(_client(two[0]))
        answer = client.completions.create(**asked).choices[0]
        assert other.completions.create(**asked).choices[0].text == answer.text

        stream = client.completions.create(**asked, stream=True)
        chunks = [next(stream)]
        one.signal(signal.SIGTERM)
        one.wait_for("SIGTERM")
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            client.completions.create(**asked)
        chunks += stream
        assert "".join(chunk.choices[0].text for chunk in chunks) == answer.text
        assert chunks[-1].choices[0].finish_reason == answer.finish_reason
        assert one.wait() == 0

        stream = other.completions.create(**asked, stream=True)
        next(stream)
        two[1].signal(signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError):
            other.completions.create(**asked)
        two[0].signal(signal.SIGTERM)
        assert two[0].wait() == 1
