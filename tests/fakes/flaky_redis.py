"""A Redis client whose pipelines can be told to fail: before anything was sent, or after all was done."""

from typing import Any

import redis
from redis.client import Pipeline


class FlakyRedis(redis.Redis):
    """Raises ConnectionError in as many of the next pipelines as `lost_requests`, then `lost_replies`, say."""

    lost_requests = 0
    lost_replies = 0
    num_pipelines = 0

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> "FlakyPipeline":
        return FlakyPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint, owner=self)


class FlakyPipeline(Pipeline):
    def __init__(self, *args: Any, owner: FlakyRedis) -> None:
        super().__init__(*args)
        self._owner = owner

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        owner = self._owner
        owner.num_pipelines += 1
        if owner.lost_requests:
            owner.lost_requests -= 1
            raise redis.ConnectionError("the request was lost")
        replies = super().execute(raise_on_error)
        if owner.lost_replies:
            owner.lost_replies -= 1
            raise redis.ConnectionError("the reply was lost")
        return list(replies)
