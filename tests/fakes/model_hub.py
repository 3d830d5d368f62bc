"""The hub's HTTP interface for one model, over a folder: what `huggingface_hub` asks for when it fetches a snapshot."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HUB_ID = "some-org/tiny"
_COMMIT = "0123456789abcdef0123456789abcdef01234567"


class ModelHub:
    """Holds the last byte of every file back until `may_end` is set."""

    def __init__(self, folder: Path) -> None:
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.may_end = threading.Event()
        self.num_downloads = 0

    def answer(self, path: str) -> object | None:
        """What the API says."""
        if path.startswith(f"/api/models/{HUB_ID}/tree/"):
            return [
                {"type": "file", "path": name, "size": len(data), "oid": _sum_of(data)}
                for name, data in self.files.items()
            ]
        if path.startswith(f"/api/models/{HUB_ID}"):
            return {"id": HUB_ID, "modelId": HUB_ID, "sha": _COMMIT, "private": False, "tags": [], "siblings": []}
        return None

    def file(self, path: str) -> bytes | None:
        prefix = f"/{HUB_ID}/resolve/{_COMMIT}/"
        return self.files.get(path.removeprefix(prefix)) if path.startswith(prefix) else None


@contextmanager
def serving(hub: ModelHub) -> Iterator[str]:
    """Yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if (answer := hub.answer(path)) is not None:
                body = json.dumps(answer).encode()
                self._begin(body, "application/json")
                self.wfile.write(body)
            elif (data := hub.file(path)) is not None:
                hub.num_downloads += 1
                self._begin(data, "application/octet-stream")
                self.wfile.write(data[:-1])
                self.wfile.flush()
                hub.may_end.wait()
                self.wfile.write(data[-1:])
            else:
                self.send_error(404)

        def do_HEAD(self) -> None:
            data = hub.file(self.path.partition("?")[0])
            if data is None:
                self.send_error(404)
            else:
                self._begin(data, "application/octet-stream")

        def _begin(self, body: bytes, content_type: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{_sum_of(body)}"')
            self.send_header("X-Repo-Commit", _COMMIT)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        hub.may_end.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _sum_of(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
