"""What surrounds every request: its id, the limit of its body, its line in the log and its place in the metrics.

The limit itself is `request_body`'s.

Plain ASGI around the whole application, so that it sees what the client sees. Logs no header, no query and no body; of
an exception it logs where it came from, not its words, which may quote a prompt.
"""

import logging
import re
import time
import traceback
from collections.abc import Callable, Mapping
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from producer.gateway.errors import CLIENT_CLOSED_REQUEST, to_response, unexpected_error
from producer.gateway.request_body import BodyLimit, RequestBody

REQUEST_ID_HEADER = b"x-request-id"
_CLIENTS_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.-]{1,64}")

# method, route, status, seconds
Observe = Callable[[str, str, int, float], None]

_log = logging.getLogger(__name__)


class RequestContext:
    def __init__(self, app: ASGIApp, *, limit: BodyLimit, limits: Mapping[str, BodyLimit], observe: Observe) -> None:
        """`limits`: by path, where another than `limit` holds."""
        self._app = app
        self._limit = limit
        self._limits = limits
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        status = CLIENT_CLOSED_REQUEST
        has_started = False
        body = RequestBody(scope, receive, self._limits.get(scope["path"], self._limit))

        async def send_with_id(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                headers = [*message.get("headers", []), (REQUEST_ID_HEADER, request_id)]
                message = {**message, "headers": headers}
            await body.send_response(message, send)

        try:
            await self._app(scope, body.receive, send_with_id)
        except Exception as error:
            _log_fault(request_id.decode(), error)
            if not has_started:
                await to_response(unexpected_error())(scope, receive, send_with_id)
        finally:
            self._finish(scope, status, time.perf_counter() - started, request_id.decode())

    def _finish(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "unknown")  # the pattern: a path may name a job or a model
        self._observe(scope["method"], route, status, seconds)
        _log.info(
            "action=request method=%s route=%s status=%d seconds=%.3f request_id=%s key=%s",
            scope["method"],
            route,
            status,
            seconds,
            request_id,
            scope["state"].get("key_id") or "-",
        )


def _request_id(scope: Scope) -> bytes:
    """The client's own, if it is one that may stand in a log; else a new one."""
    given = next((value for name, value in scope["headers"] if name == REQUEST_ID_HEADER), b"")
    return given if _CLIENTS_REQUEST_ID.fullmatch(given) else b"req_" + uuid4().hex.encode()


def _log_fault(request_id: str, error: Exception) -> None:
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("action=request_failed request_id=%s error=%s at\n%s", request_id, type(error).__name__, where)
