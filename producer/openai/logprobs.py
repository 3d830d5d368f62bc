"""The contract's token logprobs in OpenAI's two formats: a list of tokens for chats, columns for completions. Pure."""

from collections.abc import Sequence
from typing import Any

from producer.contract import TokenLogprob, TopLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's `choices[].logprobs` of a chat."""
    return {
        "content": [
            {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokens: Sequence[TokenLogprob | None], *, text_offset: int, first_text: str = ""
) -> dict[str, Any]:
    """OpenAI's `choices[].logprobs` of a completion. `text_offset`: characters of the choice before these tokens.

    A prompt's first token (with `echo`) has no logprob: the contract has None in its place, and `first_text` is its
    text.
    """
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = token.token if token is not None else first_text
        columns["tokens"].append(text)
        columns["token_logprobs"].append(token.logprob if token is not None else None)
        columns["top_logprobs"].append(_alternatives(token))
        columns["text_offset"].append(text_offset)
        text_offset += len(text)
    return columns


def _chat_token(token: TopLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": token.bytes}


def _alternatives(token: TokenLogprob | None) -> dict[str, float] | None:
    if token is None or not token.top:
        return None
    return {other.token: other.logprob for other in token.top}
