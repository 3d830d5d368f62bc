"""The worker's loop: claims jobs, feeds the engine, streams the engine's output, hands ended jobs to the finisher.

One thread runs the whole loop. Other threads (engine, heartbeat, control, commits) only post callables to it, so jobs
need no locks. While Redis is unavailable, only the steps that need it pause; the engine continues.
"""

import logging
import time
from functools import partial

from engine.errors import EngineDiedError, EngineNotRunningError
from engine.outputs import RequestOutput
from producer.contract import ErrorCode, ErrorInfo
from worker.admission import Admission
from worker.claim import Claim
from worker.claim_pace import ClaimPace
from worker.commit import Committer
from worker.errors import ReplayMismatchError
from worker.event_queue import EventQueue
from worker.finishing import Finisher
from worker.held_jobs import HeldJobs
from worker.job_parts import JobParts
from worker.limits import Limits
from worker.recovery import give_back
from worker.redis_client import REDIS_AWAY
from worker.running_job import RunningJob, Stage, StopCause
from worker.step_outputs import StepOutputs
from worker.token_rate import TokenRate

MAX_CLAIM = 64  # jobs in one script run
MAX_WAIT_SECONDS = 0.5  # the heartbeat renews leases only while the loop turns
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 1.0
COMMITS_END_SECONDS = 0.3  # how long a hand-over waits for commits in progress

_log = logging.getLogger(__name__)


class JobLoop:
    """Call `turn()` until `is_done`, then `hand_over()`, all on one thread. Other public methods are thread-safe."""

    def __init__(
        self,
        parts: JobParts,
        *,
        max_num_seqs: int,
        max_num_jobs: int,
        finishes_on_stop: bool = False,
        drain_seconds: float | None = None,
    ) -> None:
        """`max_num_seqs`: limit of sequences in the engine. `max_num_jobs`: limit of jobs held, from claim to
        commit."""
        self._client = parts.client
        self._clock = parts.clock
        self._engine = parts.engine
        self._scripts = parts.scripts
        self._intake = parts.intake
        self._outlet = parts.outlet
        self._max_num_seqs = max_num_seqs
        self._max_num_jobs = max_num_jobs
        self._finishes_on_stop = finishes_on_stop
        self._drain_seconds = drain_seconds
        self._events = EventQueue()
        self.held = HeldJobs()
        self._limits = Limits(self.held)
        self._committer = Committer(
            parts.client,
            parts.outcomes,
            lambda job: self._events.post(partial(self._release, job)),
            on_lost=lambda job: self._events.post(partial(self._let_go, job)),
            on_webhooks=parts.courier.wake,
        )
        self._finisher = Finisher(
            parts, self._committer, post=self._events.post, on_lost=self._drop, on_end=self._release
        )
        outputs = StepOutputs(parts.engine, post=self._events.post, take=self._on_output)
        self._admission = Admission(
            parts, self._finisher, self.held, self._limits, on_output=outputs.add, wake=self._events.wake
        )
        self._rate = TokenRate()
        self._num_new_tokens = 0
        self._num_stop_requests = 0
        self._is_draining = False
        self._drains_until: float | None = None  # monotonic seconds; None: no limit
        self._retry_at = 0.0  # monotonic seconds
        self._backoff_seconds = 0.0
        self.pace = ClaimPace(self._events.wake)
        self.tokens_per_second = 0.0
        self.failure: EngineDiedError | None = None

    def request_stop(self) -> None:
        """First call: give the jobs back, or finish them if so set. Second: give them back. Safe in signal handlers."""
        self._num_stop_requests += 1
        if self._num_stop_requests == 1 and self._drain_seconds is not None:
            self._drains_until = time.monotonic() + self._drain_seconds
        self._events.wake()

    def request_job_stop(self, job_id: str, cause: StopCause) -> None:
        if self.held.holds(job_id):
            self._events.post(partial(self._stop_job, job_id, cause))

    def report_verdict(self, claim: Claim, verdict: str) -> None:
        """What the heartbeat learned about a job: `lost`, or RQ's status of it (empty: the job was deleted)."""
        self._events.post(partial(self._on_verdict, claim, verdict))

    def adopt(self, orphan: Claim) -> None:
        """Take over a cancelled job whose worker died before it wrote the outcome, and write it."""
        self._events.post(partial(self._take_claim, orphan))

    @property
    def is_done(self) -> bool:
        if self.failure is not None or self._num_stop_requests >= 2:
            return True
        has_time = self._drains_until is None or time.monotonic() < self._drains_until
        return self._num_stop_requests > 0 and not (self._finishes_on_stop and has_time and len(self.held))

    def turn(self) -> None:
        """Wait for something to do, at most `MAX_WAIT_SECONDS`, and do it. Raises no connection errors of Redis."""
        self._events.run(self._wait_seconds(time.monotonic()))
        now = time.monotonic()
        self._note_drain()
        self._count_tokens(now)
        self._check_limits(now)
        may_advance = now >= self._retry_at
        if not (may_advance and self._finisher.has_work):  # else `_advance` sends them together with their done entries
            self._flush(now)
        if not may_advance:
            return
        try:
            self._advance(now)
            self._backoff_seconds = 0.0
        except REDIS_AWAY as error:
            self._backoff_seconds = min(max(2 * self._backoff_seconds, MIN_BACKOFF_SECONDS), MAX_BACKOFF_SECONDS)
            self._retry_at = now + self._backoff_seconds
            _log.warning("action=redis_away retry_seconds=%.2f error=%s", self._backoff_seconds, error)

    def _note_drain(self) -> None:
        if self._num_stop_requests and self._finishes_on_stop and not self._is_draining:
            self._is_draining = True
            _log.info("action=draining num_jobs=%d", len(self.held))

    def hand_over(self) -> int:
        """Give every job back to the front of its queue; returns their number. Raises what Redis raises."""
        self._flush(time.monotonic(), force=True)
        self._committer.close(COMMITS_END_SECONDS)
        self._events.run(0.0)
        for claim in self._intake.recall():
            self._take_claim(claim)
        num_given = give_back(self._client, self._scripts, self.held.claims())
        self._scripts.forget_claim(self._client, worker=self._intake.worker)
        return num_given

    def _wait_seconds(self, now: float) -> float:
        """How long until the next piece of work that no event announces."""
        retry_in = max(0.0, self._retry_at - now)
        waits = [MAX_WAIT_SECONDS]
        may_commit = (self._finisher.has_sealed or self._admission.has_opened) and not self._outlet.is_redis_away
        if self._finisher.has_work or self._admission.has_work or may_commit:
            waits.append(retry_in)
        if (claim_in := self.pace.seconds_until_due(now)) < MAX_WAIT_SECONDS and self._room > 0:
            waits.append(max(claim_in, retry_in))
        if self._drains_until is not None:
            waits.append(max(0.0, self._drains_until - now))
        dues = (self._outlet.seconds_until_due(now), self._limits.seconds_until_due(now, self._clock.now()))
        return min([*waits, *(due for due in dues if due is not None)])

    def _advance(self, now: float) -> None:
        self._finisher.decide()
        if self._finisher.has_sealed:
            self._flush(now)
        self._finisher.commit_stored()
        self._admission.admit_some()
        if self._admission.has_opened:
            self._flush(now)
        try:
            self._admission.submit_marked()
        except EngineDiedError as error:
            self.failure = error
        self._claim_some(now)

    def _flush(self, now: float, *, force: bool = False) -> None:
        for job_id in self._outlet.flush(now, force=force):
            if (job := self.held.get(job_id)) is None:
                continue
            if job.stream.refusal is None:
                self.held.note_lost(job.claim)
                self._let_go(job)
                continue
            self._abort(job)
            self._finisher.fail_unwritable(job, job.stream.refusal)

    def _count_tokens(self, now: float) -> None:
        if self._num_new_tokens:
            self._rate.add(now, self._num_new_tokens)
            self._num_new_tokens = 0
        self.tokens_per_second = self._rate.per_second(now)

    @property
    def _room(self) -> int:
        """How many jobs may be claimed now."""
        if self._num_stop_requests:
            return 0
        num_seqs = self._max_num_seqs - self.held.num_sequences
        return min(num_seqs, self._max_num_jobs - len(self.held), MAX_CLAIM)

    def _claim_some(self, now: float) -> None:
        if self.pace.seconds_until_due(now) > 0 or (room := self._room) <= 0:
            return
        queues = self.pace.begin()
        claims = self._intake.claim(room, tenant_queues=queues)
        for claim in claims:
            self._take_claim(claim)
        self.pace.end(now, may_have_more=len(claims) == room, is_busy=len(self.held) > 0)

    def _take_claim(self, claim: Claim) -> None:
        if (old := self.held.get(claim.job_id)) is not None:
            self._drop(old)  # our lease on it had expired, and we have claimed the job again
        self.held.take(claim)

    def _on_output(self, job: RunningJob, output: RequestOutput) -> None:
        if job.stage is not Stage.ADMITTED or not self.held.is_current_job(job):
            return
        if output.error_kind in ("died", "stopped"):
            self.failure = EngineDiedError(output.error or "the engine ended")
            return
        self._num_new_tokens += 0 if output.is_replay else len(output.token_ids)
        try:
            if job.take(output):
                self._finisher.add(job)
        except ReplayMismatchError as error:
            _log.warning("action=job_starts_over job_id=%s attempt=%d reason=%s", job.job_id, job.claim.attempt, error)
            self._let_go(job, resumable=False)
        except Exception as error:  # of any type: only this job's output is at fault
            _log.exception("action=output_failed job_id=%s", job.job_id)
            self._abort(job)
            job.error = ErrorInfo(code=ErrorCode.INTERNAL, message=f"its output cannot be taken: {error!r}")
            job.end()
            self._finisher.add(job)

    def _stop_job(self, job_id: str, cause: StopCause) -> None:
        job = self.held.get(job_id)
        if job is None:
            if self.held.holds(job_id):
                self.held.stop_early(job_id, cause)
        elif job.stage is Stage.ADMITTED and job.stop_cause is None:
            job.stop_cause = cause
            self._abort(job)

    def _check_limits(self, now: float) -> None:
        """Deadlines and RQ's timeouts."""
        epoch_now = self._clock.now()
        for job in self._limits.take_passed(now, epoch_now):
            cause = job.passed_limit(now, epoch_now) if job.stop_cause is None else None
            if cause == "failed":
                message = f"the job ran for longer than its RQ timeout of {job.timeout_seconds:g} s"
                job.error = ErrorInfo(code=ErrorCode.TIMEOUT, message=message)
            if cause is not None:
                self._stop_job(job.job_id, cause)

    def _on_verdict(self, claim: Claim, verdict: str) -> None:
        if not self.held.is_current(claim):
            return
        job = self.held.get(claim.job_id)
        if job is not None and job.stage is Stage.COMMITTING:
            return  # the commit itself removed the fence
        if verdict in ("", "canceled"):
            self._stop_job(claim.job_id, "cancelled")
        elif verdict == "lost":
            _log.warning("action=lease_lost job_id=%s attempt=%d", claim.job_id, claim.attempt)
            if job is not None:
                self._drop(job)
            self.held.release(claim)

    def _let_go(self, job: RunningJob, *, resumable: bool = True) -> None:
        """End this attempt and give the job back, so that the next attempt need not wait for the lease to expire."""
        self._drop(job)
        try:
            give_back(self._client, self._scripts, [job.claim], resumable=resumable)
        except REDIS_AWAY as error:
            _log.warning("action=give_back_failed job_id=%s error=%s", job.job_id, error)

    def _drop(self, job: RunningJob) -> None:
        """Another attempt has the job, or will have it: write nothing more for this one."""
        _log.info("action=job_dropped job_id=%s attempt=%d", job.job_id, job.claim.attempt)
        if job.stage is Stage.ADMITTED:
            self._abort(job)
        job.stage = Stage.COMMITTING  # output that still arrives for it is ignored
        self._finisher.forget(job)
        self._release(job)

    def _release(self, job: RunningJob) -> None:
        self._outlet.forget(job.stream)
        self.held.release(job.claim)

    def _abort(self, job: RunningJob) -> None:
        try:
            self._engine.abort(job.request_id)
        except EngineNotRunningError as error:
            self.failure = EngineDiedError(str(error))
