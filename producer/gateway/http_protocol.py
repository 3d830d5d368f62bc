"""uvicorn's HTTP protocol, with limits on the head of a request: its size, and the time it takes.

uvicorn reads a head of any length, for any time, before it is known who sends it. Knows nothing of bodies
(`producer.gateway.request_body`).
"""

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from producer.gateway.errors import ApiError

MAX_HEAD_BYTES = 64 << 10  # of the request's line and its headers
HEAD_SECONDS = 30.0


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _head_timer: asyncio.TimerHandle | None = None  # runs while a head, or its first byte, is awaited
    _num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head(num_bytes=0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is not None:  # else the data may be the end of a body
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._num_head_bytes > MAX_HEAD_BYTES:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            self._refuse(status, f"the request's headers are larger than {MAX_HEAD_BYTES} bytes; send less")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:  # the next request of a connection
            self._await_head(num_bytes=1)

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def _await_head(self, *, num_bytes: int) -> None:
        self._num_head_bytes = num_bytes
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _end_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        if self._num_head_bytes:
            message = f"the request's headers did not come within {HEAD_SECONDS:g} s; send them at once"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, message)
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._end_head()
        body = json.dumps(ApiError(status, status.name.lower(), message).body).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
