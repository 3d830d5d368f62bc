"""Renders a job's chunks as server-sent events: what all forms have in common. Pure.

An event is `data: {json}` and an empty line. It never has an `id:` line, behind which OpenAI's client takes no comment.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from producer.contract import Chunk, Usage
from producer.gateway.errors import ApiError
from producer.subscription import StreamEnd

KEEP_ALIVE = b": keep-alive\n"  # one newline: two would be an event to some readers
DONE = b"data: [DONE]\n\n"


class StreamProgress(NamedTuple):
    """How much of one job's stream was sent. `end`: the job's own end, if it has come."""

    job_id: str
    cursor: str
    end: StreamEnd | None


class Renderer(ABC):
    """Renders one job's stream."""

    @property
    def reset_remedy(self) -> str:
        """What readers that know no resets can do when the answer has started over."""
        return "ask again"

    def render_start(self) -> bytes:
        """What is sent before the job has begun. Nothing by default, so that an early failure has an HTTP status."""
        return b""

    def goes_on(self, generation: int) -> bool:
        """Whether what follows, of this `Subscription.generation`, continues what the reader has seen: asked for each
        chunk, and for the end. On an earlier connection the reader may have seen another generation."""
        return True

    @abstractmethod
    def render(self, chunk: Chunk, cursor: str) -> list[bytes]:
        """The events of a chunk; none, if it shows nothing yet."""

    def render_reset(self, cursor: str) -> bytes:
        """Say that what was shown before is void, for readers that know resets."""
        raise NotImplementedError

    @abstractmethod
    def render_end(self, usage: Usage) -> bytes:
        """What follows the last chunk of all of a request's jobs."""

    def render_error(self, error: ApiError, progress: Sequence[StreamProgress]) -> bytes:
        """The last event of a stream without a whole answer, which OpenAI's clients raise: without it a stream that is
        cut short would look complete to them."""
        cursors = [{"job_id": job.job_id, "cursor": job.cursor} for job in progress]
        return encode_event({**error.body, "promptmill": cursors[0] if len(cursors) == 1 else cursors})

    def rest_path(self, progress: StreamProgress) -> str:
        """Where any gateway serves what was not sent."""
        return f"/v1/jobs/{progress.job_id}/stream?after={progress.cursor}"


def encode_event(body: dict[str, Any]) -> bytes:
    """One event, of any content."""
    return f"data: {to_json(body)}\n\n".encode()


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
