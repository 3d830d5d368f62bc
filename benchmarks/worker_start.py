"""How soon a worker serves, and how much memory it takes: the cached demo model, several starts.

A start is counted from the process's creation to its entry among the live workers, and to the first job's result. What
no worker can go below stands beside it: a Python that imports torch and ends, in turn with the starts. The memory is
the peak resident size of parent and child together, after 64 concurrent jobs, a mapped model's file included.

    python -m benchmarks.worker_start [--rounds 5]
"""

import statistics
import subprocess
import sys
import time

import click

from benchmarks.process_figures import children, memory_bytes
from benchmarks.report import print_and_keep
from producer import Client
from worker.embedded_redis import EmbeddedRedis

MODEL = "smollm2-135m"


@click.command()
@click.option("--rounds", default=5, show_default=True)
def main(rounds: int) -> None:
    with EmbeddedRedis() as server, Client(server.url) as client:
        measure(server.url, client)  # fills the model's cache, compiles the kernels
        starts, floors = [], []
        for _ in range(rounds):
            floors.append((seconds_to_import_torch(),))
            starts.append(measure(server.url, client))
    names = [("seconds to serving", 1), ("seconds to the first result", 1), ("peak MiB, parent and child", 0)]
    rows = [
        [name, f"{statistics.median(values):.{digits}f}", f"{min(values):.{digits}f} to {max(values):.{digits}f}"]
        for (name, digits), values in zip(
            [("seconds of a bare `import torch`", 1), *names],
            [*zip(*floors, strict=True), *zip(*starts, strict=True)],
            strict=True,
        )
    ]
    notes = [f"SmolLM2-135M-Instruct from the cache, {rounds} starts, medians; the first job asks for one token."]
    print_and_keep("worker_start", ["what", "median", "min to max"], rows, notes)


def seconds_to_import_torch() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start


def measure(redis_url: str, client: Client) -> tuple[float, float, float]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "producer", "worker", "--redis-url", redis_url, "--model", MODEL]
    worker = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not any(info.pid == worker.pid for info in client.workers()):
            if worker.poll() is not None:
                raise SystemExit("the worker did not start")
            time.sleep(0.02)
        serving = time.perf_counter() - start
        client.submit("Hello", max_tokens=1).result(timeout=60)
        first_result = time.perf_counter() - start
        jobs = client.submit_many([{"prompt": f"Count from {i}:", "max_tokens": 16} for i in range(64)])
        assert len(list(client.as_completed(jobs, timeout=120))) == len(jobs)
        peak_bytes = sum(memory_bytes(pid, "VmHWM") for pid in [worker.pid, *children(worker.pid)])
        return serving, first_result, peak_bytes / 2**20
    finally:
        worker.terminate()
        worker.wait()


if __name__ == "__main__":
    main()
