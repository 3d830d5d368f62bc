"""RQ's part of a job's end, as commands. Nothing is executed here: the transaction and its fence belong to the caller.

A plain success and a cancel are a few commands, added to a pipeline. Ends that affect other jobs go through RQ's
handlers.
"""

import copy
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import redis
from redis.client import Pipeline
from rq import Queue
from rq.callbacks import execute_failure_callback, execute_stopped_callback, execute_success_callback
from rq.executions import WORKER_EXECUTIONS_KEY_TEMPLATE, Execution
from rq.job import Job, JobStatus
from rq.results import Result as RqResult
from rq.timeouts import TimerDeathPenalty
from rq.utils import utcformat

from producer.contract.keys import FAILURE_TTL_SECONDS, RESULT_TTL_SECONDS
from producer.rq_names import execution_key_prefix, executions_key, ready_key, registry_key
from worker.claim import Claim
from worker.fence import FencedRedis
from worker.redis_client import which_exist
from worker.rq_bridge.bridge import RqBridge
from worker.rq_bridge.held_job import JobReader
from worker.rq_bridge.webhooks import build_webhook
from worker.running_job import RunningJob

_log = logging.getLogger(__name__)


class CallbackPenalty(TimerDeathPenalty):  # type: ignore[misc]
    """RQ's timeout for callbacks, for other threads than the main one. RQ's own changes the exception class for all
    threads."""

    def __init__(self, timeout: int, exception: type[Exception], **kwargs: Any) -> None:
        super().__init__(timeout, type(exception.__name__, (exception,), {}), **kwargs)


class Outcomes:
    """Writes the outcomes of one worker's jobs. Thread-safe."""

    def __init__(self, bridge: RqBridge, reader: JobReader) -> None:
        self._bridge = bridge
        self._reader = reader
        self._worker_name: str = bridge.name
        self._connection: redis.Redis = bridge.connection
        self._queues: dict[str, Queue] = {queue.name: queue for queue in bridge.queues}

    def add_success(self, pipe: Pipeline, running: RunningJob, return_value: str) -> None:
        """Write what RQ's `handle_job_success` does for a job without extras, in fewer commands. `return_value` is
        JSON."""
        claim, job = running.claim, running.rq_job
        ended_at = _ended_at(running)
        ttl = job.get_result_ttl(RESULT_TTL_SECONDS)
        pipe.hset(job.key, mapping={"status": JobStatus.FINISHED.value, "ended_at": utcformat(ended_at)})
        if ttl > 0:
            _add_expiry(pipe, job, ttl)
        result = RqResult(
            claim.job_id,
            RqResult.Type.SUCCESSFUL,
            self._connection,
            return_value=return_value,
            worker_name=self._worker_name,
            execution_id=claim.execution_id,
            execution_started_at=job.started_at,
            execution_ended_at=ended_at,
        )
        result.serializer = _AlreadyJson  # set here: as an argument, RQ would check it for each result
        result.save(ttl, pipeline=pipe)
        self._queue(claim.queue).finished_job_registry.add(job, ttl, pipeline=pipe)
        self._add_execution_end(pipe, claim)

    def _queue(self, name: str) -> Queue:
        """A queue of the worker or of a tenant."""
        if name not in self._queues:
            self._queues[name] = self._bridge.open_queue(name)
        return self._queues[name]

    def add_success_counts(self, pipe: Pipeline, jobs: Sequence[RunningJob]) -> None:
        seconds = sum((_ended_at(running) - running.rq_job.started_at).total_seconds() for running in jobs)
        pipe.hincrby(self._bridge.key, "successful_job_count", len(jobs))
        pipe.hincrbyfloat(self._bridge.key, "total_working_time", seconds)

    def add_cancelled(self, pipe: Pipeline, running: RunningJob, *, rq_says_started: bool) -> None:
        """RQ has marked the job as cancelled already (or deleted it); its hash is kept as long as a result.

        `rq_says_started`: it was enqueued again before its end and claimed while it still ran; or Redis has lost the
        cancel.
        """
        if rq_says_started:
            pipe.hset(running.rq_job.key, "status", JobStatus.CANCELED.value)
            cancelled = registry_key("cancelled", running.claim.queue)
            pipe.zadd(cancelled, {running.job_id: int(_ended_at(running).timestamp())})
        self._add_execution_end(pipe, running.claim)
        _add_expiry(pipe, running.rq_job, RESULT_TTL_SECONDS)

    def add_not_cancelled(self, pipe: Pipeline, running: RunningJob) -> None:
        """Undo a cancel that came after the outcome was decided."""
        pipe.zrem(registry_key("cancelled", running.claim.queue), running.job_id)

    def add_bare_failure(self, pipe: Pipeline, running: RunningJob, reason: str) -> None:
        """Write a failure without what RQ's handler does for others (dependents, callbacks)."""
        job = running.rq_job
        ended_at = _ended_at(running)
        pipe.hset(job.key, mapping={"status": JobStatus.FAILED.value, "ended_at": utcformat(ended_at)})
        _add_expiry(pipe, job, FAILURE_TTL_SECONDS)
        RqResult(
            running.job_id,
            RqResult.Type.FAILED,
            self._connection,
            exc_string=reason,
            serializer=_AlreadyJson,
            worker_name=self._worker_name,
            execution_id=running.claim.execution_id,
        ).save(FAILURE_TTL_SECONDS, pipeline=pipe)
        failed = self._queue(running.claim.queue).failed_job_registry
        pipe.zadd(failed.key, {running.job_id: int(ended_at.timestamp()) + FAILURE_TTL_SECONDS})
        self._add_execution_end(pipe, running.claim)

    def _add_execution_end(self, pipe: Pipeline, claim: Claim) -> None:
        composite = f"{claim.job_id}:{claim.execution_id}"
        pipe.delete(execution_key_prefix(claim.job_id) + claim.execution_id)
        pipe.zrem(registry_key("started", claim.queue), composite)
        pipe.zrem(executions_key(claim.job_id), claim.execution_id)
        pipe.srem(WORKER_EXECUTIONS_KEY_TEMPLATE.format(self._worker_name), composite)

    def enqueue_ready(self, tenant_queues: Sequence[str] = ()) -> None:
        """Enqueue dependents that a commit made ready and that were not enqueued, on the worker's queues and on these.
        There may be thousands of queues, and rarely such a job."""
        names = dict.fromkeys([*list(self._queues), *tenant_queues])
        registries = {ready_key(name): name for name in names}
        existing = which_exist(self._connection, list(registries))
        for registry, name in registries.items():
            if registry in existing:
                self._queue(name).ready_job_registry.cleanup()

    def handle_success(self, running: RunningJob, connection: FencedRedis) -> None:
        """Commit a success by RQ's handler. Raises what the commit raises. A success callback that fails does not undo
        the stored outcome."""
        assert running.result is not None
        job, worker = self._fresh_job(running), _committing_through(self._bridge, connection)
        job._result = running.result.model_dump(mode="json", exclude_none=True)
        job._status = JobStatus.FINISHED
        self._call_back(running, execute_success_callback, job, CallbackPenalty, job._result)
        queue = self._queue(running.claim.queue)
        worker.handle_job_success(
            job=job, queue=queue, started_job_registry=queue.started_job_registry, execution=self._execution(running)
        )

    def handle_failure(self, running: RunningJob, connection: FencedRedis) -> None:
        """Commit a failure, a stop, or a return to the queue by RQ's Retry. Raises what the commit raises."""
        job, worker = self._fresh_job(running), _committing_through(self._bridge, connection)
        queue = self._queue(running.claim.queue)
        ready: dict[str, list[str]] = {}
        if not running.is_retried:  # RQ does this after the commit, so a worker that dies in between would not
            connection.prologue = lambda pipe: ready.update(_move_dependents(queue, job, pipe))
        reason = _reason(running)
        if running.status == "stopped":
            worker._stopped_job_id = job.id
            self._call_back(running, execute_stopped_callback, job, CallbackPenalty)
        else:
            job.retries_left = job.retries_left if running.is_retried else 0
            job._status = JobStatus.FAILED
            problem = RuntimeError(reason)
            self._call_back(running, execute_failure_callback, job, CallbackPenalty, RuntimeError, problem, None)
        worker.handle_job_failure(job, queue, exc_string=reason, execution=self._execution(running))
        if connection.error is not None:
            raise connection.error
        queue.enqueue_ready_jobs_by_queue(ready)

    def add_webhooks(self, pipe: Pipeline, running: RunningJob) -> None:
        """Add the deliveries of the job's webhooks, due at once; any worker may send them."""
        if not running.rq_job.webhooks or running.status not in ("finished", "failed"):
            return
        job = self._fresh_job(running)
        exc_string = _reason(running) if running.status == "failed" else None
        hooks = [hook for hook in job.webhooks if hook.job_status == running.status]
        for number, hook in enumerate(hooks):
            try:
                webhook = build_webhook(job, hook, exc_string, allowed=self._reader.find_allowed(hook.url))
            except Exception:  # of any type: an invalid webhook must not keep the job from ending
                _log.exception("action=webhook_unwritable job_id=%s", running.job_id)
                continue
            delivery_id = f"{running.claim.execution_id}-{number}"  # an execution commits only once
            for command in webhook.write_commands(delivery_id):
                pipe.execute_command(*command)  # type: ignore[no-untyped-call]

    def _fresh_job(self, running: RunningJob) -> Job:
        """A new job object: RQ's handlers change theirs, and a commit that is retried needs it as it was."""
        job, _ = self._reader.restore(running.claim)
        job.ended_at = _ended_at(running)
        return job

    def _execution(self, running: RunningJob) -> Execution:
        execution = Execution(
            running.claim.execution_id, running.job_id, self._connection, worker_name=self._worker_name
        )
        execution.created_at = running.rq_job.started_at
        return execution

    def _call_back(self, running: RunningJob, execute: Any, *args: Any) -> None:
        if running.has_called_back:
            return
        running.has_called_back = True
        try:
            execute(*args)
        except Exception:  # of any type: it is user code
            _log.exception("action=callback_failed job_id=%s", running.job_id)


def _committing_through(bridge: RqBridge, connection: FencedRedis) -> RqBridge:
    """A copy of the worker with its own connection and its own slot for a stopped job."""
    worker = copy.copy(bridge)
    worker.connection = connection
    worker._stopped_job_id = None
    return worker


def _add_expiry(pipe: Pipeline, job: Job, seconds: int) -> None:
    """Set the expiry of all keys that RQ keeps under the job's id."""
    for key in (job.key, job.dependencies_key, job.dependents_key):
        pipe.expire(key, seconds)


def _move_dependents(queue: Queue, job: Job, pipe: Pipeline) -> dict[str, list[str]]:
    """Move the job's dependents. The transaction is retried if a job comes to depend on it meanwhile."""
    pipe.watch(job.dependents_key)  # type: ignore[no-untyped-call]
    ready: dict[str, list[str]] = queue.move_dependents_to_ready(job, pipeline=pipe)
    return ready


class _AlreadyJson:
    """An RQ serializer for values that are JSON text already."""

    @staticmethod
    def dumps(text: str | None) -> bytes:
        return (text or "null").encode()

    @staticmethod
    def loads(data: bytes) -> str:
        return data.decode()


def _reason(running: RunningJob) -> str:
    assert running.error is not None
    return f"{running.error.code}: {running.error.message}"


def _ended_at(running: RunningJob) -> datetime:
    assert running.ended_at is not None
    return datetime.fromtimestamp(running.ended_at, UTC)
