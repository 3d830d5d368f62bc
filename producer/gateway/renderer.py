"""What a job's chunks look like to whoever reads them as server-sent events: what every form of them has. Pure.

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


class Told(NamedTuple):
    """How far one job's stream has been told. `end`: what the job's own end is, where it has one."""

    job_id: str
    cursor: str
    end: StreamEnd | None


class Renderer(ABC):
    """Renders one job's stream."""

    @property
    def reset_remedy(self) -> str:
        """For readers that know of no reset: what they do where the answer has begun anew."""
        return "ask again"

    def render_start(self) -> bytes:
        """What is sent before the job has begun. Nothing: a job that fails at once is told of by the status."""
        return b""

    def goes_on(self, generation: int) -> bool:
        """Whether what follows, of that `Subscription.generation`, goes on from what whoever reads has seen: asked of
        each chunk, and of the end. Those who have seen the beginning on another connection may have seen another."""
        return True

    @abstractmethod
    def render(self, chunk: Chunk, cursor: str) -> list[bytes]:
        """The events of a chunk; none, if it shows nothing yet."""

    def render_reset(self, cursor: str) -> bytes:
        """What was shown before is void: for readers that know of it."""
        raise NotImplementedError

    @abstractmethod
    def render_end(self, usage: Usage) -> bytes:
        """What follows the last chunk of all of a request's jobs."""

    def render_error(self, error: ApiError, told: Sequence[Told]) -> bytes:
        """The last event of a stream without a whole answer, which OpenAI's clients raise: without it a stream that is
        cut short would look complete to them."""
        cursors = [{"job_id": job.job_id, "cursor": job.cursor} for job in told]
        return encode_event({**error.body, "promptmill": cursors[0] if len(cursors) == 1 else cursors})

    def rest_path(self, told: Told) -> str:
        """Where what has not been told is to be had, of any gateway."""
        return f"/v1/jobs/{told.job_id}/stream?after={told.cursor}"


def encode_event(body: dict[str, Any]) -> bytes:
    """One event, of any content."""
    return f"data: {to_json(body)}\n\n".encode()


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
