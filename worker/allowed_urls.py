"""Which URLs an allow-list lets through. Resolves no host and opens no connection."""

from collections.abc import Iterable
from urllib.parse import unquote, urlsplit


def find_allowed(url: str, allowed: Iterable[str]) -> str | None:
    """The first of the allowed ones that `url` is at or below."""
    return next((top for top in allowed if is_under(url, top)), None)


def is_under(url: str, allowed: str) -> bool:
    """Whether `url` is the allowed one or lies below it; hosts and parts of the path are compared whole."""
    given, top = urlsplit(url), urlsplit(allowed)
    same_host = (given.scheme, given.netloc) == (top.scheme, top.netloc)
    is_below = f"{given.path}/".startswith(f"{top.path.rstrip('/')}/")
    return same_host and is_below and ".." not in unquote(given.path).split("/")
