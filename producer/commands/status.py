"""`promptmill status`: the queues and the workers, as tables or as JSON."""

import dataclasses
import json
from typing import Any

import click

from producer.commands.jobs import open_client
from producer.contract import WorkerInfo
from producer.deliveries import WebhookCounts
from producer.queues import QueueStatus
from producer.settings import ProducerSettings, settings_options

RARE = ("deferred", "scheduled")  # columns that are left out where they are empty: the rest fits into 80 characters


@click.command()
@click.option("--json", "is_json", is_flag=True, help="Print it as JSON.")
@click.option(
    "--host", metavar="HOST", help="Show only this host's workers, and exit with 1 if none is alive: a health check."
)
@settings_options(ProducerSettings)
def status(is_json: bool, host: str | None, **flags: Any) -> None:
    """Show the queues, the live workers and undelivered webhooks."""
    with open_client(flags) as client:
        queues, workers, webhooks = client.queues(), client.workers(), client.webhook_counts()
    if host is not None:
        workers = [worker for worker in workers if worker.hostname == host]
    if is_json:
        shown = {
            "queues": [dataclasses.asdict(queue) for queue in queues],
            "workers": [worker.model_dump(mode="json") for worker in workers],
            "webhooks": dataclasses.asdict(webhooks),
        }
        click.echo(json.dumps(shown, indent=2))
    else:
        _print_tables(queues, workers)
        if webhooks != WebhookCounts():
            counts = f"{webhooks.waiting} waiting, {webhooks.dead} dead"
            click.echo(f"Webhooks: {counts}; to see them: promptmill webhooks deliveries")
    if host is not None and not workers:
        raise SystemExit(1)


def _print_tables(queues: list[QueueStatus], workers: list[WorkerInfo]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    queue_table = Table(title="Queues", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    queue_table.add_column("queue", no_wrap=True)
    shown = [
        name for name in queues[0].registries if name not in RARE or any(queue.registries[name] for queue in queues)
    ]
    for name in ("waiting", "oldest", *shown):
        queue_table.add_column(name, justify="right")
    at_rest = [queue for queue in queues if queue.is_at_rest]
    for queue in (queue for queue in queues if not queue.is_at_rest):
        oldest = "" if queue.oldest_seconds is None else f"{queue.oldest_seconds:.0f} s"
        counts = (str(queue.registries[name]) for name in shown)
        queue_table.add_row(queue.name, str(queue.depth), oldest, *counts)

    worker_table = Table(title="Workers", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in ("worker", "models", "device"):
        worker_table.add_column(name, overflow="fold")
    for name in ("running", "waiting", "tokens/s", "blocks used"):
        worker_table.add_column(name, justify="right")
    for worker in workers:
        num_blocks = worker.kv_blocks_used + worker.kv_blocks_free
        worker_table.add_row(
            worker.name,
            ", ".join(worker.models),
            worker.device,
            str(worker.num_running),
            str(worker.num_waiting),
            f"{worker.tokens_per_second:.0f}",
            f"{worker.kv_blocks_used} of {num_blocks}",
        )
    console = Console()
    console.print(queue_table)
    if at_rest:
        num_finished = sum(queue.registries["finished"] for queue in at_rest)
        console.print(
            f"and {len(at_rest)} queues of tenants at rest, {num_finished} jobs finished; to see them: --json"
        )
    console.print(worker_table if workers else "No worker is alive; to start one: promptmill worker")
