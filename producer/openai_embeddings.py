"""`/v1/embeddings` as OpenAI has it: request bodies to jobs, results to response bodies. Pure.

`encoding_format` is of this API alone: jobs know one encoding, and it is the one that OpenAI's client asks for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from producer.contract import JobRequest, Result, Usage
from producer.embeddings import is_list_of_inputs, share_out
from producer.enqueue import build_request
from producer.errors import InvalidJobError

EMBEDDINGS_URL = "/v1/embeddings"
EMBEDDING_NAMES = {"inputs": "input", "prompt": "input"}  # what OpenAI calls those of our fields

_ENCODINGS = ("float", "base64")
_OURS = ("prompt", "inputs", "task", "messages")
_FLOAT32_DIGITS = 9  # tell any two numbers of float32 apart


def encoding_of(body: Mapping[str, Any]) -> str:
    """Raises InvalidJobError."""
    encoding = body.get("encoding_format")
    if encoding is None:
        return "float"
    if encoding not in _ENCODINGS:
        rule = f"encoding_format: must be {' or '.join(map(repr, _ENCODINGS))}; got {encoding!r:.60}"
        raise InvalidJobError(rule, param="encoding_format")
    return str(encoding)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Of a body, without those that are null. Raises InvalidJobError, as `encoding_of` does."""
    encoding_of(fields)
    for name in _OURS:
        if name in fields:
            rule = f"{name}: {EMBEDDINGS_URL} takes input, a text, token ids, or a list of either; leave {name} out"
            raise InvalidJobError(rule, param=name)
    if fields.get("stream", False) is not False:
        raise InvalidJobError("stream: an embedding comes as a whole; leave it out", param="stream")
    if "input" not in fields:
        raise InvalidJobError("input: is required", param="input")


def embedding_request(fields: Mapping[str, Any]) -> JobRequest:
    """The one job that these fields ask for. Raises InvalidJobError, in our words for the fields."""
    job = {name: value for name, value in fields.items() if name not in ("input", "encoding_format", "stream")}
    given = fields["input"]
    name = "inputs" if is_list_of_inputs(given) else "prompt"
    return build_request({**job, "task": "embed", name: given})


def split_inputs(request: JobRequest) -> list[JobRequest]:
    """The same as jobs that several workers can share."""
    if request.inputs is None:
        return [request]
    return [request.model_copy(update=fields) for fields in share_out(request.inputs, {})]


def embeddings_body(results: Sequence[Result], usage: Usage, *, encoding: str) -> dict[str, Any]:
    """Of one request's jobs, in their order."""
    vectors: list[Any] = []
    for result in results:
        vectors += (result.embeddings or []) if encoding == "base64" else map(shortened, result.vectors)
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)],
        "model": results[0].model or "",
        "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.total_tokens},
    }


def shortened(vector: list[float]) -> list[float]:
    """The same numbers of float32 in half as many digits."""
    return [float(f"{number:.{_FLOAT32_DIGITS}g}") for number in vector]
