"""Request bodies: read once, as JSON objects. Their size was limited before (`producer.gateway.request_context`)."""

import json
from http import HTTPStatus
from typing import Any

from fastapi import Request

from producer.contract.rules import MAX_NESTING, is_deeper
from producer.gateway.errors import ApiError


async def read_json_object(request: Request) -> dict[str, Any]:
    """Raises ApiError. Only `application/json` is taken: browsers ask before they send it to another origin."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        given = media_type or "none"
        message = f"content-type: must be application/json; got {given[:60]!r}"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"content-encoding: bodies are taken as they are, not as {encoding[:60]!r}; send it unpacked"
        raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message)
    body = await request.body()
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; use sys.")[0]  # of a number with thousands of digits
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_json", f"the body is no JSON: {why}") from error
    if not isinstance(fields, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_json", "the body must be a JSON object")
    if is_deeper(fields, MAX_NESTING):
        message = f"the body is nested deeper than {MAX_NESTING} levels"
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_json", message)
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
