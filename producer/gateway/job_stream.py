"""One job's stream on its way to a client: read from a cursor on, rendered, handed on event by event."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from types import MappingProxyType
from typing import Protocol

from producer.contract import Chunk, Usage
from producer.errors import JobFailedError
from producer.gateway.answer import cancelled_elsewhere
from producer.gateway.errors import ApiError, from_client_error, from_info
from producer.gateway.token_timer import TokenTimer
from producer.job import AsyncJob

SendEvent = Callable[[bytes], Awaitable[None]]
BEGINNING = "0-0"


class Renderer(Protocol):
    """What a job's chunks look like to whoever reads. `render`: no event, if a chunk shows nothing yet."""

    def render(self, chunk: Chunk, cursor: str) -> list[bytes]: ...

    def render_reset(self, cursor: str) -> bytes: ...

    def render_usage(self, usage: Usage) -> bytes: ...


class JobStream:
    """`cursor` is that of the last entry handed on, `usage` what the stream's end says. `timer`: None, where nobody's
    wait is measured. `shows_resets`: whoever reads knows what a reset means. `finds_same_job`: as `from_info` has
    it."""

    def __init__(
        self,
        job: AsyncJob,
        renderer: Renderer,
        timer: TokenTimer | None,
        *,
        includes_usage: bool,
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
        self.includes_usage = includes_usage
        self.renderer = renderer
        self.cursor = after or BEGINNING
        self.usage = Usage()

    @property
    def job_id(self) -> str:
        return self._job.id

    async def copy_to(self, send: SendEvent) -> None:
        """To the stream's end. Raises ApiError or a PromptmillError where that is no answer's."""
        try:
            await self._copy_to(send)
        except JobFailedError as error:
            raise from_client_error(error, self._callers_names, finds_same_job=self._finds_same_job) from error

    async def _copy_to(self, send: SendEvent) -> None:
        async with aclosing(self._job.stream(after=self._after)) as chunks:
            try:
                async for chunk in chunks:
                    await self._hand_on(chunk, chunks.last_id, send)
            finally:
                self.usage = chunks.end.usage if chunks.end is not None else self.usage
        assert chunks.end is not None, "a stream that does not raise has an end"
        if chunks.end.status != "finished":
            raise from_info(cancelled_elsewhere(self._job.id))

    async def _hand_on(self, chunk: Chunk, cursor: str, send: SendEvent) -> None:
        if chunk.reset:
            await send(self._render_reset(cursor))
        events = self.renderer.render(chunk, cursor)
        if self._timer is not None and chunk.token_ids:
            self._timer.take(len(chunk.token_ids))
        if events:
            await send(b"".join(events))
            self.cursor = cursor

    def _render_reset(self, cursor: str) -> bytes:
        if self._shows_resets:
            return self.renderer.render_reset(cursor)
        message = "the answer had to begin anew, on a worker of another kind: what was streamed is void; ask again"
        raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "stream_reset", message, should_retry=False)
