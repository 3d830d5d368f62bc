"""What the console's routes answer and take."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from producer.contract import ErrorInfo, Usage

JobState = Literal["running", "waiting", "ended", "failed"]
Scope = Literal["all", "own", "none"]
"""Whose jobs a caller is shown: everybody's, those its key asked for, or none, as it has no key."""

MAX_IDS = 100


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Session(_Body):
    """Who the caller is, and what that allows."""

    version: str
    key_id: str | None
    key_name: str | None
    tenant: str | None
    models: list[str] = Field(description="The only ones the key may use; empty: all of them.")
    is_operator: bool
    scope: Scope


class JobRow(_Body):
    """A job as a row of a table. Times are epoch seconds; what is not known is null."""

    id: str
    queue: str | None = None
    status: str
    model: str | None = None
    description: str | None = None
    enqueued_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    attempts: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    queued_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    error: ErrorInfo | None = None


class JobList(_Body):
    scope: Scope
    jobs: list[JobRow]


class JobDetail(_Body):
    """`request`: the job's fields as they were enqueued. Its output is on its stream."""

    job: JobRow
    request: dict[str, Any]
    metadata: dict[str, Any]
    usage: Usage | None
    stored: str | None


class Point(_Body):
    """One step of the series: numbers of jobs and tokens, and seconds, which are null where no job had them."""

    finished: int
    failed: int
    cancelled: int
    prompt_tokens: int
    output_tokens: int
    first_token_p50: float | None
    first_token_p95: float | None
    total_p50: float | None
    total_p95: float | None


class Series(_Body):
    """`points[i]` covers the `step_seconds` from epoch second `begin + i * step_seconds` on; `window` covers all of
    them."""

    begin: int
    step_seconds: int
    is_complete: bool = Field(description="Whether the whole hour was read already.")
    queues: list[str] = Field(description="Those with a job that ended in it.")
    points: list[Point]
    window: Point


class JobIds(_Body):
    job_ids: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(min_length=1, max_length=MAX_IDS)


class ActionResult(_Body):
    """What an action did to one job: `is_done`, or the reason why not."""

    job_id: str
    is_done: bool
    reason: str | None = None


class ActionResults(_Body):
    jobs: list[ActionResult]
