"""Gateways on real sockets: uvicorn on a thread of the test's own process, with whatever settings a test wants."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import openai

from producer.gateway.context import GatewayContext
from producer.gateway.server import GatewayServer, build_server
from producer.gateway.settings import GatewaySettings
from tests.fakes.waiting import WAIT_SECONDS

StartGateway = Callable[..., "RunningGateway"]  # settings by name


class RunningGateway:
    """A gateway that answers at `url`."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._settings = settings
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gateway")
        self._server: GatewayServer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.context: GatewayContext | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "RunningGateway":
        self._thread.start()
        assert self._is_up.wait(WAIT_SECONDS)
        return self

    def begin_stop(self) -> None:
        """As SIGTERM does; the second one ends the drain."""
        assert self._server is not None and self._loop is not None
        self._loop.call_soon_threadsafe(self._server.handle_exit, 15, None)

    def stop(self) -> None:
        with suppress(RuntimeError):  # it has ended, and its loop is closed
            self.begin_stop()
            self.begin_stop()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self.context = GatewayContext.build(self._settings)
            self._server = build_server(self._settings, self.context)
            task = asyncio.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.005)
            self.port = self._server.servers[0].sockets[0].getsockname()[1]
            self._is_up.set()
            await task

        asyncio.run(serve(), debug=False)


@contextmanager
def running_gateway(redis_url: str, **settings: Any) -> Iterator[RunningGateway]:
    defaults = {"redis_url": redis_url, "http_port": 0, "http_drain_seconds": 0}
    gateway = RunningGateway(GatewaySettings(**{**defaults, **settings})).start()
    try:
        yield gateway
    finally:
        gateway.stop()


def open_client(gateway: RunningGateway, **options: Any) -> openai.OpenAI:
    """The official client; a request that fails is not repeated, unless a test says so."""
    defaults = {"api_key": "none", "max_retries": 0, "timeout": WAIT_SECONDS}
    return openai.OpenAI(base_url=f"{gateway.url}/v1", **{**defaults, **options})
