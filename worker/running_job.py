"""A job between its claim and its commit. Knows its output and its times; knows neither Redis nor RQ's methods."""

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Literal

from engine.outputs import ErrorKind, RequestOutput
from producer.contract import Choice, Done, ErrorCode, ErrorInfo, FinishReason, JobOutcome, Result, Timings, Usage
from worker.claim import Claim
from worker.outlet.job_stream import JobStream
from worker.translate import TranslatedJob

StopCause = Literal["cancelled", "stopped", "failed"]


class Stage(Enum):
    """How far a job has come. It only ever moves down this list."""

    ADMITTED = 1  # leased, perhaps generating
    ENDED = 2  # no more output will come
    STORING = 3  # its outcome is decided; the full result is on its way to the store
    SEALED = 4  # the done entry is buffered or stored
    COMMITTING = 5


_ERROR_CODES: dict[ErrorKind, ErrorCode] = {
    "refused": ErrorCode.ENGINE_ERROR,
    "poison": ErrorCode.POISON,
    "died": ErrorCode.ENGINE_ERROR,
    "stopped": ErrorCode.ENGINE_ERROR,
}
_CHOICE_ENDS: dict[JobOutcome, FinishReason] = {"cancelled": "cancelled", "stopped": "cancelled", "failed": "error"}


@dataclass(slots=True, eq=False, kw_only=True)
class RunningJob:
    claim: Claim
    rq_job: Any
    """RQ's Job, for the bridge."""
    stream: JobStream
    model: str
    translated: TranslatedJob | None = None
    """None: it was refused, or its output is complete already."""
    stored_choices: list[Choice] | None = None
    """Output of an earlier attempt that this one only commits."""
    stage: Stage = Stage.ADMITTED
    stop_cause: StopCause | None = None
    error: ErrorInfo | None = None
    status: JobOutcome | None = None
    is_retried: bool = False
    """It failed and goes back to the queue by RQ's Retry: it has no outcome yet."""
    has_dependents: bool = False
    """Other jobs wait for it: the commit is RQ's own."""
    result: Result | None = None
    """As Redis keeps it."""
    has_called_back: bool = False
    timeout_seconds: float | None = None  # of engine time
    submitted_at: float | None = None  # monotonic seconds
    first_token_at: float | None = None  # epoch seconds
    ended_at: float | None = None  # epoch seconds
    stored_usage: Usage | None = field(default=None)

    @property
    def job_id(self) -> str:
        return self.claim.job_id

    @property
    def request_id(self) -> str:
        """The engine's name for this attempt: a later attempt here must not meet this one's last outputs."""
        return f"{self.claim.job_id}:{self.claim.attempt}"

    def is_overdue(self, now: float) -> bool:
        """Whether the engine has had the job for longer than RQ's timeout. `now`: monotonic seconds."""
        if self.timeout_seconds is None or self.submitted_at is None:
            return False
        return now - self.submitted_at > self.timeout_seconds

    @property
    def num_sequences(self) -> int:
        return self.translated.params.n if self.translated else 1

    def take(self, output: RequestOutput) -> bool:
        """Buffer what the engine gave. True if it was the last output, and the job has ended."""
        if self.first_token_at is None and output.token_ids:
            self.first_token_at = time.time()
        if output.finish_reason == "cancelled" and self.stop_cause == "failed":
            output = replace(output, finish_reason="error")  # the engine was only told to stop
        self.stream.add(output)
        if output.error_kind is not None:
            self.error = ErrorInfo(
                code=_ERROR_CODES[output.error_kind], message=output.error or "the engine failed", retryable=True
            )
        if output.finished:
            self.end()
        return output.finished

    def end(self) -> None:
        self.stage = Stage.ENDED
        self.ended_at = time.time()

    def decide(self, status: JobOutcome) -> None:
        """The outcome; choices that were cut off get their end."""
        self.status = status
        self.stream.end_choices(_CHOICE_ENDS.get(status, "error"))

    def build_result(self) -> Result:
        assert self.status is not None
        return Result(
            job_id=self.job_id,
            model=self.model,
            status=self.status,
            choices=self.stream.choices() if self.stored_choices is None else self.stored_choices,
            usage=self.usage,
            timings=self._timings(),
            attempts=self.claim.attempt,
            metadata=self.translated.request.metadata if self.translated else {},
            error=self.error,
        )

    def build_done(self) -> Done:
        assert self.status is not None
        return Done(job_id=self.job_id, done=True, status=self.status, usage=self.usage, error=self.error)

    @property
    def usage(self) -> Usage:
        return self.stored_usage or self.stream.usage

    def _timings(self) -> Timings:
        enqueued_at = _epoch(self.claim.fields.get(b"enqueued_at") or self.claim.fields.get(b"created_at"))
        if enqueued_at is None:
            return Timings()
        return Timings(
            queued=_elapsed(enqueued_at, self.claim.claimed_at),
            first_token=_elapsed(enqueued_at, self.first_token_at),
            total=_elapsed(enqueued_at, self.ended_at),
        )


def _elapsed(start: float, end: float | None) -> float | None:
    """Never negative: the two ends are read from two machines' clocks."""
    return None if end is None else round(max(0.0, end - start), 6)


def _epoch(text: bytes | None) -> float | None:
    """RQ's timestamps, with or without fractions of a second."""
    try:
        return datetime.fromisoformat(text.decode().rstrip("Z")).replace(tzinfo=UTC).timestamp() if text else None
    except ValueError:
        return None
