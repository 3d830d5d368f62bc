"""What `submit` takes by keyword, for type checkers and editors: the fields of `JobRequest` as callers write them.

`producer.contract.job` has their meaning, defaults and limits, and checks them; a test holds the two together.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict


class RequestFields(TypedDict, total=False):
    """All but `messages`, which `submit` names itself."""

    model: str | None
    task: Literal["generate", "embed"]
    prompt: str | list[int] | None
    inputs: list[str | list[int]] | list[str] | list[list[int]] | None
    dimensions: int | None

    max_tokens: int | None
    min_tokens: int
    n: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[str, float] | Mapping[int, float] | None
    logprobs: bool
    top_logprobs: int
    echo: bool

    response_format: Mapping[str, Any] | None
    regex: str | None
    choice: list[str] | None
    grammar: str | None
    tools: list[dict[str, Any]] | None
    tool_choice: Literal["none", "auto", "required"] | Mapping[str, Any] | None
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any] | None

    priority: int
    deadline: float | None
    tenant: str | None
    metadata: Mapping[str, Any]
    idempotency_key: str | None
    stream: bool
