"""What it costs to store every token before it is shown: our worker beside the same worker that only publishes.

Both take turns on the same prompts; every job is watched through pub/sub alone, so that the readers do the same too. A
contender that shows another number of tokens than asked for ends the run.

    python -m benchmarks.durability_cost [--rounds 5] [--num-prompts 64]
"""

import statistics
import sys
import time
from contextlib import ExitStack

import click
import redis

from benchmarks.queue_cost import MODEL
from benchmarks.report import print_and_keep
from benchmarks.worker_fixture import PROMPTMILL, worker_process
from benchmarks.workload import Workload, uniform_workload
from producer import Client
from producer.contract import Done, keys, parse_entry

CONTENDERS = {"publish only": ("-m", "benchmarks.publish_only_worker"), "stored, then published": PROMPTMILL}


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--model", default=MODEL, show_default=True)
def main(rounds: int, num_prompts: int, model: str) -> None:
    workloads = [uniform_workload(num_prompts, (32, 256), (32, 128), seed=seed) for seed in range(rounds)]
    speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(worker_process("--model", model, module=module))[0]
            for name, module in CONTENDERS.items()
        }
        for url in urls.values():
            run(url, uniform_workload(4, (32, 64), (8, 16), seed=rounds))
        for number, workload in enumerate(workloads):
            order = list(urls) if number % 2 == 0 else list(reversed(urls))  # whoever is second finds a warmer machine
            for name in order:
                seconds = run(urls[name], workload)
                speeds[name].append(workload.num_output_tokens / seconds)
                print(f"{name}: {workload.num_output_tokens} tokens in {seconds:.1f} s", file=sys.stderr)
    report(speeds, num_prompts, model)


def run(url: str, workload: Workload) -> float:
    """Seconds from the first prompt in to the last done entry seen."""
    fields = {"temperature": 0.0, "ignore_eos": True}
    requests = [
        {"prompt": prompt, "max_tokens": number, **fields}
        for prompt, number in zip(workload.prompts, workload.max_tokens, strict=True)
    ]
    with Client(url) as client, redis.Redis.from_url(url) as connection, connection.pubsub() as pubsub:
        pubsub.psubscribe(keys.stream_key("*"))
        pubsub.get_message(timeout=5)
        start = time.perf_counter()
        client.submit_many(requests)
        num_tokens = num_done = 0
        while num_done < len(requests):
            message = pubsub.get_message(ignore_subscribe_messages=True, timeout=60)
            if message is None:
                continue
            entry = parse_entry(message["data"].partition(b" ")[2])
            if isinstance(entry, Done):
                num_done += 1
            else:
                num_tokens += len(entry.token_ids)
        seconds = time.perf_counter() - start
    if num_tokens != workload.num_output_tokens:
        raise SystemExit(f"{num_tokens} tokens were shown instead of {workload.num_output_tokens}")
    return seconds


def report(speeds: dict[str, list[float]], num_prompts: int, model: str) -> None:
    base = speeds["publish only"]
    rows = []
    for name, values in speeds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        rows.append(
            [
                name,
                f"{statistics.median(values):.0f}",
                f"{min(values):.0f} to {max(values):.0f}",
                f"{statistics.median(ratios):.3f}",
                f"{min(ratios):.3f} to {max(ratios):.3f}",
            ]
        )
    notes = [
        f"{model}, {num_prompts} prompts U(32,256) → U(32,128) tokens, greedy, {len(base)} rounds in turn, medians.",
        "The ratio is taken round by round. Both workers lease, commit and write results alike; the first one only "
        "leaves out the stream.",
    ]
    columns = ["worker", "output tokens/s", "min to max", "ratio", "min to max of the ratio"]
    print_and_keep("durability_cost", columns, rows, notes)


if __name__ == "__main__":
    main()
