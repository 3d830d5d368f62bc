"""Which models are served, by whom, and on which queue: what the live workers say, read at most once a second.

A model that no worker has served of late is not found (404). One that was served, or is being loaded, or any model
while no worker is alive, is unavailable (503): trying again later makes sense.
"""

import time
from http import HTTPStatus

from producer.async_transport import AsyncTransport
from producer.contract import ErrorCode, WorkerInfo
from producer.gateway.errors import ApiError
from producer.workers import choose_queue, read_workers, was_served

CACHE_SECONDS = 1.0
RETRY_AFTER_SECONDS = 5.0


class ModelCatalog:
    def __init__(self, redis: AsyncTransport, default_queue: str) -> None:
        self._redis = redis
        self._default_queue = default_queue
        self._workers: list[WorkerInfo] = []
        self._fresh_until = 0.0

    async def workers(self) -> list[WorkerInfo]:
        """The live workers. Raises RedisUnavailableError."""
        if time.monotonic() >= self._fresh_until:
            self._workers = await self._redis.run(read_workers())
            self._fresh_until = time.monotonic() + CACHE_SECONDS
        return self._workers

    async def models(self) -> dict[str, list[WorkerInfo]]:
        """The workers of each model, by its name."""
        models: dict[str, list[WorkerInfo]] = {}
        for worker in await self.workers():
            for name in worker.models:
                models.setdefault(name, []).append(worker)
        return dict(sorted(models.items()))

    async def find_queue(self, model: str) -> str:
        """The queue of a live worker that serves the model. Raises ApiError."""
        queue = choose_queue(await self.workers(), model, self._default_queue)
        if queue is not None:
            return queue
        if not self._workers or await self._redis.run(was_served(model)):
            what = f"no worker that serves {model!r} is alive" if self._workers else "no worker is alive"
            raise ApiError(
                HTTPStatus.SERVICE_UNAVAILABLE,
                "no_worker",
                f"{what}; nothing was enqueued, try again later",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        raise not_found(model, list(await self.models()))


def not_found(model: str, served: list[str]) -> ApiError:
    """The error for an unknown model. `served`: the models that the caller may use."""
    message = f"model: {model!r:.200} is not served here; served are: {', '.join(served) or 'none'}"
    return ApiError(HTTPStatus.NOT_FOUND, ErrorCode.MODEL_NOT_FOUND, message, param="model")
