"""A job as a worker holds it: what the claim returned, and the fence that its outcome is written under."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ValidationError

from producer.contract import Done


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One attempt at one job."""

    job_id: str
    queue: str
    attempt: int
    execution_id: str
    is_resumable: bool
    """Put back by the sweeper or a hand-over, not by RQ: what its stream holds counts."""
    done: Done | None
    """The stream's end, if an earlier attempt wrote it."""
    fields: dict[bytes, bytes]
    """RQ's hash of the job; empty if the job was deleted."""
    claimed_at: float
    """Epoch seconds."""

    @classmethod
    def parse(cls, reply: Sequence[Any], claimed_at: float) -> Self:
        """From the form that `Scripts.claim` and `Scripts.sweep` return."""
        job_id, queue, attempt, execution_id, resumable, done, flat = reply
        return cls(
            job_id=job_id.decode(),
            queue=queue.decode(),
            attempt=int(attempt),
            execution_id=execution_id.decode(),
            is_resumable=bool(int(resumable or 0)),
            done=_parse_done(done),
            fields=dict(zip(flat[::2], flat[1::2], strict=True)),
            claimed_at=claimed_at,
        )

    @property
    def is_orphan(self) -> bool:
        """Cancelled or deleted already: it is held only because nobody else will write its outcome."""
        return self.fields.get(b"status") in (None, b"canceled")

    @property
    def fence(self) -> str:
        return f"{self.attempt}:{self.execution_id}"


def _parse_done(data: bytes) -> Done | None:
    try:
        return Done.model_validate_json(data) if data else None
    except ValidationError:  # not written by us: the attempt starts over
        return None
