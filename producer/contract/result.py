"""A job's final result: what `promptmill:result:{JOB_ID}`, RQ's return value and the S3 object hold."""

from collections.abc import Iterable
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from producer.contract.chunk import Chunk, FinishReason, JobOutcome, Usage
from producer.contract.embedding import decode_vector
from producer.contract.error import ErrorInfo
from producer.contract.logprob import PromptEcho, TokenLogprob
from producer.contract.tool_call import ToolCall, join_deltas
from producer.contract.version import CONTRACT_VERSION, ContractVersion


class Choice(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None  # aligned with `token_ids`
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None

    @classmethod
    def join(cls, index: int, chunks: Iterable[Chunk], *, cut_off: FinishReason) -> Self:
        """The choice that the chunks of that index make; `cut_off` is its end where they have none."""
        mine = [chunk for chunk in chunks if chunk.index == index]
        ends = [chunk.finish_reason for chunk in mine if chunk.finish_reason is not None]
        return cls(
            index=index,
            text="".join(chunk.text for chunk in mine),
            token_ids=[token_id for chunk in mine for token_id in chunk.token_ids],
            finish_reason=ends[-1] if ends else cut_off,
            logprobs=[entry for chunk in mine for entry in chunk.logprobs or ()] or None,
            tool_calls=join_deltas(delta for chunk in mine for delta in chunk.tool_calls or ()),
            reasoning="".join(chunk.reasoning or "" for chunk in mine) or None,
        )


class Timings(BaseModel):
    """Seconds. `queued`: enqueue to claim; `first_token`: enqueue to first token; `total`: enqueue to end."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    queued: float | None = None
    first_token: float | None = None
    total: float | None = None


class Result(BaseModel):
    """The outcome of one job. With a result store, Redis holds it without its output; `stored` says where that is."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: ContractVersion = CONTRACT_VERSION
    job_id: str
    model: str | None = None
    status: JobOutcome
    prompt: PromptEcho | None = Field(default=None, description="With `echo`; the choices hold the output alone.")
    choices: list[Choice] = []
    embeddings: list[str] | None = Field(
        default=None, description="Of a finished job of task embed: float32, little endian, in base64, one an input."
    )
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

    @property
    def vectors(self) -> list[list[float]]:
        """The embeddings as numbers, one an input."""
        return [decode_vector(encoded) for encoded in self.embeddings or ()]

    def without_output(self) -> Self:
        """The same but for what the job put out."""
        return self.model_copy(update={"prompt": None, "choices": [], "embeddings": None})

    def to_wire(self) -> str:
        return self.model_dump_json(exclude_none=True)
