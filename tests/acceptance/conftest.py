"""Fixtures of real systems: a Redis and `promptmill worker` processes on it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from producer import Client
from tests.acceptance.system import System, system_with_tools
from tests.fakes.gateway_process import GatewayProcess
from worker.embedded_redis import EmbeddedRedis


@pytest.fixture
def system(redis_url: str, tmp_path: Path) -> Iterator[System]:
    """An empty Redis of its own state, and no worker yet."""
    system = System(redis_url, tmp_path)
    yield system
    system.stop()


@pytest.fixture(scope="session")
def running_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A Redis, one worker and one gateway that many tests share: they leave no job running behind them."""
    with EmbeddedRedis() as server:
        system = System(server.url, tmp_path_factory.mktemp("system"))
        try:
            system.start_worker()
            system.start_gateway()
            yield system
        finally:
            system.stop()


@pytest.fixture(scope="session")
def tool_system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The same with a worker whose model is shown tools, in Hermes' format; no gateway."""
    with system_with_tools(tmp_path_factory.mktemp("tools"), "hermes") as system:
        yield system


@pytest.fixture
def client(running_system: System) -> Iterator[Client]:
    with Client(running_system.url) as client:
        yield client


@pytest.fixture
def start_process(redis_url: str, tmp_path: Path) -> Iterator[Callable[..., GatewayProcess]]:
    """Start gateways as processes, with options of one's own, and perhaps on another `url`."""
    started: list[GatewayProcess] = []

    def start(*options: str, url: str = redis_url) -> GatewayProcess:
        started.append(GatewayProcess(url, tmp_path / f"gateway-{len(started)}.log", *options))
        return started[-1].wait_until_it_answers()

    yield start
    for gateway in started:
        gateway.kill()
