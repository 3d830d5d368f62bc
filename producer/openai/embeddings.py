"""OpenAI's `/v1/embeddings`: request bodies to jobs, results to response bodies. Pure.

`encoding_format` exists in this API only: jobs have one encoding, the one that OpenAI's client asks for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from producer.contract import JobRequest, Result, Usage
from producer.embeddings import is_list_of_inputs, share_out
from producer.enqueue import build_request
from producer.errors import InvalidJobError

EMBEDDINGS_URL = "/v1/embeddings"
EMBEDDING_NAMES = {"inputs": "input", "prompt": "input"}  # OpenAI's names for these fields of ours

_ENCODINGS = ("float", "base64")
_OURS = ("prompt", "inputs", "task", "messages")
_FLOAT32_DIGITS = 9  # digits that distinguish any two float32 numbers


def encoding_of(body: Mapping[str, Any]) -> str:
    """The body's `encoding_format`. Raises InvalidJobError."""
    encoding = body.get("encoding_format")
    if encoding is None:
        return "float"
    if encoding not in _ENCODINGS:
        rule = f"encoding_format: must be {' or '.join(map(repr, _ENCODINGS))}; got {encoding!r:.60}"
        raise InvalidJobError(rule, param="encoding_format")
    return str(encoding)


def check_fields(fields: Mapping[str, Any]) -> None:
    """Check a body's fields, without those that are null. Raises InvalidJobError."""
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
    """The one job for these fields. Raises InvalidJobError, with our names of the fields."""
    job = {name: value for name, value in fields.items() if name not in ("input", "encoding_format", "stream")}
    given = fields["input"]
    name = "inputs" if is_list_of_inputs(given) else "prompt"
    return build_request({**job, "task": "embed", name: given})


def split_inputs(request: JobRequest) -> list[JobRequest]:
    """The request as several jobs, which several workers can share."""
    if request.inputs is None:
        return [request]
    return [request.model_copy(update=fields) for fields in share_out(request.inputs, {})]


def embeddings_body(results: Sequence[Result], usage: Usage, *, encoding: str) -> dict[str, Any]:
    """The response body for the results of one request's jobs, in order."""
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
    """The same float32 numbers with half as many digits."""
    return [float(f"{number:.{_FLOAT32_DIGITS}g}") for number in vector]
