"""The API keys of Redis, as this process last saw them: each is looked up at most every five seconds.

While Redis is away, a key that was seen stays valid. It gives access only to this process's metrics then.
"""

import time

from producer.async_transport import AsyncTransport
from producer.errors import RedisUnavailableError
from producer.gateway.api_keys import ApiKey, has_keys, is_secret_of, read_key, split_key

CACHE_SECONDS = 5.0  # how long a key that was revoked may still be taken
MAX_CACHED_KEYS = 10_000


class KeyRing:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis
        self._seen: dict[str, tuple[float, ApiKey | None]] = {}
        self._any: tuple[float, bool] | None = None

    async def find(self, text: str) -> ApiKey | None:
        """The key with this text, if there is one. Raises RedisUnavailableError."""
        parts = split_key(text)
        if parts is None:
            return None
        key = await self._read(parts[0])
        return key if key is not None and is_secret_of(key, parts[1]) else None

    async def is_empty(self) -> bool:
        """Raises RedisUnavailableError."""
        if self._any is None or time.monotonic() >= self._any[0]:
            try:
                has_any = await self._redis.run(has_keys())
            except RedisUnavailableError:
                if self._any is None:
                    raise
                return not self._any[1]
            self._any = (time.monotonic() + CACHE_SECONDS, has_any)
        return not self._any[1]

    async def _read(self, key_id: str) -> ApiKey | None:
        fresh_until, seen = self._seen.get(key_id, (0.0, None))
        if time.monotonic() < fresh_until:
            return seen
        try:
            key = await self._redis.run(read_key(key_id))
        except RedisUnavailableError:
            if seen is None:
                raise
            return seen
        if len(self._seen) >= MAX_CACHED_KEYS:
            self._seen.clear()
        self._seen[key_id] = (time.monotonic() + CACHE_SECONDS, key)
        return key
