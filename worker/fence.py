"""Transactions that take effect only while a fence holds: an outcome of a worker that lost its job is dropped.

Knows nothing of RQ: its handlers are given a `FencedRedis` as their connection and commit through it.
"""

from collections.abc import Callable
from typing import Any

import redis
from redis.client import Pipeline

from worker.errors import LeaseLostError


class FencedPipeline(Pipeline):
    """`execute()` is WATCH fence, compare, EXEC; what `epilogue` adds takes effect together with the rest."""

    def __init__(self, *args: Any, owner: "FencedRedis") -> None:
        super().__init__(*args)
        self._owner = owner

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Raises LeaseLostError if the fence is another's now, WatchError if that happens meanwhile."""
        owner = self._owner
        try:
            self._check_fence()
            owner.epilogue(self)
            replies = super().execute(raise_on_error)
        except Exception as error:
            owner.error = error  # RQ's failure handler swallows what execute() raises
            raise
        owner.has_committed = True
        return list(replies)

    def _check_fence(self) -> None:
        self.explicit_transaction = False  # watch() and get() are sent at once, what is buffered stays buffered
        self.watch(self._owner.fence_key)  # type: ignore[no-untyped-call]
        held = self.get(self._owner.fence_key)
        if held != self._owner.fence.encode():
            raise LeaseLostError(self._owner.job_id)
        self.explicit_transaction = True


class FencedRedis(redis.Redis):
    """A connection for one commit of one job. `has_committed` and `error` tell what became of it."""

    def __init__(
        self,
        pool: redis.ConnectionPool,
        *,
        job_id: str,
        fence_key: str,
        fence: str,
        epilogue: Callable[[Pipeline], None],
    ) -> None:
        super().__init__(connection_pool=pool)
        self.job_id = job_id
        self.fence_key = fence_key
        self.fence = fence
        self.epilogue = epilogue
        self.has_committed = False
        self.error: Exception | None = None

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> FencedPipeline:
        return FencedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint, owner=self)
