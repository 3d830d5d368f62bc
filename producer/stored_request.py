"""What a job asks for, as RQ's hash of it holds it: written by anybody, so believed in nothing."""

import json
import zlib
from typing import Any

MAX_UNPACKED_BYTES = 32 << 20  # more than any worker takes; a kilobyte may stand for a megabyte, and 10 MB for 10 GB


def read_fields(data: bytes | None) -> dict[str, Any]:
    """The job's keyword arguments; none where they are not to be read (a job that no worker would take)."""
    try:
        fields = json.loads(decompressed(data or b""))[3]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def decompressed(data: bytes) -> bytes:
    """As RQ reads a field that it writes compressed: what is not stands for itself. Of a larger one its beginning."""
    try:
        return zlib.decompressobj().decompress(data, MAX_UNPACKED_BYTES)
    except zlib.error:
        return data[:MAX_UNPACKED_BYTES]
