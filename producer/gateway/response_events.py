"""One job's chunks as the events of OpenAI's Responses API, numbered without a gap. Pure: no connection, no clock.

The events follow from the job's stored entries alone, so that every gateway numbers them alike, and a client can go on
behind the last number that it has seen. If a job starts over, its numbers start at another million: an old number names
no new event.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from producer.contract import Chunk, Usage
from producer.gateway.errors import ApiError
from producer.gateway.renderer import KEEP_ALIVE, Renderer, StreamProgress, to_json
from producer.openai.responses.body import ResponseFrame, error_of, status_of
from producer.openai.responses.output import Event, ResponseOutput
from producer.openai.responses.request import RESPONSES_URL

NUMBERS_A_GENERATION = 1_000_000

_LAST_EVENTS = {"completed": "response.completed", "failed": "response.failed"}  # of the others: incomplete


class ResponseRenderer(Renderer):
    """`starting_after`: the number of the last event that the client has seen. `starts_at_once`: events are sent before
    the job has begun, so that an early failure has no HTTP status of its own."""

    def __init__(
        self, frame: ResponseFrame, *, starting_after: int | None = None, starts_at_once: bool = False
    ) -> None:
        self._frame = frame
        self._output = ResponseOutput(frame.job_id)
        self._starts_at_once = starts_at_once
        self._first_number = 0 if starting_after is None else starting_after + 1  # that is sent
        self._next_number = 0
        self._generation: int | None = None  # not known before the first chunk
        self._is_announced = False
        self._is_running = False

    @property
    def reset_remedy(self) -> str:
        return "read it from the beginning" if self._starts_at_once else "ask again"

    def goes_on(self, generation: int) -> bool:
        if self._generation is None:
            self._generation = generation
            self._next_number += generation * NUMBERS_A_GENERATION
        num_announced = 3 if self._frame.asked.background else 2  # created, queued, in progress: they tell nothing yet
        has_seen_more = self._first_number > num_announced
        is_of_another = has_seen_more and (self._first_number - 1) // NUMBERS_A_GENERATION != generation
        return generation == self._generation and not is_of_another

    def render_start(self) -> bytes:
        return self._encode(self._announce()) or KEEP_ALIVE if self._starts_at_once else b""

    def render(self, chunk: Chunk, cursor: str) -> list[bytes]:
        events = self._encode(chain(self._begin(), self._output.take(chunk)))
        return [events] if events else []

    def render_end(self, usage: Usage) -> bytes:
        closing = self._encode(chain(self._begin(), self._output.end()))
        return closing + self._last_event(status_of("finished", self._output), usage)

    def render_error(self, error: ApiError, progress: Sequence[StreamProgress]) -> bytes:
        """The job's own end is the response's; any other leaves it as it is, and takes no number of its own."""
        end = progress[0].end
        if end is None:
            begun = self._encode(self._announce())  # and no more: the error may say behind which event to read on
            number = max(0, self._next_number - 1)
            body = {**error.body, **error.body["error"], "type": "error", "sequence_number": number}
            return begun + _encode_event(body)
        closing = self._encode(chain(self._begin(), self._output.end()))
        status = status_of(end.status, self._output)
        failure = error_of(error.status, str(error), error.param) if status == "failed" else None
        return closing + self._last_event(status, end.usage, failure)

    def rest_path(self, progress: StreamProgress) -> str:
        if not self._frame.asked.store:
            return f"/v1/jobs/{progress.job_id}"
        last = f"&starting_after={self._next_number - 1}" if self._next_number else ""
        return f"{RESPONSES_URL}/{self._frame.response_id}?stream=true{last}"

    def _announce(self) -> Iterator[Event]:
        if self._is_announced:
            return
        self._is_announced = True
        is_queued = self._frame.asked.background
        body = self._frame.body("queued" if is_queued else "in_progress")
        yield {"type": "response.created", "response": body}
        if is_queued:
            yield {"type": "response.queued", "response": body}

    def _begin(self) -> Iterator[Event]:
        yield from self._announce()
        if not self._is_running:
            self._is_running = True
            yield {"type": "response.in_progress", "response": self._frame.body("in_progress")}

    def _last_event(self, status: str, usage: Usage, error: dict[str, object] | None = None) -> bytes:
        body = self._frame.body(status, output=self._output.items, usage=usage, error=error)
        return self._encode([{"type": _LAST_EVENTS.get(status, "response.incomplete"), "response": body}])

    def _encode(self, events: Iterable[Event]) -> bytes:
        encoded = []
        for event in events:
            if self._next_number >= self._first_number:
                encoded.append(_encode_event({**event, "sequence_number": self._next_number}))
            self._next_number += 1
        return b"".join(encoded)


def _encode_event(body: Event) -> bytes:
    return f"event: {body['type']}\ndata: {to_json(body)}\n\n".encode()
