"""The last write of every job: RQ's outcome, the result and the results line in one transaction under the fence.

A failed commit does not mean a failed job. After a connection error the commit is repeated until Redis answers. If the
fence is gone by then, either the commit had succeeded and only its reply was lost, or another attempt has the job. In
both cases nothing is left to do.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import redis
from redis.client import Pipeline
from redis.exceptions import WatchError

from producer.contract import ErrorCode, ErrorInfo, keys
from producer.rq_names import dependents_key, job_key
from worker.background import BackgroundThreads
from worker.claim import RECORD_FIELDS, is_replaced, read_standing
from worker.errors import LeaseLostError
from worker.fence import FencedRedis
from worker.redis_client import REDIS_AWAY, execute_each, which_exist
from worker.rq_bridge import Outcomes, calls_back, has_extras
from worker.running_job import RunningJob
from worker.scripts import RECORD_TTL_SECONDS, EndCommit

MAX_BATCH = 64  # jobs in one transaction
MAX_BYTES_AT_ONCE = 64 << 10  # of an output whose commit is built on the loop's thread
NUM_THREADS = 4
NUM_CALLBACK_THREADS = 4  # by default a callback may run for a minute before its job is committed
MIN_BACKOFF_SECONDS = 0.05
MAX_BACKOFF_SECONDS = 2.0
FAILED_COMMIT_SECONDS = (0.1, 0.3, 1.0)  # between tries of a commit that raises anything but a connection error

Commit = Callable[[list[RunningJob]], list[RunningJob]]
"""Returns the jobs that are done; the others were passed to another commit."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Try:
    """An attempt to commit some jobs. It is repeated until Redis has accepted it or the worker ends."""

    threads: BackgroundThreads
    commit: Commit
    jobs: list[RunningJob]
    backoff_seconds: float = MIN_BACKOFF_SECONDS  # before the next try, while Redis is unavailable
    num_failures: int = 0  # with anything but a connection error
    is_bare: bool = False


class Committer:
    """Commits on background threads. Calls `on_end` there, once for every job that is done, until `close`.

    No thread waits: a commit that must be repeated is queued again, with its own backoff. Callbacks are other people's
    code and may hang, so they run on separate threads. `on_webhooks` is called when there are webhooks to deliver, and
    `on_lost` instead of `on_end` for a job that must not be retried after all.
    """

    def __init__(
        self,
        client: redis.Redis,
        outcomes: Outcomes,
        on_end: Callable[[RunningJob], None],
        *,
        on_lost: Callable[[RunningJob], None],
        on_webhooks: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._outcomes = outcomes
        self._on_end, self._on_lost = on_end, on_lost
        self._threads = BackgroundThreads(NUM_THREADS, "commit")
        self._callers = BackgroundThreads(NUM_CALLBACK_THREADS, "callback")
        self.on_webhooks = on_webhooks
        self._is_closing = threading.Event()

    def commit(self, jobs: Sequence[RunningJob]) -> None:
        """Returns at once. The jobs' streams must be stored completely, and `result` and `status` set."""
        batch = [job for job in jobs if _is_plain(job)]
        for start in range(0, len(batch), MAX_BATCH):
            self._submit(_Try(self._threads, self._commit_batch, batch[start : start + MAX_BATCH]))
        for job in jobs:
            if not _is_plain(job):
                threads = self._callers if calls_back(job.rq_job) else self._threads
                self._submit(_Try(threads, self._commit_by_handlers, [job]))

    def build(self, job: RunningJob) -> EndCommit | None:
        """The commit of a finished job, to be sent with its done entry. None: it needs more steps."""
        vectors = job.result.embeddings or () if job.result is not None else ()
        if not _is_plain(job) or job.stream.num_bytes + sum(map(len, vectors)) > MAX_BYTES_AT_ONCE:
            return None
        pipe = self._client.pipeline()
        self._add(pipe, job)
        self._outcomes.add_success_counts(pipe, [job])
        return EndCommit(dependents_key(job.job_id), [parts for parts, _ in pipe.command_stack])

    def close(self, timeout_seconds: float) -> None:
        """Give up the commits that Redis has not accepted; those in progress may end within the timeout."""
        self._is_closing.set()
        end = time.monotonic() + timeout_seconds
        for threads in (self._threads, self._callers):
            threads.stop(max(0.0, end - time.monotonic()))

    def _submit(self, attempt: _Try, *, after_seconds: float = 0.0) -> None:
        attempt.threads.submit(partial(self._persist, attempt), after_seconds=after_seconds)

    def _persist(self, attempt: _Try) -> None:
        try:
            ended = attempt.commit(attempt.jobs)
        except (WatchError, *REDIS_AWAY) as error:
            _log.warning("action=commit_delayed error=%s", error)
            self._wait_for_redis(attempt)
            return
        except Exception as error:  # of any type: RQ's handlers read untrusted data
            _log.exception("action=commit_failed job_ids=%s", ",".join(job.job_id for job in attempt.jobs))
            if not attempt.is_bare:
                self._insist(attempt, error)
                return
            ended = attempt.jobs  # the lease expires, and the next attempt finds the stored outcome
        if any(job.rq_job.webhooks for job in attempt.jobs):
            self.on_webhooks()
        if self._is_closing.is_set():
            return  # uncommitted jobs are handed over; committed ones are no longer under our fence
        for job in ended:
            self._on_end(job)

    def _wait_for_redis(self, attempt: _Try) -> None:
        """After a long outage each of several jobs is tried by itself. A proxy that rejects the command of one job
        looks just like an outage, and must not hold up the others."""
        if self._is_closing.is_set():
            return
        backoff = attempt.backoff_seconds
        next_one = replace(attempt, backoff_seconds=min(2 * backoff, MAX_BACKOFF_SECONDS))
        parts = [[job] for job in attempt.jobs] if backoff >= MAX_BACKOFF_SECONDS else [attempt.jobs]
        for jobs in parts:
            self._submit(replace(next_one, jobs=jobs), after_seconds=backoff)

    def _insist(self, attempt: _Try, error: Exception) -> None:
        """If one of several jobs cannot be committed, each is committed by itself. A single job is tried a few times
        more; if its commit still raises, the job must nevertheless end: as failed."""
        if self._is_closing.is_set():
            return
        if len(attempt.jobs) > 1:
            for job in attempt.jobs:
                self._submit(replace(attempt, jobs=[job], backoff_seconds=MIN_BACKOFF_SECONDS))
            return
        [job], num_failures = attempt.jobs, attempt.num_failures
        if num_failures < len(FAILED_COMMIT_SECONDS):
            again = replace(attempt, num_failures=num_failures + 1, backoff_seconds=MIN_BACKOFF_SECONDS)
            self._submit(again, after_seconds=FAILED_COMMIT_SECONDS[num_failures])
            return
        reason = f"{type(error).__name__}: {error}"  # redis-py's errors leave their message out of their repr
        message = f"the job's outcome could not be committed: {reason}"
        _log.error("action=commit_given_up job_id=%s error=%s", job.job_id, reason)
        job.fail_commit(ErrorInfo(code=ErrorCode.INTERNAL, message=message))
        self._submit(_Try(self._threads, partial(self._commit_bare, reason=message), [job], is_bare=True))

    def _commit_batch(self, jobs: list[RunningJob]) -> list[RunningJob]:
        """Commit several jobs at once, except those that other jobs depend on. RQ's own handler commits these, one by
        one, and enqueues the dependents; so a lost reply repeats one commit, not all."""
        with self._client.pipeline() as pipe:
            held, awaited, started = self._watch(pipe, jobs)
            if not held:
                return jobs
            pipe.multi()
            for job in held:
                if job not in awaited:
                    self._add(pipe, job, rq_says_started=job in started)
            if plain := [job for job in held if job.status == "finished" and job not in awaited]:
                self._outcomes.add_success_counts(pipe, plain)
            pipe.execute()
        for job in awaited:
            self._submit(_Try(self._threads, self._commit_by_handlers, [job]))
        return [job for job in jobs if job not in awaited]

    def _watch(self, pipe: Pipeline, jobs: Sequence[RunningJob]) -> tuple[list[RunningJob], ...]:
        """The jobs that are still ours, and those of them that other jobs depend on, and that RQ calls started; in two
        round trips. The transaction fails if any of this, or RQ's record of a job, changes before it takes effect."""
        fences = [keys.fence_key(job.job_id) for job in jobs]
        records = [job_key(job.job_id) for job in jobs]
        dependents = [dependents_key(job.job_id) for job in jobs if job.status == "finished"]
        pipe.watch(*fences, *records, *dependents)  # type: ignore[no-untyped-call]
        with self._client.pipeline(transaction=False) as look:
            if dependents:
                look.exists(*dependents)
            found, rq_says, num_existing = read_standing(look, [job.job_id for job in jobs])
        held, started = [], []
        for job, fence, fields in zip(jobs, found, rq_says, strict=True):
            if fence == job.claim.fence.encode() and not is_replaced(fields):
                held.append(job)
                if not isinstance(fields, Exception) and fields[0] == b"started":
                    started.append(job)
            else:
                _log.info("action=commit_fenced job_id=%s attempt=%d", job.job_id, job.claim.attempt)
        existing = which_exist(self._client, dependents) if any(num_existing) else set()
        awaited = [job for job in held if job.status == "finished" and dependents_key(job.job_id) in existing]
        return held, awaited, started

    def _add(self, pipe: Pipeline, job: RunningJob, *, rq_says_started: bool = False) -> None:
        assert job.result is not None
        wire = job.result.to_wire()
        if job.status == "finished":
            self._outcomes.add_success(pipe, job, wire)
        else:
            self._outcomes.add_cancelled(pipe, job, rq_says_started=rq_says_started)
        self._add_end(pipe, job, wire)

    def _commit_by_handlers(self, jobs: list[RunningJob]) -> list[RunningJob]:
        (job,) = jobs
        wire = "" if job.result is None else job.result.to_wire()
        connection = FencedRedis(
            self._client.connection_pool,
            job_id=job.job_id,
            fence_key=keys.fence_key(job.job_id),
            fence=job.claim.fence,
            epilogue=lambda pipe: self._add_end(pipe, job, wire),
            watched=[job_key(job.job_id)],
            is_void=lambda pipe: _is_void(pipe, job),
        )
        handle = self._outcomes.handle_success if job.status == "finished" else self._outcomes.handle_failure
        try:
            handle(job, connection)
        except LeaseLostError:
            _log.info("action=commit_fenced job_id=%s attempt=%d", job.job_id, job.claim.attempt)
            self._outcomes.enqueue_ready()  # if it is the reply that was lost, dependents wait in between
            if job.is_retried:
                self._on_lost(job)
                return []
        return jobs

    def _commit_bare(self, jobs: list[RunningJob], reason: str) -> list[RunningJob]:
        """Write only that the job failed. Commands that fail because a key has another type are left out."""
        (job,) = jobs
        assert job.result is not None
        with self._client.pipeline() as pipe:
            held, *_ = self._watch(pipe, [job])
            if not held:
                return jobs
            pipe.multi()
            self._outcomes.add_bare_failure(pipe, job, reason)
            self._add_end(pipe, job, job.result.to_wire())
            if problems := [reply for reply in execute_each(pipe) if isinstance(reply, Exception)]:
                _log.error("action=commit_refused_in_part job_id=%s errors=%s", job.job_id, problems)
        return jobs

    def _add_end(self, pipe: Pipeline, job: RunningJob, wire: str) -> None:
        """Our part: deletes the lease and the fence and, unless RQ will retry the job, writes the result."""
        pipe.zrem(keys.leases_key(job.claim.queue), job.job_id)
        base, tenant = keys.split_tenant(job.claim.queue)
        if tenant is not None:
            pipe.publish(keys.freed_channel(base), job.claim.queue)
        pipe.delete(keys.fence_key(job.job_id))
        if job.is_retried:
            pipe.expire(keys.stream_key(job.job_id), RECORD_TTL_SECONDS)  # until the next attempt marks it
            return
        assert job.result is not None
        # Its done entry began this, but where none could be written, or a Redis that was replaced has lost it.
        pipe.expire(keys.stream_key(job.job_id), keys.STREAM_TTL_SECONDS)
        if job.status == "finished":
            self._outcomes.add_not_cancelled(pipe, job)
        pipe.delete(keys.attempt_key(job.job_id))
        pipe.set(keys.result_key(job.job_id), wire, ex=_result_ttl(job))
        line = job.result.without_output().to_wire()
        channel = keys.results_channel(job.claim.queue)
        pipe.publish(channel, line)
        pipe.xadd(channel, {keys.DATA_FIELD: line}, maxlen=keys.RESULTS_STREAM_MAX_ENTRIES, approximate=True)
        pipe.expire(channel, keys.RESULT_TTL_SECONDS)  # of a tenant that comes no more, nothing stays
        self._outcomes.add_webhooks(pipe, job)


def _is_void(pipe: Pipeline, job: RunningJob) -> bool:
    """Whether the job was replaced after its outcome was decided, or was cancelled although it is to be retried."""
    try:
        rq_says: list[Any] = pipe.hmget(job_key(job.job_id), *RECORD_FIELDS)
    except redis.ResponseError:  # it is no hash
        return False
    return is_replaced(rq_says) or (job.is_retried and rq_says[0] in (None, b"canceled"))


def _result_ttl(job: RunningJob) -> int | None:
    """How many seconds the result is kept (None: for ever): as long as RQ keeps its own, but never zero."""
    ttl = keys.RESULT_TTL_SECONDS
    if job.status == "finished":
        ttl = job.rq_job.get_result_ttl(keys.RESULT_TTL_SECONDS)
    elif job.status == "failed":
        ttl = job.rq_job.failure_ttl or keys.FAILURE_TTL_SECONDS
    return None if ttl < 0 else int(ttl) or keys.RESULT_TTL_SECONDS


def _is_plain(job: RunningJob) -> bool:
    """Whether the commit touches only the job's own keys, provided that no other job depends on it."""
    return job.status == "cancelled" or (job.status == "finished" and not has_extras(job.rq_job))
