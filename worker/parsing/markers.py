"""Markers in text that comes in pieces."""


def num_chars_held(text: str, marker: str) -> int:
    """The length of the longest end of `text` that may still become `marker`."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def may_become(text: str, marker: str) -> bool:
    """Whether `text` is the beginning of `marker`, and not all of it."""
    return len(text) < len(marker) and marker.startswith(text)
