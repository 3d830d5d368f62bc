"""A stream outlet and its connection to a real Redis, which can be told to lose requests and replies."""

from collections.abc import Iterator

import pytest

from producer.redis_replies import ReplyParser
from tests.fakes.flaky_redis import FlakyRedis
from worker.outlet.stream import StreamOutlet
from worker.scripts import Scripts


@pytest.fixture
def client(redis_url: str) -> Iterator[FlakyRedis]:
    with FlakyRedis.from_url(redis_url, parser_class=ReplyParser) as client:
        yield client


@pytest.fixture
def outlet(client: FlakyRedis) -> StreamOutlet:
    scripts = Scripts()
    scripts.load_append(client)  # as after the first flush
    return StreamOutlet(client, scripts)
