"""Whether one tenant's batch holds up another tenant's ten jobs: the ten alone, behind a batch, and as a tenant's.

The batch stands on the queue when the ten are submitted, and fills the worker. A shared queue would make them wait for
all of it, so there the batch is small, and the wait for one of its jobs is what to multiply.

    python -m benchmarks.tenants [--batch 50000] [--shared-batch 300]
"""

import statistics
import time

import click

from benchmarks.queue_cost import MODEL
from benchmarks.report import print_and_keep
from benchmarks.worker_fixture import worker_process
from producer import Client

NUM_JOBS = 10
MAX_TOKENS = 16
MAX_NUM_SEQS = 16
LIMIT = 12


@click.command()
@click.option("--batch", default=50_000, show_default=True)
@click.option("--shared-batch", default=300, show_default=True)
@click.option("--model", default=MODEL, show_default=True)
def main(batch: int, shared_batch: int, model: str) -> None:
    scenarios = {
        "alone": (0, None, None),
        f"one queue, behind {shared_batch:,} jobs": (shared_batch, None, None),
        f"tenants, beside {batch:,} jobs": (batch, "big", None),
        f"tenants, beside {batch:,} jobs, at most {LIMIT} running": (batch, "big", LIMIT),
    }
    rows = [[name, *measure(model, *scenario)] for name, scenario in scenarios.items()]
    notes = [
        f"{model}, one worker with --max-num-seqs {MAX_NUM_SEQS}; every job asks for {MAX_TOKENS} tokens.",
        "Seconds from the submission of the ten to the first token of the first, and to each one's end.",
    ]
    print_and_keep("tenants", ["ten jobs", "first token, s", "median end, s", "last end, s"], rows, notes)


def measure(model: str, num_batch: int, batch_tenant: str | None, limit: int | None) -> list[str]:
    options = ["--model", model, "--max-num-seqs", str(MAX_NUM_SEQS)]
    options += ["--max-running-per-tenant", str(limit)] if limit else []
    with worker_process(*options) as (url, _), Client(url) as client:
        for start in range(0, num_batch, 10_000):
            client.submit_many(requests(min(10_000, num_batch - start), batch_tenant))
        while num_batch and count_begun(client) < (limit or MAX_NUM_SEQS):
            time.sleep(0.05)
        started = time.perf_counter()
        jobs = client.submit_many(requests(NUM_JOBS, "small" if batch_tenant else None))
        next(iter(jobs[0].stream(timeout=600)))
        first_token = time.perf_counter() - started
        ends = [time.perf_counter() - started for _ in client.as_completed(jobs, timeout=600)]
    return [f"{seconds:.2f}" for seconds in (first_token, statistics.median(ends), ends[-1])]


def count_begun(client: Client) -> int:
    return sum(queue.registries["started"] + queue.registries["finished"] for queue in client.queues())


def requests(number: int, tenant: str | None) -> list[dict[str, object]]:
    fields = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, "tenant": tenant}
    return [{"prompt": f"Number {at}: tell me about it.", **fields} for at in range(number)]


if __name__ == "__main__":
    main()
