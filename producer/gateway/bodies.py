"""Request bodies: read once, as JSON objects. Their size was limited before (`producer.gateway.request_context`)."""

import asyncio
import gc
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from typing import Any, ParamSpec, TypeVar

from fastapi import Request

from producer.contract.rules import MAX_NESTING, is_deeper
from producer.gateway.errors import ApiError

MAX_BYTES_AT_ONCE = 64 << 10  # of what is read on the loop: a body of many tiny items costs 0.2 µs a byte

P = ParamSpec("P")
T = TypeVar("T")


class Bodies:
    """Large bodies are parsed on a single thread, so that the loop keeps half of the process's time: 4 MiB can take a
    second."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bodies")

    async def read(self, request: Request, parse: Callable[[dict[str, Any]], T]) -> T:
        """Parse the body's object. Raises what `parse` raises, and ApiError. Only `application/json` is accepted:
        browsers ask before they send it to another origin."""
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
        return await self.run(len(body), lambda: parse(_parse_object(body)))

    async def run(self, num_bytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `function`, whose work grows with `num_bytes`."""
        if num_bytes <= MAX_BYTES_AT_ONCE:
            return function(*args, **kwargs)
        work = partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        fields = _parse(body)
    except (ValueError, RecursionError) as error:
        why = str(error).partition("; use sys.")[0]  # of a number with thousands of digits
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_json", f"the body is not JSON: {why}") from error
    if not isinstance(fields, dict):
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_json", "the body must be a JSON object")
    if is_deeper(fields, MAX_NESTING):
        message = f"the body is nested deeper than {MAX_NESTING} levels"
        raise ApiError(HTTPStatus.BAD_REQUEST, "invalid_json", message)
    return fields


def _parse(body: bytes) -> Any:
    """Without the garbage collector: a million lists take 0.1 s, and half a second if it walks through them again and
    again."""
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    finally:
        if is_collecting:
            gc.enable()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")
