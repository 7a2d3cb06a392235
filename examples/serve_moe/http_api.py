"""The HTTP interface: OpenAI's completions, health, metrics and a page to try it."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from serve_moe.engine import Engine, QueueFullError, Sampling, Sequence, StoppedError
from serve_moe.protocol import Answer, Asked, RequestError, parse
from serve_moe.text import Pieces, TextError, Tokenizer
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

_T = TypeVar("_T")
_NOBODY_READS_IT = 499  # the status of an answer whose client has gone
_LAST_READ_SECONDS = 5.0  # for the client to read the end of a stream whose time is over
_PAGE = pathlib.Path(__file__).with_name("page.html")


@dataclasses.dataclass(frozen=True)
class HttpLimits:
    """What one client may ask for."""

    max_body_bytes: int = 1 << 20
    request_seconds: float = 600.0  # from arrival to the last token


class _Mailbox:
    """Carries tokens from the engine's thread to the event loop, those of a step at once.

    To wake the loop is a system call: one for each token would hold up the engine.
    """

    def __init__(self):
        self._letters: collections.deque[tuple[asyncio.Queue, int | str]] = collections.deque()

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue, value: int | str) -> None:
        """Called by the engine's thread."""
        self._letters.append((queue, value))
        if len(self._letters) == 1 and not loop.is_closed():
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._letters:  # a letter that comes behind the last look wakes the loop again
            queue, value = self._letters.popleft()
            queue.put_nowait(value)


class Api:
    """The routes, over one engine."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        model: str,
        vocab_size: int,
        limits: HttpLimits | None = None,
    ):
        self._engine, self._tokenizer, self._mailbox = engine, tokenizer, _Mailbox()
        self._model, self._vocab_size = model, vocab_size
        self._limits = limits or HttpLimits()
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
                Route("/v1/models", self._models),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            exception_handlers={
                RequestError: _refuse,
                HTTPException: _refuse_route,
                ClientDisconnect: _leave,
                Exception: _fail,
            },
        )

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(_PAGE.read_text())

    async def _health(self, request: Request) -> Response:
        ailment = self._engine.ailment
        if ailment is None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "reason": ailment}, status_code=503)

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        entry = {"id": self._model, "object": "model", "created": 0, "owned_by": "jax_ep"}
        return JSONResponse({"object": "list", "data": [entry]})

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        deadline = asyncio.get_running_loop().time() + self._limits.request_seconds
        try:
            async with asyncio.timeout_at(deadline):
                body = await self._read(request)
        except TimeoutError as error:
            raise self._too_late(408) from error
        asked = parse(body, is_chat=is_chat, model=self._model)
        prompt = await asyncio.to_thread(self._encode, asked)
        answer = Answer(asked, self._model, len(prompt))
        outputs = self._generate(asked, prompt, answer, deadline)
        if asked.is_stream:
            # The first piece decides between a stream and an error with a status.
            first = await _unless_gone(request, anext(outputs))
            if first is None:
                return Response(status_code=_NOBODY_READS_IT)
            return _Stream(_events(first, outputs, answer), deadline + _LAST_READ_SECONDS)
        whole = await _unless_gone(request, _collect(outputs, answer))
        return Response(status_code=_NOBODY_READS_IT) if whole is None else JSONResponse(whole)

    def _too_late(self, status: int) -> RequestError:
        return RequestError(f"not done in {self._limits.request_seconds} s", status=status)

    async def _read(self, request: Request) -> object:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > self._limits.max_body_bytes:
                most = self._limits.max_body_bytes
                raise RequestError(f"the body is more than {most} bytes", status=413)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error

    def _encode(self, asked: Asked) -> list[int]:
        try:
            if asked.is_chat:
                return self._tokenizer.encode_chat(asked.prompt)
            if isinstance(asked.prompt, str):
                return self._tokenizer.encode(asked.prompt)
        except TextError as error:
            param = "messages" if asked.is_chat else "prompt"
            raise RequestError(str(error), param=param) from error
        if not all(0 <= token < self._vocab_size for token in asked.prompt):
            raise RequestError(f"tokens are from 0 to {self._vocab_size - 1}", param="prompt")
        return asked.prompt

    async def _generate(
        self, asked: Asked, prompt: list[int], answer: Answer, deadline: float
    ) -> AsyncIterator[tuple[str, str | None]]:
        """Yields pieces of text, the last with a reason; whoever stops early cancels the rest."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()
        pass_on = functools.partial(self._mailbox.put, loop, arrived)  # in the engine's thread
        most = self._engine.limits.max_length
        room = most - len(prompt)
        if room < 1:
            raise RequestError(f"the prompt's {len(prompt)} tokens leave no room in {most}")
        sampling = Sampling(
            max_tokens=room if asked.max_tokens is None else asked.max_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
        )
        sequence = Sequence(prompt, sampling, on_token=pass_on, on_end=pass_on)
        pieces = Pieces(self._tokenizer, asked.stop)
        try:
            self._engine.submit(sequence)
        except ValueError as error:
            raise RequestError(str(error)) from error
        except QueueFullError as error:
            raise RequestError(str(error), status=429) from error
        except StoppedError as error:
            raise RequestError(str(error), status=503) from error
        late = loop.call_at(deadline, arrived.put_nowait, "late")
        try:
            while True:
                values = [await arrived.get()]
                # What has come meanwhile goes out with it: a loop that is behind catches up.
                while not arrived.empty():
                    values.append(arrived.get_nowait())
                text = ""
                for value in values:
                    if value == "late":
                        raise self._too_late(504)
                    if value == "error":
                        failure = self._engine.failure
                        raise RequestError(f"the engine has failed: {failure}", status=500)
                    if isinstance(value, str):
                        yield text + pieces.flush(), value
                        return
                    answer.num_tokens += 1
                    text += pieces.push(value)
                    if pieces.is_stopped:
                        self._engine.cancel(sequence, "stop")
                        yield text, "stop"
                        return
                yield text, None
        finally:
            late.cancel()
            self._engine.cancel(sequence)


async def _collect(outputs: AsyncIterator[tuple[str, str | None]], answer: Answer) -> dict:
    text, reason = "", None
    async with contextlib.aclosing(outputs):
        async for piece, reason in outputs:  # noqa: B007 - the last reason is meant
            text += piece
    return answer.whole(text, reason)


async def _events(
    first: tuple[str, str | None],
    outputs: AsyncIterator[tuple[str, str | None]],
    answer: Answer,
) -> AsyncIterator[str]:
    """Server-sent events of a stream; an error is one of them."""
    async with contextlib.aclosing(outputs):
        try:
            piece, reason = first
            yield _event(answer.piece(piece, reason))
            async for piece, reason in outputs:
                if piece or reason:
                    yield _event(answer.piece(piece, reason))
        except RequestError as error:
            yield _event(error.body())
            return
    if answer.asked.has_usage:
        yield _event(answer.usage_piece())
    yield "data: [DONE]\n\n"


def _event(value: dict) -> str:
    return f"data: {json.dumps(value)}\n\n"


class _Stream(StreamingResponse):
    """A stream of events, which a client that does not read cannot keep open."""

    def __init__(self, events: AsyncIterator[str], deadline: float):
        super().__init__(events, media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-cache"
        self._deadline = deadline

    async def __call__(self, scope, receive, send) -> None:
        async with contextlib.aclosing(self.body_iterator):
            with contextlib.suppress(TimeoutError):  # then the server closes the connection
                async with asyncio.timeout_at(self._deadline):
                    await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, awaited: Awaitable[_T]) -> _T | None:
    """Waits for something; None if the client leaves first, and what is waited for is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(awaited), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _fail(request: Request, error: Exception) -> Response:
    return await _refuse(request, RequestError("internal error, see the log", status=500))


async def _refuse(request: Request, error: RequestError) -> Response:
    return JSONResponse(error.body(), status_code=error.status)


async def _refuse_route(request: Request, error: HTTPException) -> Response:
    return await _refuse(request, RequestError(error.detail, status=error.status_code))


async def _leave(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=_NOBODY_READS_IT)  # it has gone before its request was whole
