"""One job's stream on its way to a client: read from a cursor on, rendered, handed on event by event."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from types import MappingProxyType

from producer.contract import Chunk, Usage
from producer.errors import JobFailedError
from producer.gateway.answer import cancelled_elsewhere
from producer.gateway.errors import ApiError, from_client_error, from_info
from producer.gateway.renderer import Renderer, StreamProgress
from producer.gateway.token_timer import TokenTimer
from producer.job import AsyncJob
from producer.subscription import StreamEnd

SendEvent = Callable[[bytes], Awaitable[None]]
BEGINNING = "0-0"


class JobStream:
    """`timer`: None if waits for tokens are not measured. `shows_resets`: the reader knows what a reset means.
    `finds_same_job`: see `from_info`."""

    def __init__(
        self,
        job: AsyncJob,
        renderer: Renderer,
        timer: TokenTimer | None,
        *,
        after: str | None = None,
        shows_resets: bool = False,
        callers_names: Mapping[str, str] = MappingProxyType({}),
        finds_same_job: bool = True,
    ) -> None:
        self._job = job
        self._timer = timer
        self._after = after
        self._shows_resets = shows_resets
        self._callers_names = callers_names
        self._finds_same_job = finds_same_job
        self._cursor = after or BEGINNING  # of the last entry handed on
        self._end: StreamEnd | None = None
        self.renderer = renderer

    @property
    def progress(self) -> StreamProgress:
        return StreamProgress(self._job.id, self._cursor, self._end)

    @property
    def usage(self) -> Usage | None:
        """From the stream's end; None if that was not seen."""
        return self._end.usage if self._end is not None else None

    async def copy_to(self, send: SendEvent) -> None:
        """Send the stream to its end. Raises ApiError or a PromptmillError if the job ends without an answer."""
        try:
            await self._copy_to(send)
        except JobFailedError as error:
            raise from_client_error(error, self._callers_names, finds_same_job=self._finds_same_job) from error

    async def _copy_to(self, send: SendEvent) -> None:
        if start := self.renderer.render_start():
            await send(start)
        async with aclosing(self._job.stream(after=self._after)) as chunks:
            try:
                async for chunk in chunks:
                    goes_on = not chunk.reset and self.renderer.goes_on(chunks.generation)
                    await self._hand_on(chunk, chunks.last_id, send, goes_on=goes_on)
            finally:
                if chunks.end is not None and not self.renderer.goes_on(chunks.end.generation):
                    self._render_reset(chunks.last_id)
                self._end = chunks.end
        assert self._end is not None, "a stream that does not raise has an end"
        if self._end.status != "finished":
            raise from_info(cancelled_elsewhere(self._job.id))

    async def _hand_on(self, chunk: Chunk, cursor: str, send: SendEvent, *, goes_on: bool) -> None:
        if not goes_on:
            await send(self._render_reset(cursor))
        events = self.renderer.render(chunk, cursor)
        if self._timer is not None and chunk.token_ids:
            self._timer.take(len(chunk.token_ids))
        if events:
            await send(b"".join(events))
            self._cursor = cursor

    def _render_reset(self, cursor: str) -> bytes:
        if self._shows_resets:
            return self.renderer.render_reset(cursor)
        reason = "the answer had to begin anew, on a worker of another kind: what was streamed is void"
        message = f"{reason}; {self.renderer.reset_remedy}"
        raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "stream_reset", message, should_retry=False)
