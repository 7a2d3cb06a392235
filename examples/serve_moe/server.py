"""Runs the HTTP interface until a signal: then what runs is finished, and nothing new begins."""

import asyncio
import signal
import time
from types import FrameType

import uvicorn
from serve_moe.engine import Engine
from serve_moe.http_api import Api

_PATIENCE_SECONDS = 10.0  # with a client that asks for nothing, or does not take what is left
_FAILED_SECONDS = 5.0  # in which /health says why the server ends


class Server(uvicorn.Server):
    """Serves an Api. The first SIGTERM or SIGINT drains the engine, a second one ends at once.

    It ends by itself when the engine has failed.
    """

    def __init__(self, api: Api, engine: Engine, *, host: str, port: int, drain_seconds: float):
        config = uvicorn.Config(
            api.app,
            host=host,
            port=port,
            log_level="warning",
            ws="none",
            timeout_graceful_shutdown=drain_seconds,
        )
        super().__init__(config)
        self._engine, self._is_draining = engine, False
        self._failed_at: float | None = None
        self._idle_since: dict[asyncio.Protocol, float] = {}

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for a signal."""
        if self._is_draining:  # what runs is left: the event loop may not be there to end it
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self._is_draining = True
        print(f"{signal.Signals(sig).name}: finishing what runs", flush=True)
        self._engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called several times a second; says whether to end."""
        if self._is_draining and self._engine.join(timeout=0):
            self.should_exit = True
        if self._engine.failure is not None:
            self._failed_at = self._failed_at or time.monotonic()
            if time.monotonic() - self._failed_at > _FAILED_SECONDS:
                self.should_exit = True
        self._cut_off()
        return await super().on_tick(counter)

    def _cut_off(self) -> None:
        """Ends connections that uvicorn would keep for as long as their clients do."""
        now = time.monotonic()
        self._idle_since = {
            connection: self._idle_since.get(connection, now)
            for connection in self.server_state.connections
            if connection.cycle is None
            or connection.cycle.response_complete
            or connection.transport.is_closing()
        }
        for connection, since in self._idle_since.items():
            if now - since > _PATIENCE_SECONDS:
                connection.transport.abort()

    async def startup(self, sockets: list | None = None) -> None:
        """Called once; says where to find the server when it can be found."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"listening on http://{host}:{port}", flush=True)
