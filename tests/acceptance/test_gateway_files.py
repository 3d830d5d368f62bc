"""Gateways as processes and their files: killed or stopped in mid-upload, and given a large one."""

import http.client
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import openai
import pytest
import redis

from producer.gateway.files import file_keys
from tests.fakes.file_stores import FolderOfFiles, PlaceOfFiles
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.redis_reads import sorted_set_names
from tests.fakes.waiting import wait_until

NUM_SENT = 20_000_000  # two pieces of a multipart upload, and more
HEAD = (
    b'--xyz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)

Start = Callable[[], GatewayProcess]


@pytest.fixture
def start(start_process: Callable[..., GatewayProcess], place: PlaceOfFiles) -> Start:
    flags = [part for name, value in place.settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    return lambda: start_process("--http-drain-seconds", "0", *flags)


def test_a_gateway_killed_in_mid_upload_leaves_no_file_and_another_removes_its_bytes(
    start: Start, place: PlaceOfFiles, redis_client: redis.Redis
) -> None:
    killed = start()
    with closing(http.client.HTTPConnection("127.0.0.1", killed.port)) as connection:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("content-type", "multipart/form-data; boundary=xyz")
        connection.putheader("content-length", str(10 * NUM_SENT))
        connection.endheaders(HEAD + b"x" * NUM_SENT)
        wait_until(place.names)  # bytes have reached the store
        killed.kill()
    with openai.OpenAI(base_url=f"{start().url}/v1", api_key="none", max_retries=0) as client:
        assert list(client.files.list()) == []
        [part] = sorted_set_names(redis_client, file_keys.UNRECORDED_KEY)
        assert len(place.names()) == 1, "it is not removed before its writer is taken for dead"
        redis_client.zadd(file_keys.UNRECORDED_KEY, {part: 1})  # as time does
        kept = client.files.create(file=("b.jsonl", b"{}\n"), purpose="batch")
        client.files.delete(kept.id)  # cleaning up follows at once
    wait_until(lambda: not place.names() and not redis_client.exists(file_keys.UNRECORDED_KEY))


def test_a_gateway_told_to_stop_ends_its_uploads_and_leaves_nothing(
    start: Start, place: PlaceOfFiles, redis_client: redis.Redis
) -> None:
    stopped = start()
    with closing(http.client.HTTPConnection("127.0.0.1", stopped.port)) as connection:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("content-type", "multipart/form-data; boundary=xyz")
        connection.putheader("content-length", str(10 * NUM_SENT))
        connection.endheaders(HEAD + b"x" * NUM_SENT)
        wait_until(place.names)
        stopped.process.send_signal(signal.SIGTERM)
        stopped.process.wait(60)
    assert not place.names() and not redis_client.exists(file_keys.index_key("*", None))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_large_file_never_sits_in_memory(start: Start, place: PlaceOfFiles, tmp_path: Path) -> None:
    num_bytes = 200_000_000 if isinstance(place, FolderOfFiles) else 80_000_000  # the bucket is in the test's memory
    source = tmp_path / "large.jsonl"
    with source.open("wb") as file:
        while file.tell() < num_bytes:
            file.write(b'{"custom_id": "1"}\n' * 100_000)
        file.truncate(num_bytes)
    gateway = start()
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        client.files.create(file=("small", b"{}\n"), purpose="batch")
        before = _peak_bytes(gateway.process.pid)
        with source.open("rb") as file:
            kept = client.files.create(file=file, purpose="batch")
        assert kept.bytes == num_bytes
        with client.files.with_streaming_response.content(kept.id) as response:
            assert sum(len(chunk) for chunk in response.iter_bytes(1 << 20)) == num_bytes
        assert _peak_bytes(gateway.process.pid) - before < 48 << 20


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
