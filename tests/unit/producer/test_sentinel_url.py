"""URLs of a Redis behind Sentinels."""

from collections.abc import Callable
from typing import Any

import pytest
import redis
import redis.asyncio

from producer.async_transport import AsyncTransport
from producer.contract.sentinel_url import SentinelUrl
from producer.transport import Transport
from worker.redis_client import connect

FindPool = Callable[[str], Any]


def pool_of_worker(url: str) -> Any:
    return connect(url).connection_pool


def pool_of_client(url: str) -> Any:
    return Transport(url)._redis.connection_pool


def pool_of_asyncio_client(url: str) -> Any:
    return AsyncTransport(url)._redis.connection_pool


def test_a_url_names_the_sentinels_the_service_and_the_login_of_the_servers() -> None:
    parsed = SentinelUrl.parse("rediss+sentinel://me:se%40cret@one,two:1234,[::1]:5/mill/2")
    assert parsed is not None
    assert parsed.sentinels == (("one", 26379), ("two", 1234), ("::1", 5)) and parsed.service == "mill"
    assert parsed.options == {"db": 2, "username": "me", "password": "se@cret", "ssl": True}
    assert parsed.tls == {"ssl": True}


@pytest.mark.parametrize("find_pool", [pool_of_worker, pool_of_client, pool_of_asyncio_client])
def test_tls_is_spoken_with_sentinels_and_servers_under_the_authority_that_is_named(find_pool: FindPool) -> None:
    pool = find_pool("rediss+sentinel://one/mill?ssl_ca_certs=/ca.pem")
    for some in (pool, *(sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels)):
        connection = some.connection_class(**some.connection_kwargs)
        assert isinstance(connection, redis.SSLConnection | redis.asyncio.SSLConnection)
        assert connection.ca_certs == "/ca.pem"


@pytest.mark.parametrize("find_pool", [pool_of_worker, pool_of_client, pool_of_asyncio_client])
def test_without_tls_none_is_spoken(find_pool: FindPool) -> None:
    pool = find_pool("redis+sentinel://one/mill")
    for some in (pool, *(sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels)):
        connection = some.connection_class(**some.connection_kwargs)
        assert not isinstance(connection, redis.SSLConnection | redis.asyncio.SSLConnection)


@pytest.mark.parametrize("url", ["rediss+sentinel://one/mill?ssl_ca=x", "redis+sentinel://one/mill?ssl_ca_certs=x"])
def test_an_option_that_would_be_passed_over_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="ssl_ca"):
        SentinelUrl.parse(url)


@pytest.mark.parametrize("url", ["redis://host/0", "rediss://host", "unix:///tmp/redis.sock"])
def test_any_other_url_is_none_of_ours(url: str) -> None:
    assert SentinelUrl.parse(url) is None


@pytest.mark.parametrize("url", ["redis+sentinel://one", "redis+sentinel://one/mill/x", "redis+sentinel://one,/mill"])
def test_a_url_that_is_not_whole_is_refused_with_its_form(url: str) -> None:
    with pytest.raises(ValueError, match=r"redis\+sentinel://.*SERVICE"):
        SentinelUrl.parse(url)
