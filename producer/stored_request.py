"""What a job asks for, as RQ's hash of it holds it: written by anybody, so believed in nothing."""

import json
from typing import Any

from producer.contract.packed_field import unpack

MAX_UNPACKED_BYTES = 32 << 20  # more than any worker takes


def read_fields(data: bytes | None) -> dict[str, Any]:
    """The job's keyword arguments; none where they are not to be read (a job that no worker would take)."""
    try:
        fields = json.loads(unpack(data or b"", MAX_UNPACKED_BYTES))[3]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
