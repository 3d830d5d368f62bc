"""What the live workers say about themselves, and which queue a model's jobs go to."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from producer.contract import ErrorCode, WorkerInfo, keys
from producer.errors import InvalidJobError
from producer.operations import Command, Protocol, send
from producer.rq_names import QUEUES_KEY, REGISTRIES, queue_key, registry_key

CACHE_SECONDS = 5.0  # how long a client trusts what it last read when it resolves a model


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """Numbers of jobs: on the queue's list, and in each of RQ's registries by name (`started`, `finished`, …)."""

    name: str
    depth: int
    registries: dict[str, int]


def read_workers() -> Protocol[list[WorkerInfo]]:
    """The workers whose entry has not expired, by name."""
    [seconds, _], names = yield from send(("TIME",), ("ZRANGE", keys.WORKERS_KEY, 0, -1, "WITHSCORES"))
    live = sorted(name.decode() for name, expires_at in _pairs(names) if expires_at > int(seconds))
    if not live:
        return []
    values = yield from send(*(("GET", keys.worker_key(name)) for name in live))
    return [info for info in (_parse(value) for value in values) if info is not None]


def _pairs(replies: Sequence[object]) -> list[tuple[bytes, float]]:
    """Members and scores; replies to raw commands come flat."""
    flat = [part for reply in replies for part in (reply if isinstance(reply, (list, tuple)) else (reply,))]
    return [(member, float(score)) for member, score in zip(flat[::2], flat[1::2], strict=True)]


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


class ModelDirectory:
    """Resolves a model's name to the queue of a worker that serves it."""

    def __init__(self) -> None:
        self._workers: list[WorkerInfo] = []
        self._read_at: float | None = None

    def find_queue(self, model: str, queue: str) -> Protocol[str]:
        """`queue` itself if a worker on it serves `model`, or if no worker is alive: the worker checks then.

        Raises InvalidJobError if workers are alive and none serves it.
        """
        is_fresh = self._read_at is not None and time.monotonic() - self._read_at < CACHE_SECONDS
        found = choose_queue(self._workers, model, queue) if is_fresh else None
        if found is None:  # before a refusal, always with fresh eyes
            self._workers = yield from read_workers()
            self._read_at = time.monotonic()
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


def read_queues(default_queue: str) -> Protocol[list[QueueStatus]]:
    """The queues that jobs of ours may lie on: the default one's classes, every one a live worker listens to, and those
    of their tenants that have jobs, or had some of late."""
    workers = yield from read_workers()
    [known] = yield from send(("SMEMBERS", QUEUES_KEY))
    named = {name for worker in workers for name in worker.queues} | set(keys.class_queues(default_queue))
    prefix = queue_key("")
    existing = {name.decode().removeprefix(prefix) for name in known}
    queues = sorted(name for name in existing | {default_queue} if name in named or keys.split_tenant(name)[0] in named)
    commands: list[Command] = []
    for name in queues:
        commands.append(("LLEN", queue_key(name)))
        commands += [("ZCARD", registry_key(registry, name)) for registry in REGISTRIES]
    counts = yield from send(*commands)
    width = 1 + len(REGISTRIES)
    rows = [counts[at * width : (at + 1) * width] for at in range(len(queues))]
    return [
        QueueStatus(name, depth, dict(zip(REGISTRIES, registries, strict=True)))
        for name, (depth, *registries) in zip(queues, rows, strict=True)
        if name in named or depth or any(registries)
    ]
