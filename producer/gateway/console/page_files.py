"""The page's files as they lie in the package: read once, named one by one, so that no path leads elsewhere."""

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """By name."""
    found = {}
    for path in files("producer.gateway.console").joinpath("page").iterdir():
        suffix = f".{path.name.rpartition('.')[2]}"
        if suffix in MEDIA_TYPES:
            content = path.read_bytes()
            found[path.name] = PageFile(content, MEDIA_TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found
