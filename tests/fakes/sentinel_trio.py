"""A Redis with a replica and a Sentinel, real processes, for fail-overs, again and again.

The server that tests have was built without TLS. With TLS each of the three has a front that speaks it, and the servers
are known to each other, and to the Sentinel, by their fronts' ports, where both ways of speaking are understood.
"""

import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self, cast

import redis
import trustme

from tests.fakes.ports import free_port
from tests.fakes.tls_front import tls_front
from tests.fakes.waiting import wait_until
from worker.embedded_redis import EmbeddedRedis, find_server
from worker.started_process import StartedProcess

SERVICE = "mill"


class SentinelTrio:
    """`fail_over` kills the master; the Sentinel then promotes the replica. `rejoin` makes the old one its replica."""

    def __init__(self, folder: Path, *, has_tls: bool = False) -> None:
        self._folder = folder
        self._has_tls = has_tls
        self._fronts = ExitStack()
        self._ports: dict[int, int] = {}  # by the server's, its front's
        self.ca_file = folder / "ca.pem"
        self.master, self.replica = (
            EmbeddedRedis(data_dir=folder / name, port=free_port()) for name in ("master", "replica")
        )
        self._port = free_port()
        self._process: StartedProcess | None = None

    @property
    def url(self) -> str:
        if not self._has_tls:
            return f"redis+sentinel://127.0.0.1:{self._port}/{SERVICE}"
        return f"rediss+sentinel://127.0.0.1:{self._known(self._port)}/{SERVICE}?ssl_ca_certs={self.ca_file}"

    def __enter__(self) -> Self:
        self.master.start()
        self.replica.start()
        if self._has_tls:
            self._start_fronts()
        self._replicate()
        config = self._folder / "sentinel.conf"
        config.write_text(
            f"port {self._port}\nbind 127.0.0.1\ndir {self._folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._known(self.master.port)} 1\n"
            f"sentinel down-after-milliseconds {SERVICE} 500\n"
            f"sentinel failover-timeout {SERVICE} 2000\n"
        )
        self._process = StartedProcess([find_server(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
        with redis.Redis(port=self._port, decode_responses=True) as sentinel:
            _wait_until(lambda: sentinel.sentinel_slaves(SERVICE))
            sentinel.execute_command("SENTINEL", "DEBUG", "INFO-PERIOD", 100)  # it learns of a replica in no time
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._fronts.close()
        self.master.stop()
        self.replica.stop()

    def _start_fronts(self) -> None:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self.ca_file))
        for server, takes_plain in ((self.master.port, True), (self.replica.port, True), (self._port, False)):
            front = tls_front(server, authority=authority, takes_plain=takes_plain)
            self._ports[server] = self._fronts.enter_context(front)

    def _known(self, port: int) -> int:
        """By which port others reach the server."""
        return self._ports.get(port, port)

    def fail_over(self) -> None:
        """Returns once the replica is the master."""
        self.master.kill()
        self.wait_for_promotion()

    def hand_over(self) -> None:
        """Returns once the Sentinel, as it is told, has promoted the replica, which has all. It refuses as long as the
        last time is near, and gives up, to be told again, where the replica answers late."""
        with redis.Redis(port=self._port, decode_responses=True) as sentinel:

            def is_promoted() -> bool:
                if self._is_promoted():
                    return True
                sentinel.sentinel_failover(SERVICE)
                return False

            _wait_until(is_promoted)

    def wait_for_promotion(self) -> None:
        _wait_until(self._is_promoted)

    def _is_promoted(self) -> bool:
        with redis.Redis(port=self.replica.port) as client:
            return bool(client.info("replication")["role"] == "master")

    def cut_off_replica(self) -> None:
        """It looks for its master elsewhere: what is written from now on is lost with the master. After two seconds the
        Sentinel puts it right."""
        with redis.Redis(port=self.replica.port) as client:
            client.replicaof("127.0.0.1", "1")

    def rejoin(self) -> None:
        """The old master starts again, unless it runs, and follows the new one; they have changed their names."""
        self.master, self.replica = self.replica, self.master
        if not _answers(self.replica.port):
            self.replica.start()
        self._replicate()
        with redis.Redis(port=self._port, decode_responses=True) as sentinel:
            _wait_until(lambda: self._is_ready(sentinel))

    def _is_ready(self, sentinel: redis.Redis) -> bool:
        """Whether it would fail over again."""
        master = cast("dict[str, Any]", sentinel.sentinel_master(SERVICE))
        replicas = {replica["port"]: replica for replica in sentinel.sentinel_slaves(SERVICE)}
        is_linked = replicas.get(self._known(self.replica.port), {}).get("master-link-status") == "ok"
        return master["port"] == self._known(self.master.port) and master["flags"] == "master" and is_linked

    def _replicate(self) -> None:
        with redis.Redis(port=self.master.port) as client:
            client.config_set("repl-diskless-sync-delay", 0)
        with redis.Redis(port=self.replica.port) as client:
            client.config_set("replica-announce-port", self._known(self.replica.port))
            client.replicaof("127.0.0.1", str(self._known(self.master.port)))
            _wait_until(lambda: client.info("replication")["master_link_status"] == "up")


def _answers(port: int) -> bool:
    try:
        with redis.Redis(port=port, socket_timeout=1.0) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


def _wait_until(condition: Callable[[], object]) -> None:
    """An error is no: a server may be about to come up."""

    def holds() -> object:
        with suppress(redis.RedisError):
            return condition()
        return None

    wait_until(holds, "what is asked of the servers")
