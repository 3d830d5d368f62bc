"""The API keys of Redis, as this process last saw them: each is looked up at most every five seconds."""

import time

from producer.async_transport import AsyncTransport
from producer.gateway.api_keys import ApiKey, has_keys, is_secret_of, read_key, split_key

CACHE_SECONDS = 5.0  # how long a key that was revoked may still be taken
MAX_CACHED_KEYS = 10_000


class KeyRing:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis
        self._seen: dict[str, tuple[float, ApiKey | None]] = {}
        self._any: tuple[float, bool] = (0.0, False)

    async def find(self, text: str) -> ApiKey | None:
        """The key that this text is. Raises RedisUnavailableError."""
        parts = split_key(text)
        if parts is None:
            return None
        key = await self._read(parts[0])
        return key if key is not None and is_secret_of(key, parts[1]) else None

    async def is_empty(self) -> bool:
        fresh_until, has_any = self._any
        if time.monotonic() >= fresh_until:
            has_any = await self._redis.run(has_keys())
            self._any = (time.monotonic() + CACHE_SECONDS, has_any)
        return not has_any

    async def _read(self, key_id: str) -> ApiKey | None:
        fresh_until, key = self._seen.get(key_id, (0.0, None))
        if time.monotonic() >= fresh_until:
            if len(self._seen) >= MAX_CACHED_KEYS:
                self._seen.clear()
            key = await self._redis.run(read_key(key_id))
            self._seen[key_id] = (time.monotonic() + CACHE_SECONDS, key)
        return key
