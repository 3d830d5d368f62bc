"""A `promptmill worker` on a Redis of its own, as a process, for benchmarks that need one."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from producer import Client
from worker.embedded_redis import EmbeddedRedis

PROMPTMILL = ("-m", "producer", "worker")


@contextmanager
def worker_process(
    *arguments: str, module: Sequence[str] = PROMPTMILL, has_pipes: bool = False, **environment: str
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """The Redis URL and the process, once it serves. `module`: what Python runs; `has_pipes`: on stdin and stdout."""
    with EmbeddedRedis() as server:
        variables = {**os.environ, "PROMPTMILL_REDIS_URL": server.url, **environment}
        pipe = subprocess.PIPE if has_pipes else None
        command = [sys.executable, *module, *arguments]
        with subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe) as worker:
            try:
                with Client(server.url) as client:
                    while not client.workers():
                        if worker.poll() is not None:
                            raise SystemExit("the worker did not start")
                        time.sleep(0.05)
                yield server.url, worker
            finally:
                worker.terminate()
