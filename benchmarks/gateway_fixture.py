"""A `promptmill gateway` as a process, for benchmarks that need one."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2 as httpx
import redis

from producer.contract import WorkerInfo, keys
from worker.embedded_redis import free_port

START_SECONDS = 60.0


@contextmanager
def gateway_process(redis_url: str, *arguments: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Its URL and the process, once it answers."""
    port = free_port()
    command = ("-m", "producer", "gateway", "--http-port", str(port), "--redis-url", redis_url)
    with served(*command, "--log-level", "warning", *arguments) as process:
        yield wait_until_it_answers(process, f"http://127.0.0.1:{port}", "/health/live"), process


@contextmanager
def served(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A server of Python's, whatever it serves."""
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_until_it_answers(process: "subprocess.Popen[bytes]", url: str, path: str) -> str:
    """The URL."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            httpx.get(f"{url}{path}", timeout=5).raise_for_status()
            return url
        except httpx.TransportError:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{process.args!r} does not answer") from None
            time.sleep(0.1)


def announce(redis_url: str, model: str) -> None:
    """Have a worker in Redis that serves the model, as far as a gateway can see."""
    info = WorkerInfo(
        name="stand-in",
        queues=keys.class_queues(keys.DEFAULT_QUEUE),
        models=[model],
        context_length=8192,
        device="none",
        hostname="none",
        pid=0,
        started_at=time.time(),
    )
    with redis.Redis.from_url(redis_url) as connection:
        connection.set(keys.worker_key(info.name), info.model_dump_json())
        connection.zadd(keys.WORKERS_KEY, {info.name: time.time() + 3600})
