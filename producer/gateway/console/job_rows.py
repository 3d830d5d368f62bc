"""Jobs as the console shows them in lists: put together from RQ's records, ours, and how they ended."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from producer.async_transport import AsyncTransport
from producer.contract import keys
from producer.gateway.console.bodies import JobDetail, JobRow
from producer.gateway.console.ended_jobs import EndedJob, EndedJobs
from producer.gateway.job_records import JobRecord, JobRecords
from producer.operations import Command, send
from producer.outcome import parse_line, parse_status
from producer.rq_names import job_key, parse_time
from producer.stored_request import read_fields

_FIELDS = ("status", "origin", "description", "enqueued_at", "created_at", "started_at", "ended_at")
_DESCRIPTION = re.compile(re.escape(keys.JOB_FUNCTION) + r"\((?:prompt|messages|inputs)=(['\"]?)(.*?)\1\)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Record:
    """RQ's hash of a job, as far as it is shown."""

    status: str | None
    queue: str | None
    description: str | None
    enqueued_at: float | None
    started_at: float | None
    ended_at: float | None

    @property
    def has_ended(self) -> bool:
        """False for a job that was enqueued again: its earlier end does not count."""
        return self.status not in ("waiting", "queued", "running")


class JobRows:
    def __init__(self, redis: AsyncTransport, records: JobRecords, ended: EndedJobs) -> None:
        self._redis = redis
        self._records = records
        self._ended = ended

    async def read(self, job_ids: Sequence[str]) -> list[JobRow]:
        """In the order of the ids, without jobs of which nothing is left."""
        if not job_ids:
            return []
        commands: list[Command] = [("HMGET", job_key(job_id), *_FIELDS) for job_id in job_ids]
        replies = await self._redis.run(send(*commands))
        asked_for = await self._records.read_many(job_ids)
        rows = [
            _row(job_id, _parse(reply), record, self._ended.find(job_id))
            for job_id, reply, record in zip(job_ids, replies, asked_for, strict=True)
        ]
        return [row for row in rows if row is not None]

    async def read_detail(self, job_id: str) -> JobDetail | None:
        """None for a job of which nothing is left."""
        reply, data, wire = await self._redis.run(
            send(
                ("HMGET", job_key(job_id), *_FIELDS),
                ("HGET", job_key(job_id), "data"),
                ("GET", keys.result_key(job_id)),
            )
        )
        [asked_for] = await self._records.read_many([job_id])
        found, ended = _parse(reply), self._ended.find(job_id)
        result = parse_line(job_id, wire) if wire is not None and found.has_ended else None
        if result is not None:
            ended = EndedJob.from_line(result, found.queue or "", found.ended_at or 0.0)
        row = _row(job_id, found, asked_for, ended)
        if row is None:
            return None
        fields = read_fields(data)
        metadata = fields.get("metadata")
        return JobDetail(
            job=row,
            request={name: value for name, value in fields.items() if name not in ("v", "metadata")},
            metadata=metadata if isinstance(metadata, dict) else {},
            usage=result.usage if result is not None else None,
            stored=result.stored if result is not None else None,
        )


def _parse(reply: Sequence[bytes | None]) -> _Record:
    status, queue, description, enqueued_at, created_at, started_at, ended_at = reply
    return _Record(
        status=str(parse_status(status)) if status is not None else None,
        queue=_text(queue),
        description=_shown(_text(description)),
        enqueued_at=parse_time(enqueued_at) or parse_time(created_at),
        started_at=parse_time(started_at),
        ended_at=parse_time(ended_at),
    )


def _row(job_id: str, found: _Record, record: JobRecord | None, ended: EndedJob | None) -> JobRow | None:
    if found.status is None and ended is None:
        return None
    if not found.has_ended:
        ended = None
    return JobRow(
        id=job_id,
        queue=found.queue or (ended.queue if ended is not None else None),
        status=found.status or str(ended.status if ended is not None else ""),
        model=record.model if record is not None else (ended.model if ended is not None else None),
        description=found.description,
        enqueued_at=found.enqueued_at,
        started_at=found.started_at,
        ended_at=(found.ended_at or (ended.ended_at if ended is not None else None)) if found.has_ended else None,
        **(_end_of(ended) if ended is not None else {}),
    )


def _end_of(ended: EndedJob) -> dict[str, Any]:
    return {
        "attempts": ended.attempts,
        "prompt_tokens": ended.usage.prompt_tokens,
        "output_tokens": ended.usage.completion_tokens,
        "queued_seconds": ended.timings.queued,
        "first_token_seconds": ended.timings.first_token,
        "total_seconds": ended.timings.total,
        "error": ended.error,
    }


def _text(value: bytes | None) -> str | None:
    return value.decode(errors="replace") if value is not None else None


def _shown(description: str | None) -> str | None:
    """What the job is about, without the call around it."""
    found = _DESCRIPTION.fullmatch(description or "")
    return found[2] if found is not None else description
