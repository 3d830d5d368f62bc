"""One gateway process: uvicorn around the application, from its start to the end of its last response."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import httpx2
import uvicorn

from producer.errors import FileStoreError, RedisRefusedError, RedisUnavailableError, SettingsError
from producer.gateway.app import create_app
from producer.gateway.context import GatewayContext
from producer.gateway.drain import Drain
from producer.gateway.http_protocol import LimitedHttpProtocol
from producer.gateway.settings import GatewaySettings, is_loopback
from producer.listener import listen
from producer.operations import send
from producer.server_version import is_too_old

BACKLOG = 2048
EXIT_GRACE_SECONDS = 5.0  # after the drain: for responses to be flushed

_log = logging.getLogger(__name__)


class GatewayServer(uvicorn.Server):
    """uvicorn's server; its shutdown begins the drain."""

    def __init__(self, config: uvicorn.Config, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port = listener.getsockname()[:2]
                _log.info("action=serving url=%s", httpx2.URL(scheme=_scheme(self.config), host=host, port=port))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._drain.begin()
        _log.info("action=draining")
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends the drain; uvicorn's own answer to it would cut the streams off."""
        if self.should_exit:
            asyncio.get_running_loop().call_soon_threadsafe(self._drain.begin)
        self.should_exit = True


def _scheme(config: uvicorn.Config) -> str:
    return "https" if config.is_ssl else "http"


def run_gateway(settings: GatewaySettings) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then drain. For the main thread.

    Raises SettingsError, PortTakenError or RedisRefusedError before it serves; a Redis that is not there yet is waited
    for.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(settings))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed; it has no Windows."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(settings: GatewaySettings) -> None:
    with _listener(settings) as listener:
        context = GatewayContext.build(settings)
        try:
            await _check_redis(context)
        except BaseException:
            await context.aclose()  # uvloop waits for connections that are still open when it is closed
            raise
        server = build_server(settings, context)
        hangup = getattr(signal, "SIGHUP", None)  # the terminal's end, which Windows does not tell of
        if hangup is not None and signal.getsignal(hangup) is signal.SIG_DFL:  # `nohup` keeps it away
            signal.signal(hangup, server.handle_exit)
        await server.serve([listener])


async def _check_redis(context: GatewayContext) -> None:
    """Raises RedisRefusedError, SettingsError."""
    try:
        [server] = await context.redis.run(send(("INFO", "server")))
        if (problem := is_too_old(server)) is not None:
            raise RedisRefusedError(problem)
        await context.files.claim_store()
    except RedisRefusedError:
        raise  # waiting does not help: whoever starts the gateway is told
    except RedisUnavailableError as error:  # once it is there, it is asked before each upload
        _log.warning("action=redis_unavailable error=%s", error)
    except FileStoreError as error:
        raise SettingsError(str(error)) from error


def _listener(settings: GatewaySettings) -> socket.socket:
    """It listens before anything else is done: the port is ours, or somebody is told at once that it is not."""
    if settings.http_fd is not None:
        return _inherited(settings, settings.http_fd)
    return listen(settings.http_host, settings.http_port)


def _inherited(settings: GatewaySettings, fd: int) -> socket.socket:
    """Raises SettingsError, also for one that others can reach where --http-host says that nobody can."""
    try:
        listener = socket.socket(fileno=fd)
    except OSError as error:
        raise SettingsError(f"--http-fd {fd}: {error.strerror}; pass a socket on to the gateway, bound") from error
    if listener.family not in (socket.AF_INET, socket.AF_INET6):
        listener.close()
        raise SettingsError(f"--http-fd {fd}: is not a TCP socket; pass the gateway a bound one")
    host = listener.getsockname()[0]
    if settings.is_loopback and not is_loopback(host):
        listener.close()
        raise SettingsError(f"--http-fd {fd}: is bound to {host}; say so with --http-host, for keys to be asked for")
    return listener


def build_server(settings: GatewaySettings, context: GatewayContext) -> GatewayServer:
    """A server that listens once it is served."""
    config = uvicorn.Config(
        create_app(context),
        http=LimitedHttpProtocol,
        host=settings.http_host,
        port=settings.http_port,
        ssl_certfile=settings.tls_certfile,
        ssl_keyfile=settings.tls_keyfile,
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(settings.http_drain_seconds + EXIT_GRACE_SECONDS),
        lifespan="on",
    )
    return GatewayServer(config, context.drain)
