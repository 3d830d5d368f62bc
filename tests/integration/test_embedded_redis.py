"""When a redis-server of our own has started, and when it has not."""

import socket
import tempfile
from pathlib import Path

import pytest
import redis

from tests.fakes.ports import free_port
from worker import embedded_redis
from worker.embedded_redis import EmbeddedRedis
from worker.errors import EmbeddedRedisError


def test_a_port_that_a_silent_stranger_holds_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        server = EmbeddedRedis(data_dir=tmp_path, port=stranger.getsockname()[1])
        with pytest.raises(
            EmbeddedRedisError, match=f"on port {server._given_port} did not start: .*[Aa]ddress.* in use"
        ):
            server.start()


def test_a_port_that_is_lost_to_another_before_the_server_has_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        ports = [stranger.getsockname()[1], free_port()]
        monkeypatch.setattr(embedded_redis, "free_port", iter(ports).__next__)
        with EmbeddedRedis() as server, redis.Redis.from_url(server.url) as client:
            assert client.ping() and server.port == ports[1]


def test_it_has_started_when_it_has_read_what_it_kept() -> None:
    num_keys = 300_000
    with EmbeddedRedis(fsync="always") as server:
        with redis.Redis.from_url(server.url) as client:
            client.eval("for i = 1, tonumber(ARGV[1]) do redis.call('SET', i, i) end", 0, num_keys)
        server.kill()
        server.start()
        with redis.Redis.from_url(server.url) as client:
            assert client.dbsize() == num_keys


def test_a_system_on_which_no_folder_can_be_made_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(EmbeddedRedisError, match=r"no folder for the data of Redis \(.*: set TMPDIR.*--data-dir"):
        EmbeddedRedis().start()
