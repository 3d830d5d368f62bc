"""A redis-server of our own beside strangers."""

import socket
from pathlib import Path

import pytest

from worker.embedded_redis import EmbeddedRedis
from worker.errors import EmbeddedRedisError


def test_a_port_that_a_silent_stranger_holds_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        server = EmbeddedRedis(data_dir=tmp_path, port=stranger.getsockname()[1])
        with pytest.raises(
            EmbeddedRedisError, match=f"on port {server._given_port} did not start: .*[Aa]ddress.* in use"
        ):
            server.start()
