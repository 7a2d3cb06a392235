"""The HTTP interface when the engine fails or is late."""

import asyncio
import contextlib
import http.client
import importlib
import json
import os
import pathlib
import signal
import socket
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serve_moe.server
from serve_moe import http_api, protocol, steps
from serve_moe.engine import Engine, Sequence
from serve_moe.http_api import Api, HttpLimits
from serve_moe.metrics import Metrics
from serve_moe.server import Server
from serve_moe.text import Tokenizer

_SECONDS = 60


class _ScriptedSteps:
    """In place of Steps: one device with one slot, whose every token is 65."""

    mesh = types.SimpleNamespace(size=1)
    limits = steps.Limits(slots_per_device=1, max_length=1000, buckets=(8,), end_tokens=())

    def prefill(self, chunk: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return self._give()

    def decode(self, keep: np.ndarray) -> dict[str, jax.Array]:
        return self._give()

    def _give(self) -> dict[str, jax.Array]:
        numbers = {"token": [65], "expert_rows": [2], "dropped": [0]}
        return {name: jnp.array(value, jnp.int32) for name, value in numbers.items()}


class _StuckSteps(_ScriptedSteps):
    """One whose devices never finish a step of decoding, until they are released."""

    def __init__(self):
        self.released = threading.Event()

    def decode(self, keep: np.ndarray) -> dict[str, "_StuckSteps"]:
        return dict.fromkeys(("token", "expert_rows", "dropped"), self)

    def copy_to_host_async(self) -> None:
        pass

    def __array__(self) -> np.ndarray:
        assert self.released.wait(_SECONDS)
        return np.full(1, 66, np.int32)


@contextlib.contextmanager
def _serving(
    folder: pathlib.Path,
    check: Callable[[], None] = lambda: None,
    *,
    gives_tokens: bool = True,
    run: _ScriptedSteps | None = None,
    step_seconds: float = _SECONDS,
    **limits,
) -> Iterator[int]:
    """Serves in a thread, at a port of this machine."""
    engine = Engine(
        run or _ScriptedSteps(), Metrics(num_experts=1), check=check, step_seconds=step_seconds
    )
    if gives_tokens:
        engine.start()
    api = Api(engine, Tokenizer(folder), model="tiny", vocab_size=256, limits=HttpLimits(**limits))
    server = Server(api, engine, host="127.0.0.1", port=0, drain_seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # clients may connect from here on
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(_SECONDS)
            assert not thread.is_alive()
            engine.drain()
            if not gives_tokens:
                engine.start()
            assert engine.join(_SECONDS)


def _send(port: int, method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_failure_of_a_device_is_an_error_everywhere(one_layer: pathlib.Path) -> None:
    """Of a stream that has begun, of requests that wait or come, and of /health."""
    import openai  # takes seconds, which not every worker should

    failing = threading.Event()

    def check() -> None:
        if failing.is_set():
            raise RuntimeError("device 3 waited for device 5")

    with contextlib.ExitStack() as stack:
        port = stack.enter_context(_serving(one_layer, check))
        client = stack.enter_context(
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0)
        )
        assert _send(port, "GET", "/health") == (200, {"status": "ok"})
        asked = {"model": "tiny", "prompt": "a", "max_tokens": 900}
        stream = client.completions.create(**asked, stream=True)
        assert set(next(stream).choices[0].text) == {"A"}  # one token, or several at once
        failing.set()
        with pytest.raises(openai.APIError, match="device 3 waited for device 5"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="device 3"):
            client.completions.create(**asked)
        status, answer = _send(port, "GET", "/health")
        assert (status, answer["status"]) == (503, "failed")


def test_failure_while_idle_is_found(one_layer: pathlib.Path) -> None:
    asked = threading.Event()

    def check() -> None:
        asked.set()
        raise RuntimeError("process 1 has ended")

    with _serving(one_layer, check) as port:
        assert asked.wait(_SECONDS)
        deadline = time.monotonic() + _SECONDS
        while _send(port, "GET", "/health")[0] == 200:  # what was raised is on its way
            assert time.monotonic() < deadline
        status, answer = _send(port, "POST", "/v1/completions", {"prompt": "a"})
        assert status == 503
        assert "process 1 has ended" in answer["error"]["message"]


def test_devices_that_never_answer_are_a_failure(one_layer: pathlib.Path) -> None:
    """As those do whose peer has died within a collective: the server does not wait with them."""
    run = _StuckSteps()
    with _serving(one_layer, run=run, step_seconds=0.5) as port:
        body = {"prompt": "a", "max_tokens": 9}
        status, answer = _send(port, "POST", "/v1/completions", body)
        assert status == 500
        assert "a step has not ended in 0.5 s" in answer["error"]["message"]
        assert _send(port, "GET", "/health")[0] == 503
        assert _send(port, "POST", "/v1/completions", body)[0] == 503
    run.released.set()  # nobody is there any more for what comes now


def test_mesh_that_leaves_a_process_without_a_device_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("XLA_FLAGS", "NPROC"):  # which the import sets
        monkeypatch.setenv(name, os.environ[name])
    program = importlib.import_module("serve_moe.__main__")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    args = program.parse_args(["--checkpoint=-", "--dp=1", "--ep=1"])
    with pytest.raises(SystemExit, match="dp 1 x ep 1 leaves no device to process 1"):
        program.choose_mesh(args, 8)


def test_websockets_are_no_way_in(one_layer: pathlib.Path) -> None:
    """Whatever library for them is installed, which uvicorn would take."""
    with _serving(one_layer) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
        with contextlib.closing(connection):
            key = {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
            connection.request(
                "GET", "/health", headers={"Connection": "Upgrade", "Upgrade": "websocket", **key}
            )
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())) == (200, {"status": "ok"})
        assert _send(port, "GET", "/health")[0] == 200


def test_requests_have_a_time_limit(one_layer: pathlib.Path) -> None:
    """For their bodies, whole answers and streams; what has begun ends in an error."""
    with _serving(one_layer, gives_tokens=False, request_seconds=1.0) as port:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(head + b"{")
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        for is_stream in (False, True):
            body = {"prompt": "a", "stream": is_stream}
            status, answer = _send(port, "POST", "/v1/completions", body)
            assert (status, answer["error"]["message"]) == (504, "not done in 1.0 s")


def test_tokens_that_are_there_go_out_together(one_layer: pathlib.Path) -> None:
    """An event loop that is behind the engine catches up; the answer is the same."""

    class Quick:
        limits = _ScriptedSteps.limits

        def submit(self, sequence: Sequence) -> None:
            for token in b"abcde":
                sequence.on_token(token)
            sequence.on_end("length")

        def cancel(self, sequence: Sequence, reason: str = "cancelled") -> None:
            pass

    api = Api(Quick(), Tokenizer(one_layer), model="tiny", vocab_size=256)
    for stop, text, num_tokens in (([], "abcde", 5), (["c"], "ab", 3)):
        body = {"prompt": "a", "stream": True, "stop": stop}
        asked = protocol.parse(body, is_chat=False, model="tiny")
        answer = protocol.Answer(asked, "tiny", 1)

        async def collect(outputs: AsyncIterator[tuple[str, str | None]]) -> list:
            return [output async for output in outputs]

        outputs = asyncio.run(collect(api._generate(asked, [97], answer, float("inf"))))
        assert outputs == [(text, "stop" if stop else "length")]
        assert answer.num_tokens == num_tokens


def test_clients_that_do_not_read_or_ask_are_cut_off(
    one_layer: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server has yet to send what it has closed with: the connection is gone."""
    monkeypatch.setattr(http_api, "_LAST_READ_SECONDS", 0.1)
    monkeypatch.setattr(serve_moe.server, "_PATIENCE_SECONDS", 0.5)
    connections, on_tick = [0], Server.on_tick

    async def counted(server: Server, counter: int) -> bool:
        connections.append(len(server.server_state.connections))
        return await on_tick(server, counter)

    monkeypatch.setattr(Server, "on_tick", counted)
    with contextlib.ExitStack() as stack:
        # Every token an event: more than fits between the two.
        port = stack.enter_context(
            _serving(one_layer, lambda: time.sleep(0.001), request_seconds=1.5)
        )
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        kept = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200")
        kept.sendall(b"G")  # of a next request, which stops uvicorn's own clock
        silent = stack.enter_context(socket.socket())
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", port))
        body = json.dumps({"prompt": "a", "max_tokens": 990, "stream": True})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        silent.sendall((head + body).encode())
        deadline = time.monotonic() + _SECONDS
        while max(connections) < 3 or connections[-1] > 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_client_that_leaves_before_its_body_is_whole_is_no_error(one_layer: pathlib.Path) -> None:
    api = Api(None, Tokenizer(one_layer), model="tiny", vocab_size=256)
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    sent = []

    async def receive() -> dict:
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(api.app(scope, receive, send))  # what it raises would be in the log
    assert sent[0]["status"] == 499


@pytest.mark.parametrize(
    "message",
    [
        {"content": "a"},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]},
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
    ],
    ids=str,
)
def test_messages_that_are_not_texts_are_refused(message: dict) -> None:
    with pytest.raises(protocol.RequestError):
        protocol.parse({"messages": [message]}, is_chat=True, model="tiny")


def test_second_signal_ends_at_once(
    one_layer: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the signal itself, whatever the event loop does."""
    engine = Engine(_ScriptedSteps(), Metrics(num_experts=1))
    api = Api(engine, Tokenizer(one_layer), model="tiny", vocab_size=256)
    server = Server(api, engine, host="127.0.0.1", port=0, drain_seconds=5)
    done = []
    monkeypatch.setattr(signal, "signal", lambda *args: done.append(args))
    monkeypatch.setattr(signal, "raise_signal", lambda *args: done.append(args))
    server.handle_exit(signal.SIGTERM, None)
    assert done == []
    server.handle_exit(signal.SIGTERM, None)
    assert done == [(signal.SIGTERM, signal.SIG_DFL), (signal.SIGTERM,)]
