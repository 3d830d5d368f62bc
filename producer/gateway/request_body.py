"""A request's body as it comes in: never larger than its limit, never silent for long, and read to its end where it
was refused half-way.

A connection that is closed while its client still sends takes the response with it: the client sees a reset, not why.
"""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

from starlette.types import Message, Receive, Scope, Send

from producer.gateway.errors import ApiError

SILENCE_SECONDS = 30.0  # between two parts of a body: what has come of it is held in memory meanwhile
LINGER_SECONDS = 10.0  # how long what is still sent after a refusal is read, and dropped


@dataclass(frozen=True, slots=True)
class BodyLimit:
    max_bytes: int
    flag: str  # the setting that it comes from


class RequestBody:
    def __init__(self, scope: Scope, receive: Receive, limit: BodyLimit) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        self._length = int(length) if length.isdigit() else 0
        self._receive = receive
        self._limit = limit
        self._num_bytes = 0
        self._is_complete = self._length == 0 and b"transfer-encoding" not in headers
        self._closes = False

    async def receive(self) -> Message:
        """Raises ApiError to whoever reads the body: 413 as soon as it is known to be too large, a chunked one on its
        way; 408 where no more of it comes."""
        if self._length > self._limit.max_bytes:
            raise _too_large(self._limit)
        if self._is_complete:
            return await self._next()  # that the client goes away
        try:
            async with asyncio.timeout(SILENCE_SECONDS):
                message = await self._next()
        except TimeoutError as error:
            raise _too_slow() from error
        if self._num_bytes > self._limit.max_bytes:
            raise _too_large(self._limit)
        return message

    async def send_response(self, message: Message, send: Send) -> None:
        """A part of the response. The last one is followed by the rest of the body, where the connection closes."""
        if message["type"] == "http.response.start":
            self._closes = (b"connection", b"close") in message["headers"]
        elif not message.get("more_body", False) and self._closes and not self._is_complete:
            await send({**message, "more_body": True})
            await self._drop_rest()
            message = {"type": "http.response.body", "body": b""}
        await send(message)

    async def _drop_rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while not self._is_complete:
                    await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message


def _too_large(limit: BodyLimit) -> ApiError:
    message = f"the body is larger than {limit.max_bytes} bytes; send less, or raise {limit.flag}"
    return ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "request_too_large", message, headers={"connection": "close"})


def _too_slow() -> ApiError:
    message = f"the body was silent for {SILENCE_SECONDS:g} s; nothing was done; send it again without a pause"
    return ApiError(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message, headers={"connection": "close"})
