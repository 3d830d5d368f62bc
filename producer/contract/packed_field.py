"""Fields of RQ's records that may be compressed. Anybody may have written them, and 10 MB may stand for 10 GB."""

import zlib


def unpack(field: bytes, max_bytes: int) -> bytes:
    """As RQ reads such a field: what is not compressed stands for itself. Of a larger one its first `max_bytes`."""
    try:
        return zlib.decompressobj().decompress(field, max_bytes)
    except zlib.error:
        return field[:max_bytes]


def unpacks_to_more(field: bytes, max_bytes: int) -> bool:
    return len(unpack(field, max_bytes + 1)) > max_bytes
