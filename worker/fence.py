"""Transactions that take effect only while a job's fence holds, so that a worker that lost its job commits nothing.

A fence is a Redis key that names the one execution of a job that may write. Knows nothing of RQ: RQ's handlers are
given a `FencedRedis` as their connection, and so commit through it.
"""

from collections.abc import Callable, Sequence
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
        """Raises LeaseLostError if the fence is another's now, or its job is, WatchError if that happens meanwhile."""
        owner = self._owner
        try:
            self._look()
            owner.epilogue(self)
            replies = super().execute(raise_on_error)
        except Exception as error:
            owner.error = error  # RQ's failure handler swallows what execute() raises
            raise
        return list(replies)

    def _look(self) -> None:
        """What has to be known before the transaction; what is buffered goes behind what that adds to it."""
        buffered, self.command_stack = self.command_stack, []
        self.explicit_transaction = False  # what follows is sent at once
        self.watch(self._owner.fence_key, *self._owner.watched)  # type: ignore[no-untyped-call]
        held = self.get(self._owner.fence_key)
        if held != self._owner.fence.encode() or self._owner.is_void(self):
            raise LeaseLostError(self._owner.job_id)
        self._owner.prologue(self)
        self.command_stack = [*self.command_stack, *buffered]
        self.explicit_transaction = True


class FencedRedis(redis.Redis):
    """A connection for one commit of one job. `error` is what the commit raised, if it did.

    `watched`: keys that must not change either, from before `is_void` is asked, which tells by what it reads that the
    fence is held for nothing: what became of the job since does not go with this outcome.
    `prologue` is given the pipeline while it reads: what it watches must not change, and after `multi()` it adds to the
    transaction.
    """

    def __init__(
        self,
        pool: redis.ConnectionPool,
        *,
        job_id: str,
        fence_key: str,
        fence: str,
        epilogue: Callable[[Pipeline], None],
        watched: Sequence[str] = (),
        is_void: Callable[[Pipeline], bool] = lambda pipe: False,
    ) -> None:
        super().__init__(connection_pool=pool)
        self.job_id = job_id
        self.fence_key = fence_key
        self.fence = fence
        self.epilogue = epilogue
        self.watched = watched
        self.is_void = is_void
        self.prologue: Callable[[Pipeline], object] = lambda pipe: None
        self.error: Exception | None = None

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> FencedPipeline:
        return FencedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint, owner=self)
