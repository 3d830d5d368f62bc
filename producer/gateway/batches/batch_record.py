"""A batch as Redis has it, and as OpenAI's clients see it. Knows no connection."""

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

COMPLETION_WINDOW = "24h"

# validating ─┬─ in_progress ── finalizing ── completed
#             ├─ failed   (from in_progress too: an input that cannot be read any more)
#             ├─ expired  (from in_progress too)
#             └─ cancelling ── cancelled  (from in_progress too)


class BatchStatus(StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)


class BatchProblem(BaseModel):
    """Why a batch failed. `line`: the number of the input line at fault, if it is one line."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchUsage(BaseModel):
    """Tokens of all answers so far."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def to_body(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


class BatchRecord(BaseModel):
    """Times are epoch seconds. Its fields, flat, are those of the hash in Redis; what is not there yet is None."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    key_id: str | None  # of the API key whose batch it is; None: no key was needed
    tenant: str | None
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    output_expires_after: int | None  # seconds
    created_at: int
    expires_at: int
    status: BatchStatus
    model: str | None = None
    queue: str | None = None
    problems: list[BatchProblem] = []
    num_lines: int = 0
    num_completed: int = 0
    num_failed: int = 0
    usage: BatchUsage = Field(default_factory=BatchUsage)
    output_file_id: str | None = None
    error_file_id: str | None = None
    unserved_since: int | None = None
    unreadable_since: int | None = None
    unwritable_since: int | None = None
    uncarried_since: int | None = None  # set when the record is read: the end of the last lease
    awaited_model: str | None = None  # that the input names, while no worker serves it
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @classmethod
    def parse(cls, batch_id: str, values: Mapping[bytes, bytes]) -> Self:
        """From the reply to HGETALL."""
        fields = {name.decode(): value.decode() for name, value in values.items()}
        given = {name: value for name, value in fields.items() if value != ""}
        optional = {name: given.get(name) for name in ("key_id", "tenant", "output_expires_after")}
        decoded = {name: json.loads(given.get(name, "null")) for name in ("metadata", "problems")}
        own = {"id": batch_id, "usage": given, **optional, **decoded, "problems": decoded["problems"] or []}
        return cls.model_validate({**given, **own})

    @property
    def new_fields(self) -> list[str | int]:
        """The fields of a new batch, as HSET takes them."""
        fields = {
            "key_id": self.key_id or "",
            "tenant": self.tenant or "",
            "endpoint": self.endpoint,
            "input_file_id": self.input_file_id,
            "metadata": "" if self.metadata is None else json.dumps(self.metadata),
            "output_expires_after": self.output_expires_after or "",
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "status": self.status.value,
        }
        return [part for field in fields.items() for part in field]

    def to_body(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        errors = [problem.model_dump() for problem in (*self.problems, *self._obstacles())]
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": COMPLETION_WINDOW,
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": {
                "total": self.num_lines,
                "completed": self.num_completed,
                "failed": self.num_failed,
            },
            "usage": self.usage.to_body(),
            "metadata": self.metadata,
        }

    def _obstacles(self) -> list[BatchProblem]:
        """What the batch waits for, in words for its owner; the log says more."""
        if self.status.has_ended:
            return []
        found: list[BatchProblem] = []
        if self.uncarried_since is not None:
            rule = "every gateway carries as many batches as it can: this one's turn comes when one of those has ended"
            found.append(BatchProblem(code="no_carrier", message=rule))
        if self.unserved_since is not None:
            rule = f"no live worker serves {self.awaited_model!r}: the batch waits for one, and fails if none comes"
            found.append(BatchProblem(code="no_worker", message=f"body.model: {rule}", param="body.model"))
        if self.unreadable_since is not None:
            rule = "the input file cannot be read now: it is tried again, and the batch ends if that stays so"
            found.append(BatchProblem(code="file_store_error", message=rule, param="input_file_id"))
        if self.unwritable_since is not None:
            rule = "the file store is away: answers are kept, and the batch goes on, or ends, once it is back"
            found.append(BatchProblem(code="file_store_error", message=rule))
        return found
