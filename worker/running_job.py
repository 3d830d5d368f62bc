"""A job between its claim and its commit: its output and its times. Knows nothing about Redis."""

import time
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

from engine.outputs import ErrorKind, RequestOutput
from producer.contract import Done, ErrorCode, ErrorInfo, FinishReason, JobOutcome, Result, Timings
from producer.rq_names import parse_time
from worker.claim import Claim
from worker.job_vectors import JobVectors
from worker.outlet.job_stream import JobStream
from worker.parsing.output_parser import OutputParser
from worker.parsing.parsed_text import ParsedText
from worker.translate import TranslatedJob

StopCause = Literal["cancelled", "stopped", "deadline", "failed"]
"""Why the engine was told to stop a job: a cancel, RQ's stop-job, its deadline, RQ's timeout."""


class Stage(Enum):
    """The stage of a job. It only moves down this list."""

    ADMITTED = 1  # leased, perhaps generating
    ENDED = 2  # no more output will come
    STORING = 3  # its outcome is decided; the full result is being uploaded
    SEALED = 4  # the done entry is buffered or stored
    COMMITTING = 5


_ERROR_CODES: dict[ErrorKind, ErrorCode] = {
    "refused": ErrorCode.ENGINE_ERROR,
    "grammar": ErrorCode.INVALID_REQUEST,
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
    vectors: JobVectors | None = None
    """What it comes to, if it is there for embeddings."""
    resets: bool = False
    """What earlier attempts have shown is void: this one starts over."""
    metadata: dict[str, Any] = field(default_factory=dict)
    stage: Stage = Stage.ADMITTED
    stop_cause: StopCause | None = None
    error: ErrorInfo | None = None
    status: JobOutcome | None = None
    is_contested: bool = False
    """RQ, or jobs that wait for it, have something to say of its end."""
    is_retried: bool = False
    """It failed and goes back to the queue by RQ's Retry: it has no outcome yet."""
    result: Result | None = None
    """As Redis keeps it."""
    stored: Result | None = None
    """What `result` was when the result store had its whole."""
    has_called_back: bool = False
    timeout_seconds: float | None = None  # of engine time
    submitted_at: float | None = None  # monotonic seconds
    object_attempt: int | None = None
    """The attempt whose result it is, if an earlier one decided it: its object in the result store has that name."""
    first_token_at: float | None = None  # epoch seconds
    ended_at: float | None = None  # epoch seconds
    _parsers: dict[int, OutputParser] = field(default_factory=dict)  # by choice

    @property
    def job_id(self) -> str:
        return self.claim.job_id

    @property
    def request_id(self) -> str:
        """The engine's id of this attempt. From the fence, not the attempt's number, which may come twice when Redis
        has lost writes: the engine would refuse the second one while it still ends the first."""
        return f"{self.claim.job_id}:{self.claim.fence}"

    @property
    def has_stored_output(self) -> bool:
        """Whether Redis holds any output of this attempt."""
        return self.stream.has_stored_output

    @property
    def deadline(self) -> float | None:
        """Epoch seconds."""
        return self.translated.request.deadline if self.translated else None

    @property
    def times_out_at(self) -> float | None:
        """Monotonic seconds."""
        if self.timeout_seconds is None or self.submitted_at is None:
            return None
        return self.submitted_at + self.timeout_seconds

    def passed_limit(self, now: float, epoch_now: float) -> StopCause | None:
        """Which limit of the job has passed: its deadline, or RQ's timeout, which counts this attempt's time in the
        engine.

        `now`: monotonic seconds.
        """
        if self.deadline is not None and epoch_now >= self.deadline:
            return "deadline"
        return "failed" if self.times_out_at is not None and now >= self.times_out_at else None

    @property
    def num_sequences(self) -> int:
        """How many sequences the engine has yet to end."""
        if self.translated is None:
            return 1
        return self.translated.params.n if self.vectors is None else self.vectors.num_missing

    def take(self, output: RequestOutput) -> bool:
        """Buffer an output of the engine. True if it was the last one, and the job has ended."""
        if self.vectors is not None:
            self.vectors.take(output)
            self.stream.num_cached_tokens += output.num_cached_tokens
        else:
            self._take_tokens(output)
        if output.error_kind is not None:
            is_grammar, request = output.error_kind == "grammar", self.translated and self.translated.request
            self.error = ErrorInfo(
                code=_ERROR_CODES[output.error_kind],
                message=output.error or "the engine failed",
                param=(request.output_format_field or "tools") if is_grammar and request else None,
                retryable=not is_grammar,
            )
        if output.finished:
            self.end()
        return output.finished

    def _take_tokens(self, output: RequestOutput) -> None:
        if self.first_token_at is None and output.token_ids and not output.is_replay:
            self.first_token_at = time.time()
        parsed = self._parse(output)
        if output.finish_reason == "cancelled" and self.stop_cause in ("deadline", "failed"):
            parsed = parsed or ParsedText(output.text)
            parsed = replace(parsed, finish_reason=None)  # the engine was only told to stop; the outcome has the reason
        self.stream.add(output, parsed)

    def _parse(self, output: RequestOutput) -> ParsedText | None:
        """Parse the output's text; None if all of it is content."""
        plan = self.translated.output_plan if self.translated else None
        if plan is None:
            return None
        if output.index not in self._parsers:
            self._parsers[output.index] = plan.build_parser(self.job_id, output.index)
        return self._parsers[output.index].read(output.text, output.finish_reason, token_ids=output.token_ids)

    def end(self) -> None:
        self.stage = Stage.ENDED
        self.ended_at = time.time()

    def decide(self, status: JobOutcome, *, cut_off: FinishReason | None = None) -> None:
        """Set the outcome; unfinished choices get the finish reason `cut_off`."""
        self.status = status
        self.stream.end_choices(cut_off or _CHOICE_ENDS.get(status, "error"))

    def reopen(self) -> None:
        """Undo the outcome, which is then decided again."""
        self.status = self.result = None
        self.is_contested = True

    def note_stored(self) -> None:
        """Note that the result is stored. Whether the outcome still holds is checked again afterwards."""
        self.stored, self.status, self.result = self.result, None, None

    def build_result(self) -> Result:
        assert self.status is not None
        return Result(
            job_id=self.job_id,
            model=self.model,
            status=self.status,
            prompt=self.stream.prompt,
            choices=self.stream.choices(),
            embeddings=self.vectors.encoded if self.vectors is not None and self.status == "finished" else None,
            usage=self.stream.usage,
            timings=self._timings(),
            attempts=self.claim.attempt,
            metadata=self.metadata,
            error=self.error,
        )

    def fail_commit(self, error: ErrorInfo) -> None:
        """Turn the outcome, which cannot be written, into a failure with as much of the output as can be written."""
        self.status, self.error, self.is_retried = "failed", error, False
        result = (self.result or self.build_result()).model_copy(update={"status": "failed", "error": error})
        try:
            result.to_wire()
        except ValueError:  # pydantic's
            result = result.without_output()
        self.result = result

    def build_done(self) -> Done:
        assert self.status is not None
        return Done(job_id=self.job_id, done=True, status=self.status, usage=self.stream.usage, error=self.error)

    def _timings(self) -> Timings:
        enqueued_at = parse_time(self.claim.fields.get(b"enqueued_at") or self.claim.fields.get(b"created_at"))
        if enqueued_at is None:
            return Timings()
        return Timings(
            queued=_elapsed(enqueued_at, self.claim.claimed_at),
            first_token=_elapsed(enqueued_at, self.first_token_at),
            total=_elapsed(enqueued_at, self.ended_at),
        )


def _elapsed(start: float, end: float | None) -> float | None:
    """Seconds between the two, never negative: they may come from two machines' clocks."""
    return None if end is None else round(max(0.0, end - start), 6)
