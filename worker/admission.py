"""Turns claims into requests of the engine. Knows which jobs may run together; knows nothing about their outputs.

A job is given to the engine once Redis has its marker: from then on a crash of this worker is counted against it.

A job during which two workers have crashed, each time without a new token, is a suspect. It runs alone: it is admitted
only when every other job here has put out a token, and no other job is admitted until it has put out one itself, so
that a further crash is counted against it only.

A long request is tokenised on another thread, so that running jobs' tokens do not wait for it; the jobs after it do
wait, to keep the order of the claims.

If Redis fails for one job only (for example because a proxy refuses a large stored stream), that job is postponed while
the others go on; after several tries it ends with the reason.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ContextLengthError, EngineDiedError, EngineNotRunningError, InvalidRequestError
from engine.outputs import RequestOutput
from producer.contract import ErrorCode, ErrorInfo
from producer.contract.keys import split_tenant
from worker.claim import Claim
from worker.finishing import Finisher
from worker.held_jobs import HeldJobs
from worker.job_parts import JobParts
from worker.limits import Limits
from worker.redis_client import REDIS_AWAY
from worker.running_job import RunningJob, Stage

MAX_ADMISSION_SECONDS = 0.005  # per turn, so that tokenising does not delay the streams
UNREAD_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)  # between tries of a job that cannot be read although Redis answers

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Reading:
    """The reading of a long request, on another thread."""

    claim: Claim
    job: Future[RunningJob] = field(default_factory=Future)


class Admission:
    """Used from the loop's thread. `on_output` is called on the engine's thread; `wake` wakes the loop."""

    def __init__(
        self,
        parts: JobParts,
        finisher: Finisher,
        held: HeldJobs,
        limits: Limits,
        *,
        on_output: Callable[[RunningJob, RequestOutput], None],
        wake: Callable[[], None],
    ) -> None:
        self._client = parts.client
        self._clock = parts.clock
        self._engine = parts.engine
        self._intake = parts.intake
        self._outlet = parts.outlet
        self._finisher = finisher
        self._held = held
        self._limits = limits
        self._on_output = on_output
        self._wake = wake
        self._reading: _Reading | None = None
        self._opened: list[RunningJob] = []  # their markers are not stored yet
        self._lone: RunningJob | None = None  # a suspect that has put out no token yet
        self._postponed: list[tuple[float, Claim]] = []  # with the time of the next try, in monotonic seconds
        self._num_unread: dict[str, int] = {}  # failed tries, by fence

    @property
    def has_work(self) -> bool:
        claim = self._held.next_waiting()
        return claim is not None and self._may_begin(claim) and not self._is_being_read(claim)

    def admit_some(self) -> None:
        """Admit waiting claims, oldest first, for a few milliseconds. Raises Redis's errors."""
        now = time.monotonic()
        self._recall_postponed(now)
        while (claim := self._held.next_waiting()) and self._may_begin(claim):
            self._read_beside_if_long(claim)
            if self._is_being_read(claim):
                return
            if (job := self._admit(claim)) is not None:
                self._held.admit(job)
                self._begin(job)
            if time.monotonic() > now + MAX_ADMISSION_SECONDS:
                return

    def _recall_postponed(self, now: float) -> None:
        for at, claim in self._postponed:
            if not self._held.is_current(claim):
                self._num_unread.pop(claim.fence, None)
            elif at <= now:
                self._held.wait_again(claim)
        self._postponed = [(at, claim) for at, claim in self._postponed if at > now]

    def _admit(self, claim: Claim) -> RunningJob | None:
        """Admit one claim; None if it is postponed."""
        try:
            job = self._read(claim)
        except REDIS_AWAY as error:
            self._client.ping()  # raises if Redis fails for all jobs
            num_unread = self._num_unread.get(claim.fence, 0)
            _log.warning("action=job_unread job_id=%s num_tries=%d error=%s", claim.job_id, num_unread + 1, error)
            if num_unread < len(UNREAD_SECONDS):
                self._num_unread[claim.fence] = num_unread + 1
                self._held.postpone(claim)
                self._postponed.append((time.monotonic() + UNREAD_SECONDS[num_unread], claim))
                return None
            job = self._intake.give_up(claim, str(error))
        self._num_unread.pop(claim.fence, None)
        return job

    def _read(self, claim: Claim) -> RunningJob:
        reading = self._reading
        if reading is None or reading.claim is not claim:
            return self._intake.admit(claim)
        self._reading = None
        return reading.job.result()

    def _read_beside_if_long(self, claim: Claim) -> None:
        if (self._reading is not None and self._reading.claim is claim) or not self._intake.is_long(claim):
            return
        reading = self._reading = _Reading(claim)
        reading.job.add_done_callback(lambda _: self._wake())
        threading.Thread(target=self._read_beside, args=(reading,), name="reading", daemon=True).start()

    def _read_beside(self, reading: _Reading) -> None:
        try:
            reading.job.set_result(self._intake.admit(reading.claim))
        except Exception as error:  # from Redis; the loop decides what to do
            reading.job.set_exception(error)

    def _is_being_read(self, claim: Claim) -> bool:
        return self._reading is not None and self._reading.claim is claim and not self._reading.job.done()

    @property
    def has_opened(self) -> bool:
        """Whether jobs wait for a flush and `submit_marked`."""
        return bool(self._opened)

    def submit_marked(self) -> None:
        """Give the engine the jobs whose markers are stored. Raises EngineDiedError."""
        opened, self._opened = self._opened, []
        for job in opened:
            if job.stage is not Stage.ADMITTED:
                continue  # another attempt has the job
            if job.stream.is_marked:
                self._start(job)
            else:
                self._opened.append(job)

    def _may_begin(self, claim: Claim) -> bool:
        if self._lone is not None and (self._lone.has_stored_output or self._lone.stage is not Stage.ADMITTED):
            self._lone = None
        if self._lone is not None:
            return False
        return not claim.is_suspect or all(job.has_stored_output for job in self._held.generating())

    def _begin(self, job: RunningJob) -> None:
        if job.translated is None:
            self._finisher.add(job)
            return
        self._outlet.open(job.stream, self._intake.build_marker(job), fence=job.claim.fence)
        self._opened.append(job)
        if job.claim.is_suspect:
            self._lone = job

    def _start(self, job: RunningJob) -> None:
        job.stop_cause = job.stop_cause or job.passed_limit(time.monotonic(), self._clock.now())
        if job.stop_cause is not None:
            self._end(job)
            return
        try:
            self._submit(job)
        except InvalidRequestError as error:
            is_too_long = isinstance(error, ContextLengthError)
            code = ErrorCode.CONTEXT_LENGTH_EXCEEDED if is_too_long else ErrorCode.INVALID_REQUEST
            job.error = ErrorInfo(code=code, message=str(error), param=error.param)
            self._end(job)
        except EngineNotRunningError as error:
            raise EngineDiedError(str(error)) from error

    def _submit(self, job: RunningJob) -> None:
        assert job.translated is not None
        job.submitted_at = time.monotonic()
        request = job.translated.request
        _, tenant = split_tenant(job.claim.queue)
        placing: dict[str, Any] = {
            "priority": request.priority,
            "deadline": request.deadline,
            "cache_key": tenant or "",  # else cached_tokens would reveal other tenants' prompts
            "on_output": lambda output: self._on_output(job, output),
        }
        if job.translated.to_embed:
            self._engine.submit_embedding(
                job.request_id, job.translated.to_embed, dimensions=request.dimensions, **placing
            )
        else:
            self._engine.submit(
                job.request_id,
                job.translated.prompt_token_ids,
                job.translated.params,
                output_token_ids=job.stream.token_ids() if job.stream.is_resumed else (),
                **placing,
            )
        self._limits.add(job)

    def _end(self, job: RunningJob) -> None:
        job.end()
        self._finisher.add(job)
