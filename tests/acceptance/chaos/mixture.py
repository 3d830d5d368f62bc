"""Jobs that ask for more than a plain run: dependents, Retry, rate limits, deadlines, cancels, idempotency keys. From a
seed, each with what may become of it."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from rq import Repeat, Retry
from rq.job import Dependency, Job
from rq.rate_limit import RateLimit

from producer import Client, RedisUnavailableError
from producer.contract import keys
from tests.fakes.worker_runs import FUNCTION, rq_queue

QUEUES = (
    keys.DEFAULT_QUEUE,
    keys.DEFAULT_QUEUE,
    keys.class_queue(keys.DEFAULT_QUEUE, "high"),
    keys.tenant_queue(keys.DEFAULT_QUEUE, "acme"),
    keys.tenant_queue(keys.class_queue(keys.DEFAULT_QUEUE, "low"), "zeta"),
)
REFUSED = ""  # as a prompt: the job fails at once
MAX_CANCEL_SECONDS = 3.0
PRODUCERS = 4
MANY = 60


class Mixture:
    """`enqueue_some`, and then `cancels` are to be carried out: seconds from now, and which job."""

    def __init__(self, connection: redis.Redis, client: Client, seed: int) -> None:
        """`client` may lose replies; `connection` may not: plain RQ enqueues once more what it got no answer for."""
        self._connection = connection
        self._client = client
        self._rng = random.Random(f"mixture of {seed}")
        self.expected: dict[str, set[str]] = {}
        """By job id, the outcomes that are right."""
        self.kinds: dict[str, str] = {}
        """By job id, what it is one of."""
        self.forgotten: set[str] = set()
        """Jobs of which RQ is to keep nothing."""
        self.num_runs: dict[str, int] = {}
        """Of those that run more than once."""
        self.cancels: list[tuple[float, str]] = []

    def enqueue_some(self, number: int) -> None:
        for _ in range(number):
            kind = self._rng.choice(KINDS)
            kind(self)
            self.kinds |= {job_id: kind.__name__ for job_id in self.expected.keys() - self.kinds.keys()}

    def _enqueue(self, *statuses: str, **options: Any) -> Job:
        rng = self._rng
        given = {"prompt": f"Job {rng.random()}", "max_tokens": rng.randint(1, 30), "n": rng.choice((1, 1, 2))}
        job = rq_queue(self._connection, rng.choice(QUEUES)).enqueue(FUNCTION, **given | options)
        self.expected[job.id] = set(statuses) or {"finished"}
        return job

    def _cancel_later(self, job: Job) -> None:
        self.cancels.append((self._rng.uniform(0.0, MAX_CANCEL_SECONDS), job.id))

    def plain(self) -> None:
        self._enqueue()

    def chain(self) -> None:
        job = self._enqueue()
        for _ in range(self._rng.randint(1, 4)):
            job = self._enqueue(depends_on=job)

    def fan(self) -> None:
        first = self._enqueue()
        self._enqueue(depends_on=[self._enqueue(depends_on=first) for _ in range(self._rng.randint(1, 5))])

    def after_failure(self) -> None:
        retry = self._rng.choice((None, Retry(max=1)))
        first = self._enqueue("failed", prompt=REFUSED, retry=retry)
        self._enqueue(depends_on=Dependency(jobs=[first], allow_failure=True))

    def failing(self) -> None:
        retry = self._rng.choice((None, Retry(max=2), Retry(max=2, interval=1)))
        self._enqueue("failed", prompt=REFUSED, retry=retry)

    def limited(self) -> None:
        limit = RateLimit(f"limit{self._rng.randint(0, 1)}", 2)
        self._enqueue(rate_limit=limit)
        self._enqueue("failed", prompt=REFUSED, rate_limit=limit)
        self._cancel_later(self._enqueue("finished", "cancelled", max_tokens=500, rate_limit=limit))

    def with_deadline(self) -> None:
        deadline = time.time() + self._rng.uniform(0.1, 2.0)
        self._enqueue("finished", "failed", max_tokens=200, deadline=deadline)

    def cancelled(self) -> None:
        self._cancel_later(self._enqueue("finished", "cancelled", max_tokens=self._rng.choice((300, 3000))))

    def repeated(self) -> None:
        """Each run ends for itself; what waits for it waits for the first."""
        interval = self._rng.choice((0, 1))
        job = self._enqueue(repeat=Repeat(times=self._rng.randint(1, 2), interval=interval))
        self.num_runs[job.id] = 1 + int(job.repeats_left or 0)
        self._enqueue(depends_on=job)

    def kept_nowhere(self) -> None:
        self.forgotten.add(self._enqueue(result_ttl=0).id)

    def submitted_at_once(self) -> None:
        """By several producers under one key, each of them twice."""
        fields = {"prompt": "Hello", "max_tokens": 5, "idempotency_key": f"key {len(self.expected)}"}
        with ThreadPoolExecutor(PRODUCERS) as pool:
            told = list(pool.map(lambda _: self._submit_many([fields]), range(2 * PRODUCERS)))
        assert len(set(map(tuple, told))) == 1, told

    def many(self) -> None:
        """Their producer may be cut off amid them, and submits all of them again; and once more."""
        number = len(self.expected)
        requests = [
            {"prompt": "Hello", "max_tokens": 2, "idempotency_key": f"many {number} {at}"} for at in range(MANY)
        ]
        assert self._submit_many(requests) == self._submit_many(requests)

    def _submit_many(self, requests: list[dict[str, Any]]) -> list[str]:
        while True:
            try:
                ids = [job.id for job in self._client.submit_many(requests)]
                break
            except RedisUnavailableError:
                continue
        self.expected |= {job_id: {"finished"} for job_id in ids}
        return ids


KINDS: tuple[Callable[[Mixture], None], ...] = (
    *[Mixture.plain] * 6,
    *[Mixture.chain, Mixture.fan, Mixture.after_failure, Mixture.failing, Mixture.limited],
    *[Mixture.with_deadline, Mixture.cancelled, Mixture.kept_nowhere, Mixture.submitted_at_once, Mixture.many],
    Mixture.repeated,
)
