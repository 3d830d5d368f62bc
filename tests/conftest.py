"""What tiers share, on free ports: a real Redis, a real S3-protocol server, gateways and places for their files.

And fake workers."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import hypothesis
import pytest
import redis

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Arithmetic of tests and of what they start: threads that wait for each other spin, and other tests have the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Every HTTP client that is made reads the authorities it trusts: the world's take 50 ms, and no test goes out to it.
os.environ["SSL_CERT_FILE"] = str(Path(__file__).with_name("fakes") / "nobody.pem")
# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
hypothesis.settings.register_profile("promptmill", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("promptmill")

for variable in [name for name in os.environ if name.startswith("PROMPTMILL_")]:
    del os.environ[variable]
os.environ["PROMPTMILL_FILES"] = tempfile.mkdtemp(prefix="promptmill-files-")  # of every gateway that names no other
atexit.register(shutil.rmtree, os.environ["PROMPTMILL_FILES"], ignore_errors=True)

from producer.contract import keys  # noqa: E402  (reads the environment set above)
from tests.fakes.fake_worker import FakeWorker  # noqa: E402
from tests.fakes.ports import free_port  # noqa: E402
from worker import embedded_redis  # noqa: E402
from worker.embedded_redis import EmbeddedRedis  # noqa: E402

embedded_redis.free_port = free_port  # a server that is started again finds its port as it left it

# This file is read at every start of pytest, also by the process that only hands out tests: clients and web frameworks
# are imported by those who ask for them.
if TYPE_CHECKING:
    from tests.fakes.file_stores import PlaceOfFiles
    from tests.fakes.flaky_s3 import FlakyS3
    from tests.fakes.gateways import StartGateway

UNIT_TESTS = Path(__file__).with_name("unit")
ANNOUNCED_SECONDS = 600.0  # longer than any test takes: what a worker says of itself does not lapse meanwhile


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nearly all that imports make stays: to look for garbage meanwhile is an eighth of their time."""
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of unit tests, which compute, lie evenly among the others, which wait: side by side they use all cores."""
    kinds: tuple[dict[Path, list[pytest.Item]], ...] = ({}, {})
    for item in items:
        kinds[UNIT_TESTS in item.path.parents].setdefault(item.path, []).append(item)
    shares = {path: (at + 0.5) / len(files) for files in kinds for at, path in enumerate(files)}
    files = kinds[False] | kinds[True]
    items[:] = [item for path in sorted(files, key=shares.__getitem__) for item in files[path]]


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def redis_url(_redis_server: EmbeddedRedis) -> str:
    """A real, empty Redis."""
    with redis.Redis.from_url(_redis_server.url) as client:
        client.flushall()
    return _redis_server.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def worker(redis_url: str) -> Iterator[FakeWorker]:
    """Serves the model `fake`, as far as anybody can see."""
    with FakeWorker(redis_url) as worker:
        worker.announce("fake", seconds=ANNOUNCED_SECONDS)
        yield worker


@pytest.fixture
def low(redis_url: str) -> Iterator[FakeWorker]:
    """Takes the jobs of the class `low`, which batches are made of."""
    with FakeWorker(redis_url, queue=keys.class_queue(keys.DEFAULT_QUEUE, "low")) as worker:
        worker.announce("fake", queues=keys.class_queues(keys.DEFAULT_QUEUE), seconds=ANNOUNCED_SECONDS)
        yield worker


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[FlakyS3]":
    """An S3-protocol server (moto) with the bucket `results`; credentials are in the environment."""
    from tests.fakes.flaky_s3 import FlakyS3

    with FlakyS3(seed=0) as server:
        yield server


@pytest.fixture(scope="session")
def s3_endpoint(s3_server: "FlakyS3") -> str:
    return s3_server.endpoint


@pytest.fixture
def start_gateway(redis_url: str) -> "Iterator[StartGateway]":
    """Start gateways with settings of one's own."""
    from tests.fakes.gateways import running_gateway

    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running_gateway(redis_url, **settings))


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> "PlaceOfFiles":
    """An empty folder, and an empty prefix of a bucket: what a gateway's files lie in."""
    from tests.fakes.file_stores import BucketOfFiles, FolderOfFiles

    if request.param == "folder":
        (tmp_path / "files").mkdir()
        return FolderOfFiles(tmp_path / "files")
    return BucketOfFiles(request.getfixturevalue("s3_endpoint"), uuid4().hex)
