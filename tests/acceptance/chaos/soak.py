"""What processes hold after thousands of jobs and hundreds of cut connections: as much as after the first few.

python -m tests.acceptance.chaos.soak --rounds 10
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click
import httpx2 as httpx
import redis

from producer import Client
from tests.acceptance.chaos.run import wait_for
from tests.fakes.gateway_process import GatewayProcess
from tests.fakes.redis_proxy import CuttingProxy
from tests.fakes.worker_runs import WorkerProcess
from worker.embedded_redis import EmbeddedRedis

JOBS_A_ROUND = 300
CUTS_A_ROUND = 10
REQUESTS_A_ROUND = 60
QUIET_SECONDS = 20.0  # until everybody has connected again, and let go of what was cut
SPARE = 8  # descriptors, threads, connections more than at first that are no leak
SPARE_BYTES = 40 << 20  # a gateway's 5,000 newest jobs take 7 MB of them, and what pydantic caches 1.5


@dataclass(frozen=True)
class Held:
    """By one process."""

    num_files: int
    num_threads: int
    num_bytes: int

    @classmethod
    def of(cls, pid: int) -> "Held":
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return cls(
            len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"]), int(fields["VmRSS"].removesuffix("kB")) << 10
        )

    def has_grown(self, first: "Held") -> bool:
        more = max(self.num_files - first.num_files, self.num_threads - first.num_threads)
        return more > SPARE or self.num_bytes - first.num_bytes > SPARE_BYTES


def run_soak(num_rounds: int) -> list[str]:
    """What has grown from the second round to the last; prints what is held behind each."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptmill-soak-")))
        server = stack.enter_context(EmbeddedRedis())
        proxy = stack.enter_context(CuttingProxy(urlsplit(server.url).port or 0, seed=1))
        worker = stack.enter_context(WorkerProcess(proxy.url, max_num_seqs=32, log=folder / "worker.log"))
        gateway = GatewayProcess(proxy.url, folder / "gateway.log", "--files", str(folder / "files"))
        stack.callback(gateway.kill)
        worker.wait_until_serving()
        direct = stack.enter_context(redis.Redis.from_url(server.url))
        client = stack.enter_context(Client(server.url))
        gateway.wait_until_it_answers()
        pids = {"worker": worker.process.pid, "gateway": gateway.process.pid}
        first: dict[str, Held] = {}
        first_connections, found = 0, []
        for at in range(num_rounds):
            _run_round(client, proxy, gateway.url, at)
            wait_for(lambda: _is_settled(direct), QUIET_SECONDS)
            held = {name: Held.of(pid) for name, pid in pids.items()}
            num_connections = len(direct.client_list())
            print(f"round {at}: {num_connections} connections to Redis, {held}", flush=True)
            if at == 1:
                first, first_connections = held, num_connections
        found += [f"{name}: {held[name]}, at first {first[name]}" for name in pids if held[name].has_grown(first[name])]
        if num_connections > first_connections + SPARE:
            found.append(f"{num_connections} connections to Redis, at first {first_connections}")
        return found


def _run_round(client: Client, proxy: CuttingProxy, url: str, number: int) -> None:
    jobs = client.submit_many([{"prompt": f"Job {number} {at}", "max_tokens": 10} for at in range(JOBS_A_ROUND)])
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(_ask, url, at) for at in range(REQUESTS_A_ROUND)]
        for at, _ in enumerate(client.as_completed(jobs, timeout=300)):
            if at % (JOBS_A_ROUND // CUTS_A_ROUND) == 0:
                proxy.cut_all()
        for answer in asked:
            answer.result()


def _ask(url: str, number: int) -> None:
    """A stream read to its end, or left at once. A gateway whose Redis was cut off may answer 503."""
    body = {"model": "fake", "prompt": f"Ask {number}", "max_tokens": 20, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        if number % 2:
            response.read()


def _is_settled(direct: redis.Redis) -> bool:
    return not any(next(direct.scan_iter(name), None) for name in ("promptmill:leases:*", "rq:queue:*"))


@click.command()
@click.option("--rounds", "num_rounds", default=10, show_default=True, help=f"Of {JOBS_A_ROUND} jobs each.")
def main(num_rounds: int) -> None:
    """Fails if anything was held in the end that was not held at first."""
    found = run_soak(num_rounds)
    print("\n".join(found) or "passed")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
