"""The worker as RQ sees it: it sends heartbeats, obeys commands, maintains the registries, and runs many jobs at
once."""

import os
from collections.abc import Sequence

import redis
from redis.client import Pipeline
from rq import Queue, worker_registration
from rq.job import Job
from rq.rate_limit import RateLimitRegistry
from rq.registry import FailedJobRegistry, FinishedJobRegistry, ReadyJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.worker import BaseWorker
from rq.worker.base import WorkerStatus

from producer.contract.keys import RESULT_TTL_SECONDS
from producer.rq_names import QUEUES_KEY, dependents_key, queue_key
from worker.errors import StartRefusedError
from worker.rq_bridge.held_job import HeldJob
from worker.rq_bridge.scheduler import InlineScheduler

SUSPENDED_KEY: str = WORKERS_SUSPENDED  # exists while RQ is suspended
SLOTS_LOCK_KEY = "promptmill:slots"
SLOTS_SECONDS = 5.0  # at most, until a slot that was not freed is freed here
SLOTS_LOCK_MS = 4500  # so that only one worker looks
WORKER_TTL_SECONDS = 30  # RQ adds a minute: a dead worker is in `rq info` for 90 s at most


class ServedQueue(Queue):  # type: ignore[misc]
    """A queue that does three things for dependent jobs that RQ does not."""

    def move_dependents_to_ready(
        self,
        job: Job,
        pipeline: Pipeline | None = None,
        exclude_job_id: str | None = None,
        refresh_job_status: bool = True,
    ) -> dict[str, list[str]]:
        """In a transaction with the job's outcome, that outcome counts instead of the status in Redis, which may be a
        cancel that came too late. The dependents' queues are added to the list of tenants' queues: workers would not
        know a queue whose first job had to wait. A dependent that no longer waits is removed from all the jobs that it
        waited for: RQ would keep it for ever with one that had ended before it was enqueued."""
        names: dict[str, list[str]] = super().move_dependents_to_ready(
            job,
            pipeline=pipeline,
            exclude_job_id=exclude_job_id,
            refresh_job_status=refresh_job_status and pipeline is None,
        )
        if names:
            writer = self.connection if pipeline is None else pipeline
            writer.sadd(QUEUES_KEY, *map(queue_key, names))
            ready = [job_id for job_ids in names.values() for job_id in job_ids]
            for dependent in self.job_class.fetch_many(ready, connection=self.connection, serializer=self.serializer):
                for dependency_id in dependent._dependency_ids if dependent is not None else ():
                    writer.srem(dependents_key(dependency_id), dependent.id)
        return names


class RqBridge(BaseWorker):  # type: ignore[misc]
    """One RQ worker. Its methods are called from several threads; what they share is in Redis."""

    def __init__(self, connection: redis.Redis, queues: Sequence[str], *, name: str) -> None:
        super().__init__(
            list(queues),
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            job_class=HeldJob,
            queue_class=ServedQueue,
            default_result_ttl=RESULT_TTL_SECONDS,
            worker_ttl=WORKER_TTL_SECONDS,
            log_job_description=False,
        )
        self._inline_scheduler: InlineScheduler | None = None

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        return connection  # RQ would set the socket's timeout to minutes

    # the worker in `rq info`

    def register(self) -> None:
        """Raises StartRefusedError if a worker of this name is alive."""
        stored = self.connection.hgetall(self.key)
        if stored and stored.get(b"hostname", b"").decode() == self.hostname and _is_gone(int(stored.get(b"pid", 0))):
            self.connection.delete(self.key)  # left by an earlier worker here that was killed
        try:
            self.register_birth()
        except ValueError as error:
            raise StartRefusedError(
                f"a worker named {self.name!r} is alive, or died within {WORKER_TTL_SECONDS + 60} s: "
                "choose another --worker-name, or wait"
            ) from error
        self.set_state(WorkerStatus.STARTED)

    def add_beat(self, pipe: Pipeline, *, num_jobs: int, is_suspended: bool) -> None:
        """Add RQ's heartbeat and state. One of the first two replies is 1 if another worker of this name has signed
        off, or Redis has lost this one: then `register_again`."""
        pipe.hdel(self.key, "death")
        self.heartbeat(pipeline=pipe)
        idle = WorkerStatus.SUSPENDED if is_suspended else WorkerStatus.IDLE
        self.set_state(WorkerStatus.BUSY if num_jobs else idle, pipeline=pipe)

    def register_again(self) -> None:
        with self.connection.pipeline() as pipe:
            pipe.hset(self.key, mapping=self.serialize())
            worker_registration.register(self, pipe)
            pipe.execute()

    def open_queue(self, name: str) -> ServedQueue:
        return ServedQueue(name, connection=self.connection, job_class=self.job_class, serializer=JSONSerializer)

    def unregister(self) -> None:
        if self._inline_scheduler is not None and self._inline_scheduler.acquired_locks:
            self._inline_scheduler.stop()
        self.register_death()

    # maintenance that RQ's worker does between jobs

    def run_scheduler(self, now: float, *, tenant_queues: Sequence[str] = ()) -> None:
        """`now`: monotonic seconds."""
        if self._inline_scheduler is None:
            self._inline_scheduler = InlineScheduler(self.queue_names(), self.connection)
        self._inline_scheduler.turn(now, {*self.queue_names(), *tenant_queues})

    def clean_registries(self, *, tenant_queues: Sequence[str] = ()) -> None:
        """RQ's maintenance without two parts: no intermediate queue is used, and the started registry is left alone,
        because RQ would fail its jobs and import the callbacks that they name."""
        for queue in [*self.queues, *map(self.open_queue, tenant_queues)]:
            if queue.acquire_maintenance_lock():
                try:
                    for registry in (FinishedJobRegistry, FailedJobRegistry, ReadyJobRegistry):
                        registry(queue=queue, job_class=self.job_class).cleanup()
                    worker_registration.clean_worker_registry(queue)
                finally:
                    queue.release_maintenance_lock()

    def free_slots(self) -> None:
        """Free the rate limits' slots of jobs that have ended; until then other jobs wait. RQ frees the slot after the
        commit of a success or a failure, but its worker may have died before that. A cancelled job's slot is freed only
        here."""
        if self.connection.exists(RateLimitRegistry.rl_keys_key) and self.connection.set(
            SLOTS_LOCK_KEY, 1, nx=True, px=SLOTS_LOCK_MS
        ):
            for limit in RateLimitRegistry.all(self.connection):
                limit.cleanup()


def _is_gone(pid: int) -> bool:
    """Whether the process of an earlier worker on this host is dead, or its pid is ours now."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
