"""A Redis Cluster's node, a real process, without a slot of its own: enough for one to be known by its answers."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from tests.fakes.ports import free_port
from worker.embedded_redis import find_server
from worker.started_process import StartedProcess

PATIENCE = Retry(ConstantBackoff(0.02), 1000)


@contextmanager
def redis_cluster(folder: Path) -> Iterator[str]:
    """Its URL."""
    port = free_port()
    address = ["--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
    # Nodes speak with each other on a port that is 10,000 above, where others are given theirs, unless one is named.
    cluster = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
    command = [find_server(), *address, *cluster, "--save", ""]
    with StartedProcess(command, stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(port=port, retry=PATIENCE) as client:
                assert client.info("server")["process_id"] == process.pid
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
