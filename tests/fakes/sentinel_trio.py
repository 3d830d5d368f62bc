"""A Redis with a replica and a Sentinel, real processes, for fail-overs."""

import subprocess
import time
from pathlib import Path
from typing import Self

import redis

from worker.embedded_redis import EmbeddedRedis, find_server, free_port
from worker.started_process import StartedProcess

SERVICE = "mill"
WAIT_SECONDS = 60.0


class SentinelTrio:
    """`fail_over` kills the master; the Sentinel then promotes the replica."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.master = EmbeddedRedis(data_dir=folder / "master")
        self.replica = EmbeddedRedis(data_dir=folder / "replica")
        self._port = free_port()
        self._process: StartedProcess | None = None

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self._port}/{SERVICE}"

    def __enter__(self) -> Self:
        self.master.start()
        self.replica.start()
        with redis.Redis(port=self.replica.port) as client:
            client.replicaof("127.0.0.1", str(self.master.port))
            _wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        config = self._folder / "sentinel.conf"
        config.write_text(
            f"port {self._port}\nbind 127.0.0.1\ndir {self._folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.master.port} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 500\n"
            f"sentinel failover-timeout {SERVICE} 2000\n"
        )
        self._process = StartedProcess([find_server(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
        with redis.Redis(port=self._port) as sentinel:
            _wait_until(lambda: sentinel.sentinel_slaves(SERVICE))
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.master.stop()
        self.replica.stop()

    def fail_over(self) -> None:
        """Returns once the replica is the master."""
        self.master.kill()
        with redis.Redis(port=self.replica.port) as client:
            _wait_until(lambda: client.info("replication")["role"] == "master")


def _wait_until(condition: object) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            if condition():  # type: ignore[operator]
                return
        except redis.RedisError:
            pass
        assert time.monotonic() < end, "the servers did not come to it"
        time.sleep(0.02)
