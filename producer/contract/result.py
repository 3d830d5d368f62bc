"""A job's final result: what `promptmill:result:{JOB_ID}`, RQ's return value and the S3 object hold."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from producer.contract.chunk import FinishReason, JobOutcome, Usage
from producer.contract.error import ErrorInfo
from producer.contract.logprob import PromptEcho, TokenLogprob
from producer.contract.version import CONTRACT_VERSION, ContractVersion


class Choice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None  # aligned with `token_ids`
    tool_calls: list[dict[str, Any]] | None = None
    reasoning: str | None = None


class Timings(BaseModel):
    """Seconds. `queued`: enqueue to claim; `first_token`: enqueue to first token; `total`: enqueue to end."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    queued: float | None = None
    first_token: float | None = None
    total: float | None = None


class Result(BaseModel):
    """The outcome of one job. With a result store, Redis holds it without `choices`; `stored` says where they are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: ContractVersion = CONTRACT_VERSION
    job_id: str
    model: str | None = None
    status: JobOutcome
    prompt: PromptEcho | None = Field(default=None, description="With `echo`; the choices hold the output alone.")
    choices: list[Choice] = []
    usage: Usage = Usage()
    timings: Timings = Timings()
    attempts: int = 0
    metadata: dict[str, Any] = {}
    error: ErrorInfo | None = None
    stored: str | None = Field(default=None, description="s3://bucket/key of the full result.")

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""

    def to_wire(self) -> str:
        return self.model_dump_json(exclude_none=True)
