"""`promptmill serve`: a Redis of its own, a worker and a gateway as processes, started and ended from here."""

import fcntl
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click
from pydantic import Field

from producer.contract.keys import DEFAULT_QUEUE
from producer.errors import PortTakenError, SettingsError
from producer.listener import listen
from producer.settings import redact_url
from worker import gateway_process, worker_process
from worker.embedded_redis import EmbeddedRedis, free_port
from worker.errors import EmbeddedRedisError, StartRefusedError
from worker.held_signals import ending_signals
from worker.kept_process import KeptProcess
from worker.redis_client import check_server, connect
from worker.settings import WorkerSettings

DEFAULT_PORT = 6379  # where clients look when they are told nothing
POLL_SECONDS = 0.1
LOCK_SECONDS = 5.0  # what a killed `serve` has left is gone by then
EXIT_KILLED = 1  # one of ours was ended by a signal that was not ours, and again at once


class ServeSettings(WorkerSettings):
    """The worker's settings, the embedded Redis's, and where the gateway listens."""

    redis_url: str = Field(
        default="",
        validate_default=False,
        description="A Redis to use, as `promptmill worker` takes it; default: one of its own.",
    )
    redis_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of the embedded Redis; default: 6379, or a free one."
    )
    http_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port of the gateway; default: 8000, or a free one."
    )
    http_host: str = Field(default="127.0.0.1", description="Address of the gateway; any but loopback needs API keys.")
    data_dir: Path | None = Field(
        default=None,
        description="Folder that keeps the embedded Redis's data; default: the data is deleted at the end.",
    )

    @property
    def is_redis_given(self) -> bool:
        """Whether a flag or the environment names a Redis to use instead of the embedded one."""
        return "redis_url" in self.model_fields_set


def serve(settings: ServeSettings) -> int:
    """The exit code of whatever ended first; 0 if a signal ended it. Raises WorkerError where Redis cannot start, or
    ends before the others."""
    with ExitStack() as stack:
        url, kept, files, server = settings.redis_url, "", None, None
        if settings.is_redis_given:
            _check_given_redis(settings)
        else:
            server = stack.enter_context(_embedded_redis(settings))
            url, files = server.url, server.data_dir / "files"
            kept = f"  (embedded; {_fate_of_data(settings.data_dir)})"
        listener = stack.enter_context(_listen(settings)) if gateway_process.is_installed() else None
        click.echo(_greeting(settings, url, kept, _address(listener) if listener is not None else None))
        environment = worker_process.environment_for(settings, url)
        lifelines = [] if server is None else [server.lifeline]
        parts = [KeptProcess("worker", worker_process.COMMAND, environment, lifelines)]
        if listener is not None:
            fd = listener.fileno()
            gateway_environment = gateway_process.environment_for(environment, fd, files=files)
            parts.append(KeptProcess("gateway", gateway_process.COMMAND, gateway_environment, [*lifelines, fd]))
        for part in parts:
            part.start(stack)
        return _wait(parts, server, stack)


def _wait(parts: list[KeptProcess], server: EmbeddedRedis | None, stack: ExitStack) -> int:
    """Until one of them ends by itself, and then the others; signals are passed on, and how soon they end is their own
    affair. Raises EmbeddedRedisError if the server ends: they would wait for it for ever."""
    num_signals = 0

    def pass_on(signum: int, frame: object) -> None:
        nonlocal num_signals
        num_signals += 1
        end_all()

    def end_all() -> None:
        for part in parts:
            part.process.terminate()

    for signum in ending_signals():
        signal.signal(signum, pass_on)
    while True:
        if server is not None:
            server.check_alive()
        ended = [part for part in parts if part.process.poll() is not None]
        if ended and (num_signals or not all(part.can_restart for part in ended)):
            break
        for part in ended:
            click.echo(f"the {part.name} was killed (signal {-part.process.wait()}); it is started again", err=True)
            part.start(stack)
        if num_signals and ended:  # it came while one was being started
            end_all()
        time.sleep(POLL_SECONDS)
    if not num_signals:
        end_all()
    codes = [ended[0].process.wait(), *(part.process.wait() for part in parts)]
    if num_signals:  # one that had not even begun ends by the signal
        codes = [0 if code == -signal.SIGTERM else code for code in codes]
        return next((code if code > 0 else EXIT_KILLED for code in codes if code), 0)
    return codes[0] if codes[0] >= 0 else EXIT_KILLED


def _check_given_redis(settings: ServeSettings) -> None:
    """Before anything is started. Raises SettingsError, or StartRefusedError."""
    for name in ("redis_port", "data_dir"):
        if getattr(settings, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise SettingsError(
                f"{flag} is for a Redis of its own, and --redis-url (PROMPTMILL_REDIS_URL) names another"
            )
    with connect(settings.redis_url) as client:
        check_server(client, settings.redis_url)


@contextmanager
def _embedded_redis(settings: ServeSettings) -> Iterator[EmbeddedRedis]:
    with ExitStack() as stack:
        # The server holds the lock as well: when we are killed it is there for as long as somebody still writes to it.
        locks = [stack.enter_context(_locked(settings.data_dir))] if settings.data_dir is not None else []
        port = _choose_port(settings.redis_port)
        try:
            server = stack.enter_context(EmbeddedRedis(data_dir=settings.data_dir, port=port, pass_fds=locks))
        except EmbeddedRedisError:
            if settings.redis_port is not None or _is_free(port):
                raise
            # Somebody has taken the port since we looked, another `serve` maybe.
            server = stack.enter_context(EmbeddedRedis(data_dir=settings.data_dir, pass_fds=locks))
        yield server


def _listen(settings: ServeSettings) -> socket.socket:
    """For the gateway, which inherits it: clients wait while one that was killed is started again. Raises
    PortTakenError, SettingsError."""
    if settings.http_port is not None:
        return listen(settings.http_host, settings.http_port)
    with suppress(PortTakenError):
        return listen(settings.http_host, gateway_process.DEFAULT_PORT)
    return listen(settings.http_host, 0)


def _address(listener: socket.socket) -> str:
    """Of a URL that reaches it from this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _choose_port(given: int | None) -> int:
    if given is None:
        return DEFAULT_PORT if _is_free(DEFAULT_PORT) else free_port()
    if not _is_free(given):
        raise StartRefusedError(f"port {given} is taken: stop what listens there, or pass another --redis-port")
    return given


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Two servers that append to one file would ruin it. Yields the lock's descriptor."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "promptmill.lock").open("w")
    except OSError as error:
        raise StartRefusedError(f"--data-dir {folder} cannot be used: {error}") from error
    with lock:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise StartRefusedError(f"--data-dir {folder} is in use by another promptmill serve") from error
                time.sleep(POLL_SECONDS)
        yield lock.fileno()


def _fate_of_data(data_dir: Path | None) -> str:
    return "its data is gone when this ends: keep it with --data-dir" if data_dir is None else f"data in {data_dir}"


def _greeting(settings: WorkerSettings, url: str, kept: str, gateway_address: str | None) -> str:
    gateway = f"http://{gateway_address}/v1" if gateway_address is not None else f"none: {gateway_process.REMEDY}"
    return "\n".join(
        [
            f"redis    {redact_url(url)}{kept}",
            f"worker   {', '.join(settings.served_model_names)} from {', '.join(settings.queue_names)}",
            f"try      {_submit_command(settings, url)}",
            f"openai   {gateway}",
            *([f"console  http://{gateway_address}/"] if gateway_address is not None else []),
            "stop     Ctrl-C",
        ]
    )


def _submit_command(settings: WorkerSettings, url: str) -> str:
    words = ["promptmill", "submit", "What is the capital of France?", "--max-tokens", "20", "--stream"]
    if url != f"redis://127.0.0.1:{DEFAULT_PORT}/0":
        words += ["--redis-url", redact_url(url)]
    if DEFAULT_QUEUE not in settings.queue_names:
        words += ["--queue", settings.queue_names[0]]
    return shlex.join(words).replace("'", '"')
