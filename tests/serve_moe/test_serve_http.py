"""The running server, and a client made by others."""

import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator

import checkpoint
import jax
import openai
import pytest
import tiny_checkpoint
from serve_moe import load_test, steps
from serve_moe.engine import Engine, Sampling, Sequence
from serve_moe.http_api import Api, HttpLimits
from serve_moe.metrics import Metrics
from serve_moe.server import Server
from serve_moe.text import Tokenizer

_SECONDS = 60
_PROMPT = tiny_checkpoint.PROMPT.tolist()


@pytest.fixture(scope="module")
def tokenizer(one_layer: pathlib.Path) -> Tokenizer:
    return Tokenizer(one_layer)


@pytest.fixture(scope="module")
def run(one_layer: pathlib.Path) -> steps.Steps:
    """The programs, compiled, with 16 slots. One engine at a time may use them."""
    config = checkpoint.read_config(one_layer)
    mesh = jax.make_mesh((1, 2), steps.AXES, devices=jax.devices()[:2])
    params = checkpoint.load_params(one_layer, config, mesh, "float32")
    limits = steps.Limits(slots_per_device=8, max_length=60, buckets=(8,), end_tokens=(255,))
    run = steps.Steps(params, mesh, config, limits)
    run.compile()
    return run


@contextlib.contextmanager
def _serving(engine: Engine, tokenizer: Tokenizer, **limits) -> Iterator[int]:
    """Serves an engine in a thread, at a port of this machine."""
    api = Api(engine, tokenizer, model="tiny", vocab_size=256, limits=HttpLimits(**limits))
    server = Server(api, engine, host="127.0.0.1", port=0, drain_seconds=5)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # clients may connect from here on
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(_SECONDS)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def engine(run: steps.Steps) -> Iterator[Engine]:
    engine = Engine(run, Metrics(run.config.num_experts))
    engine.start()
    yield engine
    engine.drain()
    assert engine.join(_SECONDS)


@pytest.fixture(scope="module")
def port(engine: Engine, tokenizer: Tokenizer) -> Iterator[int]:
    """A server's."""
    with _serving(engine, tokenizer, max_body_bytes=5000) as port:
        yield port


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=_SECONDS
    ) as client:
        yield client


def _send(
    port: int, body: bytes | dict, path: str = "/v1/completions", method: str = "POST"
) -> tuple[int, bytes]:
    """A request by the standard library; returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body)
        response = connection.getresponse()
        return response.status, response.read()


def _metric(port: int, name: str) -> float:
    text = _send(port, b"", "/metrics", "GET")[1].decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _wait_for(condition) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_greedy_completion_is_what_the_engine_gives(client: openai.OpenAI, engine: Engine) -> None:
    prompt, tokens, ended = [3, 200, 65], [], threading.Event()
    how = Sampling(max_tokens=16)
    engine.submit(Sequence(prompt, how, tokens.append, on_end=lambda reason: ended.set()))
    assert ended.wait(_SECONDS)
    answer = client.completions.create(model="tiny", prompt=prompt, temperature=0)  # 16 tokens
    assert answer.choices[0].text == bytes(tokens).decode(errors="replace")
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_streams_are_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    """Of chats and completions; both end before a stop string."""
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "abc"}]}],
        "max_completion_tokens": 30,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 5,
    }
    whole = client.chat.completions.create(**chat)
    text = whole.choices[0].message.content
    *chunks, last = client.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert last.usage == whole.usage

    stop = text[10:12]
    assert len(text) > 12
    stopped = client.chat.completions.create(**chat, stop=stop).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.find(stop)], "stop")
    same = {name: chat[name] for name in ("model", "temperature", "top_p", "seed")}
    chunks = client.completions.create(
        **same, prompt="abc", max_tokens=30, stop=["unlikely", stop], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.find(stop)]


def test_many_clients_that_come_and_go(port: int, client: openai.OpenAI) -> None:
    """32 at once: those that stay get what they get alone; the others' slots are free again."""

    def request(i: int) -> dict:
        return {"model": "tiny", "prompt": "x" * (1 + i), "seed": i, "max_tokens": 20}

    alone = [client.completions.create(**request(i)).choices[0].text for i in (0, 9, 18, 27)]
    cancelled = _metric(port, 'serve_moe_requests_total{reason="cancelled"}')

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        await asyncio.sleep(0.005 * i)
        text = ""
        stream = await client.completions.create(**request(i), stream=True)
        async with stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                if i % 9:  # leaves in the middle
                    break
        return text

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=client.base_url, api_key="-", max_retries=0, timeout=_SECONDS
        ) as asynchronous:
            return await asyncio.gather(*(ask(asynchronous, i) for i in range(32)))

    texts = asyncio.run(ask_all())
    assert [texts[i] for i in (0, 9, 18, 27)] == alone
    _wait_for(lambda: _metric(port, "serve_moe_occupied_slots") == 0)
    assert _metric(port, 'serve_moe_requests_total{reason="cancelled"}') > cancelled + 8
    assert _metric(port, "serve_moe_dropped_rows_total") == 0


def test_load_test_measures_an_open_loop(port: int) -> None:
    """In short: every request is answered in full, and the numbers are of what was asked."""
    flags = "--checkpoint=- --rate=40 --seconds=1 --prompt-tokens=20 --max-tokens=10"
    requests = load_test.draw_requests(load_test.parse_args(flags.split()))
    assert 20 < len(requests) < 60
    asked = sum(body["max_tokens"] for _, body in requests)
    done, memory = asyncio.run(load_test.send_all(port, os.getpid(), requests))
    summary = load_test.summarise(done, memory)
    assert (summary["failed"], summary["errors"]) == (0, [])
    assert asked * 0.7 < summary["tokens"] <= asked  # some met the end token
    assert all(done.arrived <= done.times[0] for done in done)
    assert summary["time_to_first_token_ms"]["p50"] > 0


def test_clients_that_do_not_read_or_are_killed_hold_nobody_up(port: int) -> None:
    """More of them than there are slots."""
    lost = []
    for i in range(20):
        raw = socket.create_connection(("127.0.0.1", port), _SECONDS)
        body = json.dumps({"prompt": "ab", "max_tokens": 40, "stream": bool(i % 2)}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.sendall(head.encode() + body)
        lost.append(raw)
    for raw in lost[::3]:  # a reset, as of a process that was killed
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raw.close()
    status, body = _send(port, {"prompt": "ab", "max_tokens": 3})
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] == 3
    _wait_for(lambda: _metric(port, "serve_moe_occupied_slots") == 0)
    for raw in lost:
        raw.close()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"{" * 4000, 400, "not JSON"),
        (b"[" * 4000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b'{"prompt": "\\ud800"}', 400, "not Unicode"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"prompt": [256]}, 400, "from 0 to 255"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": "a" * 60}, 400, "60 tokens leave no room in 60"),
        ({"prompt": "a", "max_tokens": 60}, 400, "more than 60"),
        ({"prompt": "a", "max_tokens": 10**30}, 400, "more than 60"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "n": 2}, 400, "n is not supported"),
        ({"prompt": "a", "tools": [1]}, 400, "tools is not supported"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": "a" * 5000}, 413, "more than 5000 bytes"),
    ],
    ids=str,
)
def test_malformed_requests_are_refused(
    port: int, body: bytes | dict, status: int, message: str
) -> None:
    got, answer = _send(port, body)
    assert got == status
    assert message in json.loads(answer)["error"]["message"]


def test_other_routes_are_refused(port: int) -> None:
    for path, method, status in (("/v2", "GET", 404), ("/v1/completions", "GET", 405)):
        got, answer = _send(port, b"", path, method)
        assert (got, set(json.loads(answer))) == (status, {"error"})
    assert b"<form" in _send(port, b"", "/", "GET")[1]


def test_fuzzed_requests_never_break_the_server(port: int) -> None:
    """Fields of other types and values, and cut or changed bytes."""
    draw = random.Random(0)
    odd = [None, True, -1, 0, 1, 3, 1e300, "", "a", [], [1], ["a"], {}, {"a": 1}, [[1]], [{}]]
    names = "prompt messages max_tokens temperature top_p seed stop stream stream_options n user"
    for i in range(100):
        body = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        del body["messages" if i % 2 else "prompt"]
        body |= {name: draw.choice(odd) for name in draw.sample(names.split(), i % 4)}
        data = bytearray(json.dumps(body).encode())
        if i % 5 == 0:
            data[draw.randrange(len(data))] = draw.randrange(256)
        path = "/v1/completions" if i % 2 else "/v1/chat/completions"
        status, answer = _send(port, bytes(data), path)
        assert status in (200, 400), (data, answer)
    assert _send(port, b"", "/health", "GET") == (200, b'{"status":"ok"}')


def test_failure_of_a_device_is_an_error_everywhere(run: steps.Steps, tokenizer: Tokenizer) -> None:
    """Of streams that have begun, of requests that wait, and of /health."""
    failing = threading.Event()

    def check() -> None:
        if failing.is_set():
            raise RuntimeError("device 3 waited for device 5")

    engine = Engine(run, Metrics(run.config.num_experts), check=check)
    engine.start()
    with (
        _serving(engine, tokenizer) as port,
        openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=_SECONDS
        ) as client,
    ):
        request = {"model": "tiny", "prompt": "a", "max_tokens": 50}
        stream = client.completions.create(**request, stream=True)
        next(stream)
        failing.set()
        with pytest.raises(openai.APIError, match="device 3 waited for device 5"):
            list(stream)
        assert engine.join(_SECONDS)
        with pytest.raises(openai.InternalServerError, match="device 3"):
            client.completions.create(**request)
        status, answer = _send(port, b"", "/health", "GET")
        assert (status, json.loads(answer)["status"]) == (503, "failed")


def test_requests_have_a_time_limit(run: steps.Steps, tokenizer: Tokenizer) -> None:
    engine = Engine(run, Metrics(run.config.num_experts))
    engine.start()
    with _serving(engine, tokenizer, request_seconds=0.0) as port:
        for is_stream in (False, True):
            status, answer = _send(port, {"prompt": "a", "stream": is_stream})
            assert (status, json.loads(answer)["error"]["message"]) == (504, "not done in 0.0 s")
    engine.drain()
    assert engine.join(_SECONDS)
