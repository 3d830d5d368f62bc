"""Jobs on their way back: leases that ended, what a worker gives back, and output that was stored.

Every worker sweeps. A sweep is one script, so that any number of sweepers put a job back once.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import redis
from pydantic import ValidationError

from producer.contract import Choice, Chunk, Done, FinishReason, Marker, Usage, keys, parse_entry
from worker.claim import Claim
from worker.scripts import Scripts

MAX_SWEPT = 1000  # jobs of one queue in one pass
MAX_GIVEN_BACK = 256  # jobs in one script run
MAX_INTERVAL_SECONDS = 1.0
SWEEPS_PER_LEASE = 5

_log = logging.getLogger(__name__)


class Sweeper:
    """Puts jobs whose lease has ended back to the front of their queues. One thread.

    `on_orphan` is given jobs that were cancelled or deleted while their worker died: this worker owes them an outcome.
    """

    def __init__(
        self,
        client: redis.Redis,
        scripts: Scripts,
        *,
        queues: Sequence[str],
        lease_seconds: float,
        on_orphan: Callable[[Claim], None],
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._queues = list(queues)
        self._lease_seconds = lease_seconds
        self._on_orphan = on_orphan
        self.interval_seconds = min(MAX_INTERVAL_SECONDS, lease_seconds / SWEEPS_PER_LEASE)
        self._last_pass_at: float | None = None
        self._blind_until = 0.0

    def sweep(self, now: float) -> None:
        """`now`: monotonic seconds. Raises what Redis raises; the next pass then waits, as after any gap.

        After a gap (Redis was away, or this worker slept) leases look ended whose holders only could not renew them:
        they get one full lease to come back.
        """
        if self._last_pass_at is None or now - self._last_pass_at > self._lease_seconds / 2:
            self._blind_until = now + self._lease_seconds
        self._client.ping()
        self._last_pass_at = now
        if now < self._blind_until:
            return
        for queue in self._queues:
            self._sweep_queue(queue)

    def _sweep_queue(self, queue: str) -> None:
        returned, orphans = self._scripts.sweep(
            self._client,
            queue=queue,
            lease_seconds=self._lease_seconds,
            max_jobs=MAX_SWEPT,
            execution_id=uuid4().hex,
        )
        for job_id in returned:
            _log.warning("action=job_returned job_id=%s queue=%s reason=lease_ended", job_id.decode(), queue)
        for orphan in orphans:
            claim = Claim.parse(orphan, time.time())
            _log.warning("action=orphan_adopted job_id=%s queue=%s", claim.job_id, queue)
            self._on_orphan(claim)


def give_back(client: redis.Redis, scripts: Scripts, claims: Sequence[Claim]) -> int:
    """Put jobs that are still ours back to the front of their queues, in the order of `claims`. Returns how many."""
    num_given = 0
    for end in range(len(claims), 0, -MAX_GIVEN_BACK):  # the newest first: each goes before those already there
        part = claims[max(0, end - MAX_GIVEN_BACK) : end]
        flat = [text for claim in part for text in (claim.queue, claim.job_id, claim.fence)]
        num_given += len(scripts.hand_over(client, jobs=flat))
    return num_given


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """What a job's stream holds: the output since its last reset, and its end, if it has one."""

    choices: list[Choice]
    usage: Usage
    done: Done | None


def read_stored_output(client: redis.Redis, job_id: str, *, cut_off: FinishReason) -> StoredOutput:
    """Join a job's stored entries. Choices that have no end get `cut_off`."""
    chunks: list[Chunk] = []
    done = None
    num_prompt_tokens = 0
    rows: list[Any] = client.xrange(keys.stream_key(job_id)) or []
    for _, fields in rows:
        entry = _parse(fields)
        if isinstance(entry, Marker):
            num_prompt_tokens = len(entry.prompt_token_ids or []) or num_prompt_tokens
            chunks, done = ([], None) if entry.reset else (chunks, done)
        elif isinstance(entry, Done):
            done = entry
        elif entry is not None:
            chunks.append(entry)
    choices = [Choice.join(index, chunks, cut_off=cut_off) for index in sorted({chunk.index for chunk in chunks})]
    num_output = sum(len(choice.token_ids) for choice in choices)
    usage = Usage(
        prompt_tokens=num_prompt_tokens, completion_tokens=num_output, total_tokens=num_prompt_tokens + num_output
    )
    return StoredOutput(choices, done.usage if done else usage, done)


def _parse(fields: dict[bytes, bytes]) -> Marker | Chunk | Done | None:
    """None for what is no entry of ours."""
    try:
        if (marker := fields.get(keys.MARKER_FIELD.encode())) is not None:
            return Marker.model_validate_json(marker)
        return parse_entry(fields.get(keys.DATA_FIELD.encode(), b""))
    except ValidationError:
        return None
