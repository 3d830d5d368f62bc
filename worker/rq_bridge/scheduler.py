"""RQ's scheduler within the worker: enqueues jobs that are due (enqueue_in, Retry with intervals) on queues without
another scheduler. RQ's own forks, asks queue by queue, and takes a minute to replace a dead scheduler.
"""

import logging
from collections.abc import Collection, Sequence
from contextlib import suppress

import redis
from redis.exceptions import WatchError
from rq import Queue
from rq.job import Job
from rq.registry import ScheduledJobRegistry
from rq.scheduler import RQScheduler
from rq.scripts import ACQUIRE_OR_REFRESH_LOCK_SCRIPT, RELEASE_LOCK_SCRIPT
from rq.serializers import JSONSerializer
from rq.utils import current_timestamp

from producer.rq_names import job_key, registry_key

TAKE_OVER_SECONDS = 5.0  # between looks for queues without a scheduler
LOCK_SECONDS = 15  # without a heartbeat (one per turn) another scheduler may take the queue
_RQ_LOCK_SECONDS = 60  # RQ adds this to its interval


class InlineScheduler(RQScheduler):  # type: ignore[misc]
    """Call `turn` once a second, from one thread. It raises Redis's errors; the next turn tries again."""

    def __init__(self, queues: Sequence[str], connection: redis.Redis) -> None:
        self._queue_names: set[str] = set()
        super().__init__(
            queues,
            connection=connection,
            interval=LOCK_SECONDS - _RQ_LOCK_SECONDS,
            serializer=JSONSerializer,
            logging_level=logging.WARNING,
        )
        self._connection = connection  # RQ would open a pool of its own, as for a fork, and not close it
        self._takes_over_at = 0.0

    def turn(self, now: float, queues: Collection[str]) -> None:
        """`now`: monotonic seconds. `queues`: those to schedule unless another scheduler does."""
        if now >= self._takes_over_at or not self._queue_names.issuperset(queues):
            self._queue_names = set(queues)
            self.acquire_locks()
            self._takes_over_at = now + TAKE_OVER_SECONDS  # after the call: a lost reply is retried a second later
        if not self.acquired_locks:
            return
        if not self.pid:
            self.register_birth()
        self.heartbeat()
        self.enqueue_scheduled_jobs()

    def acquire_locks(self, auto_start: bool = False) -> set[str]:
        """Take the locks of all the queues in one round trip."""
        names = sorted(self._queue_names)
        lock = self.connection.register_script(ACQUIRE_OR_REFRESH_LOCK_SCRIPT)
        with self.connection.pipeline(transaction=False) as pipe:
            for name in names:
                lock(keys=[self.get_locking_key(name)], args=[self.name, LOCK_SECONDS], client=pipe)
            self._acquired_locks = {name for name, is_mine in zip(names, pipe.execute(), strict=True) if is_mine}
        return self._acquired_locks

    def release_locks(self) -> None:
        """Release the locks of all the queues in one round trip: a worker that ends has two seconds."""
        with self.connection.pipeline(transaction=False) as pipe:
            for name in self._acquired_locks:
                pipe.eval(RELEASE_LOCK_SCRIPT, 1, self.get_locking_key(name), self.name)
            pipe.execute()
        self._acquired_locks = set()

    def enqueue_scheduled_jobs(self) -> None:
        """Enqueue the jobs that are due. There rarely are any, so one round trip checks all queues."""
        names, now = sorted(self._acquired_locks), current_timestamp()
        with self.connection.pipeline(transaction=False) as look:
            for name in names:
                look.zcount(registry_key("scheduled", name), "-inf", now)
            due = [name for name, num_jobs in zip(names, look.execute(), strict=True) if num_jobs]
        for name in due:
            self._enqueue_due(name, now)

    def _enqueue_due(self, name: str, now: int) -> None:
        """Enqueue a queue's due jobs in a watched transaction: RQ would enqueue jobs that were cancelled meanwhile, or
        enqueued by another scheduler."""
        registry = ScheduledJobRegistry(name, connection=self.connection, serializer=self.serializer)
        queue = Queue(name, connection=self.connection, serializer=self.serializer)
        ids = registry.get_jobs_to_schedule(now)
        if not ids:
            return
        jobs = Job.fetch_many(ids, connection=self.connection, serializer=self.serializer)
        with self.connection.pipeline() as pipe:
            pipe.watch(*map(job_key, ids))
            scores = pipe.zmscore(registry.key, ids)
            pipe.multi()
            for job_id, job, score in zip(ids, jobs, scores, strict=True):
                if score is None:
                    continue
                registry.remove(job_id, pipeline=pipe)
                if job is not None:
                    enqueue = queue._enqueue_rate_limited_job if job.has_rate_limit else queue._enqueue_job
                    enqueue(job, pipeline=pipe, at_front=job.should_enqueue_at_front())
            with suppress(WatchError):  # the next turn reads them again
                pipe.execute()
