"""A Redis URL under which nobody answers as it says: everybody is told so within seconds, with the remedy."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
import redis

from producer import AsyncClient, Client, RedisRefusedError, RedisUnavailableError
from tests.fakes.ports import free_port
from tests.fakes.redis_cluster import redis_cluster
from tests.fakes.tls_front import tls_front
from worker.embedded_redis import EmbeddedRedis
from worker.errors import StartRefusedError
from worker.run import run_worker
from worker.settings import WorkerSettings
from worker.started_process import running

FEW_SECONDS = 20.0  # a try to connect takes up to 5 s
REMEDIES = {
    "tls on a plain port": "write redis:// if that port speaks no TLS",
    "plain on a port with tls": "write rediss:// if that port speaks TLS",
    "a certificate of nobody": r"\?ssl_ca_certs=FILE",
    "an address without an answer": "name another one with --redis-url or PROMPTMILL_REDIS_URL",
    "a name that nobody has": "name another one with --redis-url or PROMPTMILL_REDIS_URL",
}
EVERY_COMMAND = pytest.mark.parametrize(
    "command", [["gateway", "--http-port", "0"], ["submit", "x"], ["worker", "--model", "none"]]
)


@pytest.fixture(params=REMEDIES)
def case(request: pytest.FixtureRequest, redis_url: str) -> Iterator[tuple[str, str]]:
    """A URL, and a pattern of what is said of it."""
    with ExitStack() as stack:
        match request.param:
            case "tls on a plain port":
                url = f"rediss://:secret@127.0.0.1:{urlsplit(redis_url).port}/0"
            case "plain on a port with tls":
                url = f"redis://:secret@127.0.0.1:{stack.enter_context(tls_front(_port(redis_url)))}/0"
            case "a certificate of nobody":
                url = f"rediss://:secret@127.0.0.1:{stack.enter_context(tls_front(_port(redis_url)))}/0"
            case "an address without an answer":
                url = f"redis://:secret@127.0.0.1:{_full_port(stack)}/0"
            case _:
                url = "redis://:secret@no-such-host.invalid:6379/0"
        yield url, REMEDIES[request.param]


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def _full_port(stack: ExitStack) -> int:
    """Its queue of connections is full, so that the kernel drops whatever else comes, as a firewall does."""
    listener = stack.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    for _ in range(3):
        waiting = stack.enter_context(socket.socket())
        waiting.setblocking(False)
        waiting.connect_ex(listener.getsockname())
    return int(listener.getsockname()[1])


def test_a_client_is_told_within_seconds(case: tuple[str, str]) -> None:
    url, said = case
    began_at = time.monotonic()
    with Client(url) as client, pytest.raises(RedisUnavailableError, match=said) as error:
        client.submit("x")
    _check(error.value, url, began_at)


async def test_an_asyncio_client_is_told_within_seconds(case: tuple[str, str]) -> None:
    url, said = case
    began_at = time.monotonic()
    async with AsyncClient(url) as client:
        with pytest.raises(RedisUnavailableError, match=said) as error:
            await client.submit("x")
    _check(error.value, url, began_at)


def test_a_worker_is_told_within_seconds(case: tuple[str, str]) -> None:
    url, said = case
    began_at = time.monotonic()
    with pytest.raises(StartRefusedError, match=said) as error:
        run_worker(WorkerSettings(redis_url=url, model="no-such-model"))
    _check(error.value, url, began_at)


def _check(error: Exception, url: str, began_at: float) -> None:
    assert url.replace("secret", "***") in str(error)
    assert "secret" not in str(error)
    assert time.monotonic() - began_at < FEW_SECONDS


@pytest.fixture
def wrong_login(redis_url: str, redis_client: redis.Redis) -> Iterator[str]:
    redis_client.acl_setuser("mill", enabled=True, passwords="+right", keys="*", channels="*", commands=["+@all"])
    yield redis_url.replace("://", "://mill:wrong@")
    redis_client.acl_deluser("mill")


@EVERY_COMMAND
def test_a_wrong_password_ends_every_command_with_its_reason(wrong_login: str, command: list[str]) -> None:
    said = _said_at_the_end(command, wrong_login)
    assert "refuses us" in said and "check user and password in --redis-url" in said
    assert "wrong@" not in said


@EVERY_COMMAND
def test_a_cluster_ends_every_command_with_its_reason(tmp_path: Path, command: list[str]) -> None:
    with redis_cluster(tmp_path) as url:
        assert "part of a cluster: promptmill needs a Redis that is not a cluster" in _said_at_the_end(command, url)


@pytest.mark.parametrize("case", ["a certificate of nobody"], indirect=True)
def test_a_gateway_ends_where_it_cannot_trust_what_answers(case: tuple[str, str]) -> None:
    url, said = case
    assert re.search(said, _said_at_the_end(["gateway", "--http-port", "0"], url))


def _said_at_the_end(command: list[str], url: str) -> str:
    promptmill = [sys.executable, "-m", "producer", *command, "--redis-url", url]
    ended = subprocess.run(promptmill, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3 and "Traceback" not in ended.stderr
    return ended.stderr


def test_a_client_with_a_wrong_password_is_refused_for_good(wrong_login: str) -> None:
    with Client(wrong_login) as client, pytest.raises(RedisRefusedError):
        client.submit("x")


def test_a_gateway_waits_for_a_redis_that_is_not_up_yet(tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    command = [sys.executable, "-m", "producer", "gateway", "--http-port", "0", "--redis-url", url]
    with running(command, stderr=subprocess.PIPE) as process, cast(IO[bytes], process.stderr) as log:
        said = "".join(_until(log, "action=serving "))
        assert f"action=redis_unavailable error=Redis at {url} cannot be reached" in said
        address = re.findall(r"action=serving url=(\S+)", said)[0]
        assert httpx.get(f"{address}/health").json()["redis"] == "unreachable"
        with EmbeddedRedis(data_dir=tmp_path, port=port):
            assert httpx.get(f"{address}/health").json()["redis"] == "reachable"


def _until(lines: Iterable[bytes], mark: str) -> Iterator[str]:
    for line in map(bytes.decode, lines):
        yield line
        if mark in line:
            return
