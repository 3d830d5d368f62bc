"""The entries of a job's stream, which is its write-ahead log. Ids are `<attempt>-<seq>`."""

import re
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field

from producer.contract.error import ErrorInfo
from producer.contract.logprob import PromptEcho, TokenLogprob
from producer.contract.tool_call import ToolCallDelta
from producer.contract.version import CONTRACT_VERSION, ContractVersion

FinishReason = Literal["stop", "length", "tool_calls", "deadline", "cancelled", "error"]
JobOutcome = Literal["finished", "cancelled", "stopped", "failed"]


class EntryId(NamedTuple):
    """A stream entry's id; tuple order is stream order. `seq` 0 is an attempt's marker, entries count from 1."""

    attempt: int
    seq: int

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        attempt, _, seq = text.partition(b"-") if isinstance(text, bytes) else text.partition("-")
        return cls(int(attempt), int(seq))

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"

    def follows(self, previous: "EntryId") -> bool:
        """Whether nothing can lie between `previous` and this entry; if not, a reader asks the stream."""
        return self.attempt == previous.attempt and self.seq == previous.seq + 1


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer worker may add fields; readers pass them over

    v: ContractVersion = CONTRACT_VERSION
    job_id: str

    def to_wire(self) -> str:
        return self.model_dump_json(exclude_none=True)


class Marker(_Wire):
    """Entry `<attempt>-0`, field `m`: fences out the previous attempt. With `reset`, readers drop what they hold."""

    attempt: int
    worker: str
    reset: bool = False
    prompt_token_ids: list[int] | None = None
    seed: int | None = None
    fingerprint: str | None = None


class Chunk(_Wire):
    """Tokens one choice was given, and the text they released. Text held back (stop string, UTF-8) comes later.

    `text` is the answer's content alone: what a model thought is `reasoning`, the calls it made are `tool_calls`.
    `reasoning_tokens`: how many more of the choice's tokens are known to be of the latter, markers included.
    `token_offset` counts the choice's tokens before this chunk. A reader yields one chunk with `reset` set, and
    nothing else in it, where an attempt started over: what was shown before is void.
    """

    index: int = 0
    token_offset: int = 0
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None  # aligned with `token_ids`
    prompt: PromptEcho | None = None  # with `echo`, in the first chunk of choice 0
    tool_calls: list[ToolCallDelta] | None = None
    reasoning: str | None = None
    reasoning_tokens: int | None = None
    finish_reason: FinishReason | None = None
    reset: bool = Field(default=False, exclude=True)


def plain_chunk_to_wire(
    job_id: str, index: int, token_offset: int, text: str, token_ids: list[int], finish_reason: FinishReason | None
) -> str:
    """`Chunk(…).to_wire()` of what most chunks hold, at a tenth of its cost: there is one for each token.

    Raises UnicodeEncodeError for text that cannot be written down.
    """
    if not text.isascii():
        text.encode()
    ids = str(token_ids).replace(" ", "")
    end = f',"finish_reason":"{finish_reason}"}}' if finish_reason is not None else "}"
    return (
        f'{{"v":{CONTRACT_VERSION},"job_id":{encode_basestring(job_id)},"index":{index},"token_offset":{token_offset},'
        f'"text":{encode_basestring(text)},"token_ids":{ids}{end}'
    )


class Usage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0  # of the completion's


class Done(_Wire):
    """The last entry of a stream: it decides the job's outcome."""

    done: Literal[True]
    status: JobOutcome
    usage: Usage = Usage()
    error: ErrorInfo | None = None


def parse_entry(data: str | bytes) -> Chunk | Done:
    """The entry behind field `d`. Raises `pydantic.ValidationError` on what is neither.

    An end that cannot be read (a newer contract's) is no chunk with nothing in it: whoever took it for one would wait
    for the end, or run the job again.
    """
    raw = data.encode() if isinstance(data, str) else data
    is_end = b'"done"' in raw and _END.search(raw)
    return Done.model_validate_json(raw) if is_end else _validate_chunk(raw)


_END = re.compile(rb'"done"\s*:\s*true')  # in a text its quotes would be escaped
# What model_validate_json calls, at two thirds of its time.
_validate_chunk: Callable[[bytes], Chunk] = Chunk.__pydantic_validator__.validate_json
