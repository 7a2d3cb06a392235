"""The program as a user runs it, and a client made by others."""

import asyncio
import contextlib
import http.client
import json
import os
import pathlib
import random
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator

import browser
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_process import SECONDS, ServerProcess

_FLAGS = [
    "--slots=8",
    "--chunk=8",
    "--max-length=250",
    "--max-body-bytes=5000",
    "--model-name=tiny",
]


@pytest.fixture(scope="module", autouse=True)
def imports() -> None:
    """What takes seconds, which only the worker that runs these tests should."""
    global openai, load_test
    import openai
    from serve_moe import load_test


@pytest.fixture(scope="module")
def server(one_layer: pathlib.Path) -> Iterator[ServerProcess]:
    """One process with 2 devices and 16 slots."""
    process = ServerProcess(one_layer, 2, *_FLAGS)
    yield process
    process.close()


@pytest.fixture(scope="module")
def port(server: ServerProcess) -> int:
    return server.port()


def _client(port: int) -> "openai.OpenAI":
    url = f"http://127.0.0.1:{port}/v1"
    return openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=SECONDS)


@pytest.fixture
def client(port: int) -> Iterator["openai.OpenAI"]:
    with _client(port) as client:
        yield client


def _send(
    port: int, body: bytes | dict, path: str = "/v1/completions", method: str = "POST"
) -> tuple[int, bytes]:
    """A request by the standard library; returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body)
        response = connection.getresponse()
        return response.status, response.read()


# What page.html shows, once nothing runs.
_WHEN_IDLE = """
const $ = name => document.querySelector("#" + name);
const idle = () => $("go").disabled || done([$("out").textContent, $("error").textContent]);
new MutationObserver(idle).observe($("go"), {attributes: true});
"""


def _metric(port: int, name: str) -> float:
    text = _send(port, b"", "/metrics", "GET")[1].decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _wait_for(condition) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_greedy_completion_is_the_same_again(client: "openai.OpenAI") -> None:
    asked = {"model": "tiny", "prompt": [3, 200, 65], "temperature": 0}
    first, second = (client.completions.create(**asked, seed=seed) for seed in (1, 2))
    assert first.choices[0].text == second.choices[0].text
    assert first.choices[0].finish_reason == "length"
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (3, 16)
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_streams_are_the_whole_answer_in_pieces(port: int, client: "openai.OpenAI") -> None:
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
    ended = 'serve_moe_requests_total{reason="stop"}'
    before = _metric(port, ended)
    stopped = client.chat.completions.create(**chat, stop=stop).choices[0]
    _wait_for(lambda: _metric(port, ended) == before + 1)
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.find(stop)], "stop")
    same = {name: chat[name] for name in ("model", "temperature", "top_p", "seed")}
    chunks = client.completions.create(
        **same, prompt="abc", max_tokens=30, stop=["unlikely", stop], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == text[: text.find(stop)]


def test_metrics_count_what_was_done(port: int, client: "openai.OpenAI") -> None:
    """In Prometheus's text format, as its own parser reads it."""

    def read() -> dict[str, float]:
        text = _send(port, b"", "/metrics", "GET")[1].decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        sums = dict.fromkeys((sample.name for sample in samples), 0.0)
        for sample in samples:
            sums[sample.name] += sample.value
        return sums

    before, prompt, num_tokens = read(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 7
    client.completions.create(model="tiny", prompt=prompt, max_tokens=num_tokens)
    # What a step has given is passed on first, then counted.
    last = "serve_moe_inter_token_seconds_count"
    _wait_for(lambda: read()[last] == before[last] + num_tokens - 1)
    _wait_for(lambda: read()["serve_moe_occupied_slots"] == 0)
    after = read()
    change = {name: after[name] - before.get(name, 0) for name in after}
    assert change["serve_moe_tokens_total"] == num_tokens
    assert change["serve_moe_requests_total"] == 1
    assert change["serve_moe_steps_total"] == 2 + num_tokens - 1  # chunks of 8, then a token each
    of_token = 3  # experts, in the only layer
    assert change["serve_moe_expert_rows_total"] == of_token * (len(prompt) + num_tokens - 1)
    assert change["serve_moe_time_to_first_token_seconds_count"] == 1
    assert change["serve_moe_dropped_rows_total"] == 0
    assert after["serve_moe_queue"] == 0


def test_many_clients_that_come_and_go(port: int, client: "openai.OpenAI") -> None:
    """32 at once: those that stay get what they get alone; the others' slots are free again."""

    def request(i: int) -> dict:
        return {"model": "tiny", "prompt": "x" * (1 + i), "seed": i, "max_tokens": 20}

    alone = [client.completions.create(**request(i)).choices[0].text for i in (0, 9, 18, 27)]
    cancelled = _metric(port, 'serve_moe_requests_total{reason="cancelled"}')

    async def ask(client: "openai.AsyncOpenAI", i: int) -> str:
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
            base_url=client.base_url, api_key="-", max_retries=0, timeout=SECONDS
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
    assert summary["tokens"] == asked
    assert all(done.arrived <= done.times[0] for done in done)
    assert summary["time_to_first_token_ms"]["p50"] > 0


def test_clients_that_do_not_read_or_are_killed_hold_nobody_up(port: int) -> None:
    """More of them than there are slots."""
    lost = []
    for i in range(20):
        raw = socket.create_connection(("127.0.0.1", port), SECONDS)
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
        ({"prompt": "a" * 250}, 400, "250 tokens leave no room in 250"),
        ({"prompt": "a", "max_tokens": 250}, 400, "more than 250"),
        ({"prompt": "a", "max_tokens": 10**30}, 400, "more than 250"),
        ({"prompt": "a", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "stop": ["a"] * 5}, 400, "stop"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "n": 2}, 400, "n is not supported"),
        ({"prompt": "a", "logprobs": 0}, 400, "logprobs is not supported"),
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


@pytest.mark.skipif(browser.CHROMEDRIVER is None, reason="no chromedriver here")
def test_page_in_a_browser(port: int, client: "openai.OpenAI") -> None:
    """It shows what a client gets, stops when it is told to, and says what was wrong."""
    prompt = "x = [1, 2]\ndef "
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    with browser.browsing() as page:
        page.open(f"http://127.0.0.1:{port}/")
        for name in ("prompt", "max_tokens", "temperature"):
            page.type_into(f"#{name}", str(asked[name]))
        whole = page.run(_WHEN_IDLE + "document.querySelector('#go').click();")
        assert whole == [text, ""]

        cancelled = _metric(port, 'serve_moe_requests_total{reason="cancelled"}')
        page.type_into("#max_tokens", "230")
        begin, _ = page.run(
            "new MutationObserver((_, observer) => {"
            "  observer.disconnect(); document.querySelector('#stop').click();"
            "}).observe(document.querySelector('#out'), {childList: true, characterData: true});"
            + _WHEN_IDLE
            + "document.querySelector('#go').click();"
        )
        assert len(begin) < 230
        _wait_for(lambda: _metric(port, 'serve_moe_requests_total{reason="cancelled"}') > cancelled)

        page.type_into("#max_tokens", "9999")
        page.click("#go")
        none, error = page.run(_WHEN_IDLE + "idle();")
        assert none == ""
        assert "more than 250" in error


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


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_two_processes_give_the_same_bits_and_one_that_dies_is_an_error(
    one_layer: pathlib.Path, client: "openai.OpenAI"
) -> None:
    """In the middle of a stream, and from then on; process 0 then ends with exit code 1."""
    flags = f"--distributed --coordinator=127.0.0.1:{_free_port()} --num-processes=2".split()
    asked = {"model": "tiny", "prompt": "a" * 20, "max_tokens": 60, "seed": 3}
    with contextlib.ExitStack() as stack:
        processes = []
        for i in range(2):
            processes.append(ServerProcess(one_layer, 1, *_FLAGS, *flags, process_id=i))
            stack.callback(processes[-1].close)
        together = stack.enter_context(_client(processes[0].port()))
        text = client.completions.create(**asked).choices[0].text
        assert together.completions.create(**asked).choices[0].text == text

        stream = together.completions.create(**asked | {"max_tokens": 220}, stream=True)
        next(stream)
        processes[1].signal(signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError):
            together.completions.create(**asked)
        assert processes[0].wait() == 1


def test_sigterm_finishes_what_runs(
    server: ServerProcess, port: int, client: "openai.OpenAI"
) -> None:
    """The last test of this server: new requests are refused, the stream comes to its end."""
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 240, "seed": 3}
    text = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True)
    chunks = [next(stream)]
    server.signal(signal.SIGTERM)
    server.wait_for("SIGTERM")
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        client.completions.create(**asked)
    assert _send(port, b"", "/health", "GET")[0] == 503
    chunks += stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert server.wait() == 0
