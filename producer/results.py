"""Waits for the results of one job or of thousands. Owns the protocol: listen to the queues' results channels, and
poll.

When a job ends and its result is stored, one line is published on its queue's channel, so one subscription serves any
number of jobs. Lines can be lost (a reconnect, a clean-up that publishes nothing), so the jobs are polled as well.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence

from producer.contract import NO_REASON, ErrorCode, ErrorInfo, Result, keys
from producer.errors import JobFailedError, JobNotFoundError, ResultTimeoutError
from producer.operations import ConnectionLost, Emit, Protocol, Receive, Reconnect, Subscribe, send, slices
from producer.outcome import (
    Look,
    Outcome,
    OutcomeWatch,
    look_at,
    look_commands,
    parse_look,
    parse_results,
    read_results,
)

LOOK_SECONDS = 2.0  # of silence before the jobs are polled; less often for thousands of them
LOOKS_A_SECOND = 2000  # at most, so that waiting for many jobs does not burden Redis
MAX_LOOKS_A_SEND = 500
MAX_RESULTS_A_SEND = 100
MAX_ENDED_A_LOOK = 500
MAX_LINES_A_READ = 1000  # including other jobs' lines, before the clock is checked


def wait_for_result(job_id: str, queue: str | None, timeout: float | None) -> Protocol[Result]:
    """The result of one job. `timeout`: seconds. Raises JobFailedError, JobNotFoundError, ResultTimeoutError."""
    collector = ResultCollector({job_id: queue}, timeout)
    if (outcome := (yield from collector.peek())) is None:  # else whoever has read its stream need not subscribe
        [outcome] = yield from collector.next_ended()
    return result_of(job_id, outcome)


def result_of(job_id: str, outcome: Outcome) -> Result:
    """The result of a job that did not fail. Raises JobFailedError, JobNotFoundError."""
    if isinstance(outcome, JobNotFoundError):
        raise outcome
    if outcome.status == "failed":
        raise JobFailedError(job_id, outcome.error or NO_REASON, outcome)
    return outcome


def as_completed(jobs: Mapping[str, str | None], timeout: float | None) -> Protocol[None]:
    """Emit the result of each job as it ends, failed ones too. `jobs`: id → queue, where known.

    A job of which nothing is left gives a failed result with the code `job_not_found`; the others are still awaited.
    """
    yield from ResultCollector(jobs, timeout).emit_all(
        lambda outcome: outcome if isinstance(outcome, Result) else _not_found_result(outcome)
    )


class ResultCollector:
    """The jobs that are not known to have ended, and how to learn of their ends."""

    def __init__(self, jobs: Mapping[str, str | None], timeout: float | None) -> None:
        """`timeout`: seconds from now until ResultTimeoutError."""
        self._pending = {job_id: OutcomeWatch(job_id) for job_id in jobs}
        self._queues = {queue for queue in jobs.values() if queue is not None}
        self._knows_queues = None not in jobs.values()
        self._num_jobs = len(jobs)
        self._timeout = timeout
        self._ends_at = None if timeout is None else time.monotonic() + timeout
        self._reconnect = Reconnect()
        self._is_listening = False
        self._next_look_at = 0.0
        self._ended: list[Outcome] = []  # not handed out yet; survives a lost connection

    @property
    def num_pending(self) -> int:
        """Jobs whose end `next_ended` has not returned yet."""
        return len(self._pending) + len(self._ended)

    def add(self, jobs: Mapping[str, str], *, may_have_ended: bool) -> None:
        """Wait for these jobs as well. `may_have_ended`: they are older than this call, so their lines may be past."""
        self._pending.update((job_id, OutcomeWatch(job_id)) for job_id in jobs)
        self._num_jobs += len(jobs)
        if not self._queues.issuperset(jobs.values()):
            self._queues.update(jobs.values())
            self._is_listening = False
        if may_have_ended:
            self._next_look_at = 0.0

    def discard(self, job_id: str) -> None:
        """Stop waiting for this job."""
        self._pending.pop(job_id, None)

    def peek(self) -> Protocol[Outcome | None]:
        """The outcome of the only job that is waited for, if it has ended: usually one round trip."""
        [job_id] = self._pending
        *replies, value = yield from send(*look_commands(job_id), ("GET", keys.result_key(job_id)))
        look = parse_look(job_id, replies)
        if not look.is_over:
            return None
        [outcome] = yield from parse_results([job_id], [value])
        if outcome is not None:
            self._end(job_id, outcome)
        else:
            yield from self._conclude(look)
        return self._ended.pop() if self._ended else None

    def emit_all(
        self, form: Callable[[Outcome], object] = lambda outcome: outcome, *, linger_seconds: float = 0.0
    ) -> Protocol[None]:
        """Emit each outcome, or `form` of it, as jobs end, until none was pending for `linger_seconds`; begins with a
        subscription of its own."""
        self._is_listening = False
        while True:
            ended = yield from self.next_ended(None if self.num_pending else linger_seconds)
            for outcome in ended:
                yield Emit(form(outcome))
            if not ended and not self.num_pending:
                return

    def next_ended(self, within: float | None = None) -> Protocol[list[Outcome]]:
        """Wait until at least one more job has ended, or for `within` seconds. Raises ResultTimeoutError."""
        until = math.inf if within is None else time.monotonic() + within
        while not self._ended and (left := until - time.monotonic()) > 0:
            if not (self._pending or self._is_listening):
                break  # a connection was lost that nobody needs
            try:
                yield from (self._listen(left) if self._is_listening else self._start_listening())
                self._reconnect.succeed()
            except ConnectionLost as lost:
                self._is_listening = False
                if not self._ended:
                    self._check_timeout()
                    yield from self._reconnect.wait(lost)
        ended, self._ended = self._ended, []
        return ended

    def _start_listening(self) -> Protocol[None]:
        """Subscribe before polling, so that no end is missed; first find out which channels to subscribe to."""
        if not self._knows_queues:
            yield from self._look()
            self._knows_queues = True
        if self._pending:
            yield Subscribe([keys.results_channel(queue) for queue in sorted(self._queues)])
            self._is_listening = True
            yield from self._look()

    def _listen(self, at_most: float) -> Protocol[None]:
        until_look = self._next_look_at - time.monotonic()
        if until_look <= 0:
            self._check_timeout()
            yield from self._look()
            return
        line = yield Receive(min(until_look, at_most, self._check_timeout(until_look)))
        ready: list[str] = []
        for _ in range(MAX_LINES_A_READ):
            if line is None:
                break
            job_id = _job_id_of(line)
            if job_id is not None and job_id in self._pending:
                ready.append(job_id)
            if len(ready) == MAX_RESULTS_A_SEND:
                break
            line = yield Receive(0.0)
        yield from self._read(ready)

    def _look(self) -> Protocol[None]:
        for job_ids in slices(list(self._pending), MAX_LOOKS_A_SEND):
            looks = yield from look_at(job_ids)
            self._queues.update(look.queue for look in looks if look.queue is not None)
            closed = [look for look in looks if look.is_over]
            yield from self._read([look.job_id for look in closed if look.has_result])
            for look in closed:
                if look.job_id in self._pending:
                    yield from self._conclude(look)
            if self._knows_queues and len(self._ended) >= MAX_ENDED_A_LOOK:
                self._next_look_at = 0.0  # polls the others after these are returned: results can be large
                return
        self._next_look_at = time.monotonic() + max(LOOK_SECONDS, len(self._pending) / LOOKS_A_SECOND)

    def _read(self, job_ids: Sequence[str]) -> Protocol[None]:
        for some in slices(job_ids, MAX_RESULTS_A_SEND):
            results = yield from read_results(some)
            for job_id, result in zip(some, results, strict=True):
                if result is not None:
                    self._end(job_id, result)

    def _conclude(self, look: Look) -> Protocol[None]:
        """Conclude a job that ended, or is gone, without a result of ours."""
        try:
            result = yield from self._pending[look.job_id].conclude(look)
        except JobNotFoundError as error:
            self._end(look.job_id, error)
        else:
            if result is not None:
                self._end(look.job_id, result)

    def _end(self, job_id: str, outcome: Outcome) -> None:
        if self._pending.pop(job_id, None) is not None:
            self._ended.append(outcome)

    def _check_timeout(self, seconds: float = 0.0) -> float:
        """`seconds`, or the time left until the timeout if that is less. Raises ResultTimeoutError when none is
        left."""
        if self._ends_at is None:
            return seconds
        left = self._ends_at - time.monotonic()
        if left <= 0:
            which = f"job {next(iter(self._pending))} has" if self._num_jobs == 1 else f"{self.num_pending} jobs have"
            raise ResultTimeoutError(f"{which} not ended within {self._timeout:g} s; ask again, or cancel")
        return min(seconds, left)


def _job_id_of(line: bytes) -> str | None:
    try:
        job_id = json.loads(line)["job_id"]
    except (ValueError, LookupError, TypeError):
        return None  # not written by a worker
    return job_id if isinstance(job_id, str) else None


def _not_found_result(error: JobNotFoundError) -> Result:
    info = ErrorInfo(code=ErrorCode.JOB_NOT_FOUND, message=str(error))
    return Result(job_id=error.job_id, status="failed", error=info)
