"""A server of S3's protocol (moto) that fails as stores do: refusals before and behind the work, slow answers, cuts."""

import os
import random
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Self

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from tests.fakes.redis_proxy import CuttingProxy

BUCKET = "results"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
MAX_SLOWNESS_SECONDS = 1.0


class _Quiet(MotoRequestHandler):
    def log(self, *args: Any) -> None:
        """Nothing: thousands of requests."""


_ERROR = '<?xml version="1.0"?><Error><Code>{code}</Code><Message>try again</Message></Error>'


class FlakyS3:
    """`probability` is that of a failing answer; `proxy`, which everybody comes through, has one of its own, of cuts.

    While `is_down` every request is refused, while `is_unreadable` every one that reads; while `go_on` is not set none
    is answered. What `refused` holds, as `/BUCKET/KEY`, nobody may read.
    """

    def __init__(self, *, seed: int) -> None:
        self.probability = 0.0
        self.is_down = self.is_unreadable = False
        self.refused: set[str] = set()
        self.go_on = threading.Event()
        self.go_on.set()
        self.num_failures = 0
        self._random = random.Random(seed)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._server.daemon_threads = True  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, name="flaky-s3", daemon=True)
        self.proxy = CuttingProxy(self._server.server_port, seed=seed, anywhere=True)
        self._stack = ExitStack()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.proxy.port}"

    def __enter__(self) -> Self:
        saved = {name: os.environ.get(name) for name in ENVIRONMENT}
        self._stack.callback(_restore, saved)
        os.environ.update(ENVIRONMENT)
        self._thread.start()
        self._stack.callback(self._thread.join)
        self._stack.callback(self._server.shutdown)
        self._stack.enter_context(self.proxy)
        self.objects.create()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.heal()
        self._stack.close()
        self._server.server_close()

    @property
    def objects(self) -> Any:
        """The bucket, as boto3 shows it."""
        return boto3.resource("s3", endpoint_url=self.endpoint).Bucket(BUCKET)

    def heal(self) -> None:
        self.probability = self.proxy.probability = 0.0
        self.is_down = self.is_unreadable = False
        self.refused.clear()
        self.go_on.set()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT" and not environ.get("CONTENT_LENGTH"):
            # Cut off within its headers, which is how they end for the server; it would store an object of no bytes.
            return _refuse(start_response, "411 Length Required", "MissingContentLength")
        self.go_on.wait()
        is_read = environ["REQUEST_METHOD"] == "GET"
        if is_read and environ["PATH_INFO"] in self.refused:
            return _refuse(start_response, "403 Forbidden", "AccessDenied")
        fault = self._random.choice(("500", "503", "500 behind", "slow")) if self._fails() else None
        if self.is_down or (is_read and self.is_unreadable) or fault == "503":
            return _refuse(start_response, "503 Slow Down", "SlowDown")
        if fault == "500":
            return _refuse(start_response, "500 Internal Server Error", "InternalError")
        if fault == "slow":
            time.sleep(self._random.uniform(0.0, MAX_SLOWNESS_SECONDS))
        if fault == "500 behind":  # it has done what it was asked for
            b"".join(self._app(environ, lambda *args: None))
            return _refuse(start_response, "500 Internal Server Error", "InternalError")
        reply: Iterable[bytes] = self._app(environ, start_response)
        return reply

    def _fails(self) -> bool:
        fails = self._random.random() < self.probability
        self.num_failures += fails
        return fails


def _refuse(start_response: Any, status: str, code: str) -> Iterable[bytes]:
    """The connection goes with it: what it has sent besides is not read."""
    start_response(status, [("Content-Type", "application/xml"), ("Connection", "close")])
    return [_ERROR.format(code=code).encode()]


def _restore(saved: dict[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
