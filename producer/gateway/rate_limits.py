"""Requests and tokens a minute of each key, counted in Redis for all replicas together.

Two buckets a key, filled evenly over the minute. A request takes one request and as many tokens as it may come to, but
never more than a minute's; when it has ended, well or not, what it did not use is put back, or what it used beyond is
taken as well. If its end is not seen, the estimate stays taken; if Redis' reply is lost and the call is sent again, it
counts twice. The next minute corrects both.
"""

from http import HTTPStatus

from producer.async_transport import AsyncTransport
from producer.contract import JobRequest, Usage
from producer.gateway.api_keys import ApiKey
from producer.gateway.errors import ApiError
from producer.operations import Script

BUCKET_PREFIX = "promptmill:gateway:rate:"
CHARS_PER_TOKEN = 4  # of a prompt, before it is tokenised
UNKNOWN_OUTPUT_TOKENS = 256  # taken for an answer without max_tokens


class RateLimits:
    def __init__(self, redis: AsyncTransport) -> None:
        self._redis = redis

    async def take(self, key: ApiKey, num_tokens: int) -> int:
        """The tokens that were taken. Raises ApiError (429) with the seconds after which it would go through."""
        if key.tokens_per_minute is not None:
            num_tokens = min(num_tokens, key.tokens_per_minute)  # what asks for more goes through a full bucket
        wait_seconds, which = await self._call(key, num_requests=1, num_tokens=num_tokens, is_forced=False)
        if wait_seconds > 0:
            limit = key.requests_per_minute if which == "requests" else key.tokens_per_minute
            message = f"the key's limit of {limit} {which} a minute is reached; try again in {wait_seconds:.1f} s"
            raise ApiError(
                HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_exceeded", message, retry_after_seconds=wait_seconds + 0.5
            )
        return num_tokens

    async def settle(self, key: ApiKey, *, num_taken: int, usage: Usage) -> None:
        if key.tokens_per_minute is not None:
            await self._call(key, num_requests=0, num_tokens=usage.total_tokens - num_taken, is_forced=True)

    async def _call(self, key: ApiKey, *, num_requests: int, num_tokens: int, is_forced: bool) -> tuple[float, str]:
        arguments = [key.requests_per_minute or 0, key.tokens_per_minute or 0, num_requests, num_tokens, int(is_forced)]
        if not any(arguments[:2]):
            return 0.0, ""
        wait, which = await self._redis.run(_SCRIPT.run([BUCKET_PREFIX + key.id], arguments))
        return float(wait), which.decode()


def estimate_tokens(job: JobRequest) -> int:
    """An estimate of a job's tokens: its prompt, and the limit of every choice."""
    if job.to_embed:
        return sum(map(_count_tokens, job.to_embed))
    text = job.prompt if job.prompt is not None else "".join(message.text for message in job.messages or ())
    num_prompt = _count_tokens(text)
    num_output = job.max_tokens if job.max_tokens is not None else UNKNOWN_OUTPUT_TOKENS
    return num_prompt + num_output * job.n


def _count_tokens(prompt: str | list[int]) -> int:
    return len(prompt) if isinstance(prompt, list) else len(prompt) // CHARS_PER_TOKEN + 1


_SCRIPT = Script("""
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local held = redis.call('HMGET', KEYS[1], 'at', 'requests', 'tokens')
local elapsed = math.max(0, now - (tonumber(held[1]) or now))
local forced = ARGV[5] == '1'
local levels, wait, which = {}, 0, ''
for i, name in ipairs({'requests', 'tokens'}) do
  local limit, cost = tonumber(ARGV[i]), tonumber(ARGV[i + 2])
  if limit > 0 then
    local level = math.min(limit, (tonumber(held[i + 1]) or limit) + elapsed * limit / 60)
    if not forced and level < cost and (cost - level) * 60 / limit > wait then
      wait, which = (cost - level) * 60 / limit, name
    end
    levels[#levels + 1] = name
    levels[#levels + 1] = string.format('%.3f', math.min(limit, level - cost))
  end
end
if wait > 0 then return {string.format('%.3f', wait), which} end
redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now), unpack(levels))
redis.call('EXPIRE', KEYS[1], 3600)
return {'0', ''}
""")
