"""What a job asks for, as RQ's hash of it holds it: written by anybody, so believed in nothing."""

import json
import zlib
from typing import Any


def read_fields(data: bytes | None) -> dict[str, Any]:
    """The job's keyword arguments; none where they are not to be read (a job that no worker would take)."""
    try:
        fields = json.loads(decompressed(data or b""))[3]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def decompressed(data: bytes) -> bytes:
    """As RQ reads a field that it writes compressed: what is not stands for itself."""
    try:
        return zlib.decompress(data)
    except zlib.error:
        return data
