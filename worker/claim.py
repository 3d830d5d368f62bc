"""A job as a worker holds it: what the claim returned, and the fence that its outcome is written under."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from redis.client import Pipeline

from producer.contract.keys import fence_key
from producer.rq_names import job_key
from worker.redis_client import execute_each
from worker.scripts import CLAIMED_FIELD, CRASHES_FIELD

RECORD_FIELDS = ("status", CLAIMED_FIELD)  # of RQ's record, by which a job is told from another of its id
SUSPECT_CRASHES = 2  # in a row without a new token: the job runs alone
MAX_CRASHES = 3  # in a row without a new token: the job is poison
MAX_ALL_CRASHES = 10  # with new tokens in between


def is_replaced(rq_says: list[bytes | None] | Exception) -> bool:
    """Whether the job was deleted, and another has its id, by that one's RECORD_FIELDS; an error: it is no hash."""
    if isinstance(rq_says, Exception):
        return False
    rq_status, is_claimed = rq_says
    return rq_status not in (None, b"canceled") and not is_claimed


def read_standing(pipe: Pipeline, job_ids: Sequence[str]) -> tuple[list[bytes | None], list[Any], list[Any]]:
    """What tells whose the jobs are, in one round trip: the value of each one's fence, and RQ's RECORD_FIELDS of it or
    the error that its key gave. Then the replies to what was in `pipe`, which is no transaction, before.

    Raises what Redis raises, also where the right to read fences is gone: that says nothing of whose the jobs are.
    """
    pipe.mget([fence_key(job_id) for job_id in job_ids])
    for job_id in job_ids:
        pipe.hmget(job_key(job_id), *RECORD_FIELDS)
    replies = execute_each(pipe)
    at = len(replies) - len(job_ids) - 1
    fences = replies[at]
    if isinstance(fences, Exception):
        raise fences
    return fences, replies[at + 1 :], replies[:at]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One attempt at one job."""

    job_id: str
    queue: str
    attempt: int
    execution_id: str
    is_resumable: bool
    """Put back by the sweeper or a hand-over, not by RQ, or held by the sweeper: what its stream holds counts."""
    fields: dict[bytes, bytes]
    """RQ's hash of the job; empty if the job was deleted."""
    claimed_at: float
    """Epoch seconds."""

    @classmethod
    def parse(cls, reply: Sequence[Any], claimed_at: float) -> Self:
        """From the form that `Scripts.claim` and `Scripts.sweep` return."""
        job_id, queue, attempt, execution_id, resumable, flat = reply
        return cls(
            job_id=job_id.decode(),
            queue=queue.decode(),
            attempt=int(attempt),
            execution_id=execution_id.decode(),
            is_resumable=bool(int(resumable or 0)),
            fields=dict(zip(flat[::2], flat[1::2], strict=True)),
            claimed_at=claimed_at,
        )

    @property
    def is_orphan(self) -> bool:
        """Cancelled or deleted already: it is held only because nobody else will write its outcome."""
        return self.fields.get(b"status") in (None, b"canceled")

    @property
    def num_crashes(self) -> int:
        """Workers that died with the job, one after the other, each without a new token."""
        return self._crashes()[0]

    @property
    def num_all_crashes(self) -> int:
        """The same, with those that died after new tokens."""
        return self._crashes()[1]

    @property
    def is_suspect(self) -> bool:
        return self.num_crashes >= SUSPECT_CRASHES

    @property
    def is_poison(self) -> bool:
        return self.num_crashes >= MAX_CRASHES or self.num_all_crashes >= MAX_ALL_CRASHES

    def _crashes(self) -> tuple[int, int]:
        found = re.fullmatch(rb"(\d{1,9}):(\d{1,9})", self.fields.get(CRASHES_FIELD.encode(), b""))
        return (int(found[1]), int(found[2])) if found else (0, 0)

    @property
    def fence(self) -> str:
        return f"{self.attempt}:{self.execution_id}"
