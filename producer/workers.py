"""What the live workers say about themselves, and which queue a model's jobs go to."""

import time
from collections.abc import Sequence

from pydantic import ValidationError

from producer.contract import ErrorCode, WorkerInfo, keys
from producer.errors import InvalidJobError
from producer.operations import Protocol, send

CACHE_SECONDS = 5.0  # how long a client trusts what it last read when it resolves a model


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
    """Whether a worker, dead or alive, has served it within `MODEL_TTL_SECONDS`, or began to load it: one may come."""
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


def max_request_bytes(workers: Sequence[WorkerInfo], model: str) -> int | None:
    """The most that one of those that serve the model takes. None: nobody says."""
    limits = [worker.max_request_bytes for worker in workers if model in worker.models]
    return None if None in limits else max(filter(None, limits), default=None)


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
