"""What the live workers say about themselves, and which queue a model's jobs go to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from producer.contract import ErrorCode, WorkerInfo, keys
from producer.errors import InvalidJobError
from producer.operations import Protocol, Script, send, slices
from producer.rq_names import QUEUES_KEY, REGISTRIES, job_key, parse_time, queue_key, registry_key

MAX_QUEUES_A_READ = 500  # 4,500 commands to Redis: a few milliseconds
_OF_INTEREST = ("started", "failed", "deferred", "scheduled")
CACHE_SECONDS = 5.0  # how long a client trusts what it last read when it resolves a model


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Numbers of jobs: on the queue's list, and in each of RQ's registries by name (`started`, `finished`, …).

    `oldest_seconds`: how long the job that is next has been waiting; None where none waits, or it does not say.
    """

    name: str
    depth: int
    registries: dict[str, int]
    oldest_seconds: float | None = None

    @property
    def is_at_rest(self) -> bool:
        """Whether it is a tenant's of which no job waits, runs or has failed: the records of its last jobs, which are
        kept for a day, are all it has. People are shown how many such there are: thousands would hide the others."""
        is_tenants = keys.split_tenant(self.name)[1] is not None
        return is_tenants and not self.depth and not any(self.registries[name] for name in _OF_INTEREST)


def read_workers() -> Protocol[list[WorkerInfo]]:
    """The workers whose entry has not expired, by name."""
    [seconds, _], names = yield from send(("TIME",), ("ZRANGE", keys.WORKERS_KEY, 0, -1, "WITHSCORES"))
    scored = zip(names[::2], names[1::2], strict=True)
    live = sorted(name.decode() for name, expires_at in scored if float(expires_at) > int(seconds))
    if not live:
        return []
    values = yield from send(*(("GET", keys.worker_key(name)) for name in live))
    return [info for info in (_parse(value) for value in values) if info is not None]


def was_served(model: str) -> Protocol[bool]:
    """Whether a worker, dead or alive, has served it within `MODEL_TTL_SECONDS`: another one may come for it."""
    [served_at] = yield from send(("ZSCORE", keys.MODELS_KEY, model))
    return served_at is not None


def _parse(value: bytes | None) -> WorkerInfo | None:
    """None for an entry of a newer contract, or of none."""
    try:
        return WorkerInfo.model_validate_json(value) if value is not None else None
    except ValidationError:
        return None


def choose_queue(workers: Sequence[WorkerInfo], model: str, queue: str) -> str | None:
    """`queue` itself if one of the workers on it serves `model`, else a queue of one that does; None: nobody does."""
    queues = [name for worker in workers if model in worker.models for name in worker.queues]
    if not queues or queue in queues:
        return queue if queues else None
    classes = tuple(f":{name}" for name in keys.PRIORITY_CLASSES if name)
    return next((name for name in queues if not name.endswith(classes)), queues[0])


def drains(workers: Sequence[WorkerInfo], queue: str, model: str | None) -> bool:
    """Whether one of them takes such jobs off `queue`; of a tenant's queue, off the one that it belongs to."""
    base, _ = keys.split_tenant(queue)
    return any(base in worker.queues and model in (None, *worker.models) for worker in workers)


class ModelDirectory:
    """Resolves a model's name to the queue of a worker that serves it."""

    def __init__(self) -> None:
        self._workers: list[WorkerInfo] = []
        self._read_at: float | None = None

    def find_queue(self, model: str, queue: str) -> Protocol[str]:
        """`queue` itself if a worker on it serves `model`, or if no worker is alive: the worker checks then.

        Raises InvalidJobError if workers are alive and none serves it.
        """
        found = choose_queue(self._workers, model, queue) if self._is_fresh else None
        if found is None:  # before a refusal, always with fresh eyes
            yield from self._look()
            found = choose_queue(self._workers, model, queue)
        if found is not None:
            return found
        if not self._workers:
            return queue
        served = sorted({name for worker in self._workers for name in worker.models})
        raise InvalidJobError(
            f"model: no live worker serves {model!r}; served are: {', '.join(served) or 'none'}",
            param="model",
            code=ErrorCode.MODEL_NOT_FOUND,
        )

    def is_drained(self, queue: str, model: str | None) -> Protocol[bool]:
        """As `drains`, of the live workers."""
        if not self._is_fresh:
            yield from self._look()
        return drains(self._workers, queue, model)

    @property
    def _is_fresh(self) -> bool:
        return self._read_at is not None and time.monotonic() - self._read_at < CACHE_SECONDS

    def _look(self) -> Protocol[None]:
        self._workers = yield from read_workers()
        self._read_at = time.monotonic()


def read_queues(default_queue: str) -> Protocol[list[QueueStatus]]:
    """The queues that jobs of ours may lie on: the default one's classes, every one a live worker listens to, and those
    of their tenants that have jobs, or had some of late."""
    queues, named = yield from _read_names(default_queue)
    prefixes = [queue_key(""), *(registry_key(registry, "") for registry in REGISTRIES)]
    rows: list[tuple[str, bytes | None, list[int]]] = []
    for page in slices(queues, MAX_QUEUES_A_READ):
        [_, found] = yield from send(_COUNT.load, _COUNT.call([], [len(prefixes), *prefixes, *page]))
        full = {int(at): (first, counts) for at, first, *counts in found}
        for at, name in enumerate(page, start=1):
            if at in full or name in named:
                rows.append((name, *full.get(at, (None, [0] * len(prefixes)))))
    ages = yield from _read_ages([first.decode() for _, first, _ in rows if first])
    return [
        QueueStatus(name, depth, dict(zip(REGISTRIES, registries, strict=True)), ages.get(first) if first else None)
        for name, first, (depth, *registries) in rows
    ]


def read_queue_names(default_queue: str) -> Protocol[list[str]]:
    """The names of the queues that `read_queues` looks at."""
    names, _ = yield from _read_names(default_queue)
    return names


def _read_names(default_queue: str) -> Protocol[tuple[list[str], set[str]]]:
    """All names, and those that are shown even without a job."""
    workers = yield from read_workers()
    [known] = yield from send(("SMEMBERS", QUEUES_KEY))
    named = {name for worker in workers for name in worker.queues} | set(keys.class_queues(default_queue))
    prefix = queue_key("")
    existing = {name.decode().removeprefix(prefix) for name in known}
    names = sorted(name for name in existing | {default_queue} if name in named or keys.split_tenant(name)[0] in named)
    return names, named


def _read_ages(job_ids: Sequence[str]) -> Protocol[dict[bytes, float]]:
    """Seconds since the jobs were enqueued, by id."""
    if not job_ids:
        return {}
    fields = (("HMGET", job_key(job_id), "enqueued_at", "created_at") for job_id in job_ids)
    [seconds, microseconds], *times = yield from send(("TIME",), *fields)
    now = int(seconds) + int(microseconds) / 1e6
    since = {
        job_id: parse_time(enqueued) or parse_time(created)
        for job_id, (enqueued, created) in zip(job_ids, times, strict=True)
    }
    return {job_id.encode(): max(0.0, now - at) for job_id, at in since.items() if at is not None}


# Of each queue that holds anything: its place among the names, its first job and how many are on it and in registries.
_COUNT = Script("""
local num_prefixes = tonumber(ARGV[1])
local found = {}
for i = num_prefixes + 2, #ARGV do
  local queue = ARGV[2] .. ARGV[i]
  local row = {i - num_prefixes - 1, redis.call('LINDEX', queue, 0) or '', redis.call('LLEN', queue)}
  local sum = row[3]
  for registry = 3, num_prefixes + 1 do
    row[registry + 1] = redis.call('ZCARD', ARGV[registry] .. ARGV[i])
    sum = sum + row[registry + 1]
  end
  if sum > 0 then found[#found + 1] = row end
end
return found
""")
