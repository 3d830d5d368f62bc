"""A response that is a stream of server-sent events: one job's, or several jobs' side by side.

Owns when it begins (with the first event, so that an early failure still has an HTTP status; or after a second), what
keeps it alive, and its three early ends: the client goes away, the time runs out, the process stops. Knows nothing of
what is in the events.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from producer.contract import ErrorCode, Usage
from producer.end_tasks import end_tasks
from producer.errors import PromptmillError
from producer.gateway.answer import cancel_jobs, stopping, wait_until_gone
from producer.gateway.context import GatewayContext
from producer.gateway.errors import ApiError, from_client_error, to_response, unexpected_error
from producer.gateway.job_stream import JobStream
from producer.gateway.renderer import KEEP_ALIVE
from producer.job import AsyncJob
from producer.openai.response import add_usage

START_SECONDS = 1.0
LAST_EVENT_SECONDS = 1.0  # for the event that says why the stream ends: a client may have stopped reading
MEDIA_TYPE = "text/event-stream; charset=utf-8"

OnUsage = Callable[[Usage], Awaitable[None]]

_log = logging.getLogger(__name__)


class EventStream(Response):
    """`cancels`: the jobs to cancel if the stream ends early; none if they are to go on."""

    def __init__(
        self,
        streams: Sequence[JobStream],
        context: GatewayContext,
        *,
        cancels: Sequence[AsyncJob] = (),
        headers: Mapping[str, str] = MappingProxyType({}),
        on_usage: OnUsage | None = None,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = MEDIA_TYPE
        self._streams = streams
        self._drain = context.drain
        self._open_streams = context.metrics.open_streams
        self._cancels = cancels
        self._timeout_seconds = context.settings.request_timeout_seconds
        self._keep_alive_seconds = context.settings.keep_alive_seconds
        self._on_usage = on_usage
        self._has_started = False
        self._sent_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        with self._open_streams.track_inprogress():
            await self._stream()

    async def _stream(self) -> None:
        writer = asyncio.create_task(self._write())
        gone = asyncio.create_task(wait_until_gone(self._receive))
        drained = asyncio.create_task(self._drain.over.wait())
        keeper = asyncio.create_task(self._keep_alive())
        try:
            ends: set[asyncio.Task[Any]] = {writer, gone, drained}
            await asyncio.wait(ends, timeout=self._timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
            await end_tasks(keeper)
            if writer.done():
                if (error := writer.exception()) is not None:
                    await self._tell_usage()
                    await cancel_jobs(self._cancels)  # of several jobs the others; one that has ended stays as it is
                    await self._fail(_as_api_error(error))
            elif gone.done():
                await cancel_jobs(self._cancels)
            else:
                await end_tasks(writer)
                await self._fail(await self._end_early(has_drained=drained.done()))
        finally:
            await end_tasks(writer, gone, drained, keeper)

    async def _write(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for stream in self._streams:
                tasks.create_task(stream.copy_to(self._send_event))
        usage = await self._tell_usage()
        await self._send_event(self._streams[0].renderer.render_end(usage))
        await self._finish()

    async def _tell_usage(self) -> Usage:
        """Report the usage of all jobs together; nothing if the end of one was not seen."""
        usages = [usage for stream in self._streams if (usage := stream.usage) is not None]
        usage = add_usage(usages)
        if self._on_usage is not None and len(usages) == len(self._streams):
            await self._on_usage(usage)
        return usage

    async def _keep_alive(self) -> None:
        """Send a comment whenever nothing was sent for an interval. A task of its own: sending blocks while a client
        does not read."""
        interval = START_SECONDS
        while True:
            await asyncio.sleep(max(0.0, self._sent_at + interval - time.monotonic()))
            if time.monotonic() >= self._sent_at + interval:
                await self._send_event(KEEP_ALIVE)
            interval = self._keep_alive_seconds

    async def _end_early(self, *, has_drained: bool) -> ApiError:
        paths = [stream.renderer.rest_path(stream.progress) for stream in self._streams]
        if has_drained:
            return stopping(paths)
        await cancel_jobs(self._cancels)
        fate = "its job was cancelled" if self._cancels else f"it goes on: GET {', '.join(paths)}"
        message = f"no complete answer within {self._timeout_seconds:g} s; {fate}"
        return ApiError(HTTPStatus.REQUEST_TIMEOUT, ErrorCode.TIMEOUT, message, should_retry=False)

    async def _fail(self, error: ApiError) -> None:
        """Send the error: as a response of its own if nothing has been sent, else as the stream's last event."""
        if not self._has_started:
            ours = {name: value for name, value in self.headers.items() if name.startswith("x-promptmill")}
            await to_response(error.with_headers(**ours))(self._scope, self._receive, self._send)
            return
        progress = [stream.progress for stream in self._streams]
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_EVENT_SECONDS):
                await self._send_event(self._streams[0].renderer.render_error(error, progress))
                await self._finish()

    async def _send_event(self, event: bytes) -> None:
        if not self._has_started:
            self._has_started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._sent_at = time.monotonic()
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def _finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _as_api_error(error: BaseException) -> ApiError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptmillError):
        return from_client_error(error)
    _log.error("action=stream_failed error=%s", type(error).__name__)
    return unexpected_error()
