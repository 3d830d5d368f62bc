"""Transactions that take effect only while a job's fence holds, so that a worker that lost its job commits nothing.

A fence is a Redis key that names the only execution of a job that may write. Knows nothing about RQ: RQ's handlers get
a `FencedRedis` as their connection, and so commit through it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import redis
from redis.client import Pipeline

from worker.errors import LeaseLostError


class FencedPipeline(Pipeline):
    """`execute()` does WATCH on the fence, compares it, then EXEC. What `epilogue` adds is in the same transaction."""

    def __init__(self, *args: Any, owner: "FencedRedis") -> None:
        super().__init__(*args)
        self._owner = owner

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Raises LeaseLostError if another execution holds the fence or the job, WatchError if that changes
        meanwhile."""
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
        """Do the reads before the transaction. The buffered commands come after those that `prologue` adds."""
        buffered, self.command_stack = self.command_stack, []
        self.explicit_transaction = False  # the next commands are sent at once
        self.watch(self._owner.fence_key, *self._owner.watched)  # type: ignore[no-untyped-call]
        held = self.get(self._owner.fence_key)
        if held != self._owner.fence.encode() or self._owner.is_void(self):
            raise LeaseLostError(self._owner.job_id)
        self._owner.prologue(self)
        self.command_stack = [*self.command_stack, *buffered]
        self.explicit_transaction = True


class FencedRedis(redis.Redis):
    """A connection for one commit of one job. `error` is the commit's exception, if any.

    `watched`: further keys that must not change, from before `is_void` is called. That reads whether the outcome no
    longer fits the job's state, although the fence is held. `prologue` gets the pipeline before MULTI: keys that it
    watches must not change, and after `multi()` it adds commands.
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
