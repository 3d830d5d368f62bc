"""What a gateway adds to a streamed token: 1,000 simultaneous streams on one process, beside plain Redis subscribers.

    python -m benchmarks.gateway_streams [--num-streams 1000] [--num-tokens 50] [--tokens-per-second 4]

A writer appends the tokens of all jobs at a steady rate, as a worker does (XADD and PUBLISH, one token an entry), each
with the time it was written in its text. The same streams are read twice in one run: by HTTP clients through one
gateway process, and by a plain subscriber (one redis-py connection for all channels) in a process of its own. Shown:
the delay from the write to the reader, the reading process's CPU time a token, its memory.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio

from benchmarks.gateway_fixture import announce, gateway_process
from benchmarks.process_figures import cpu_seconds, memory_bytes
from benchmarks.report import print_and_keep
from producer.contract import Chunk, Done, Marker, Usage, keys
from worker.embedded_redis import EmbeddedRedis

MODEL = "stand-in"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-streams", type=int, default=1000)
    parser.add_argument("--num-tokens", type=int, default=50)
    parser.add_argument("--tokens-per-second", type=float, default=4.0, help="of each stream")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8 * options.num_streams + 1000)), hard))
    with EmbeddedRedis() as server:
        announce(server.url, MODEL)
        plain = _run_plain(server.url, options)
        gateway = _run_gateway(server.url, options)
    num_entries = options.num_streams * options.num_tokens
    rows = [
        _row("plain subscriber", plain, num_entries, None),
        _row("gateway", gateway, num_entries, plain),
    ]
    print_and_keep(
        "gateway_streams",
        ["reader", "delay p50", "p99", "CPU a token", "ratio", "memory", "memory a stream"],
        rows,
        [
            f"{options.num_streams} streams at once, {options.num_tokens} tokens each, "
            f"{options.tokens_per_second:g} tokens a second each, "
            f"{options.tokens_per_second * options.num_streams:g} in all",
            "delay: from just before XADD to the text in the reader's hands; writer, Redis, readers share the cores",
            "memory: of the reading process with every stream open; a stream's share is its growth from none to all",
        ],
    )


class Measured(dict[str, Any]):
    """delays (seconds, sorted), cpu_seconds, memory_bytes, growth_bytes."""


def _row(name: str, measured: Measured, num_entries: int, peer: Measured | None) -> list[str]:
    delays = measured["delays"]
    assert len(delays) == num_entries, f"{name}: {len(delays)} of {num_entries} tokens arrived"
    cost = measured["cpu_seconds"] / num_entries
    ratio = f"{measured['cpu_seconds'] / peer['cpu_seconds']:.1f}" if peer else "1.0"
    return [
        name,
        f"{1000 * statistics.median(delays):.1f} ms",
        f"{1000 * delays[int(len(delays) * 0.99)]:.1f} ms",
        f"{1e6 * cost:.0f} µs",
        ratio,
        f"{measured['memory_bytes'] / 2**20:.0f} MiB",
        f"{measured['growth_bytes'] / measured['num_streams'] / 1024:.0f} KiB",
    ]


def _write(url: str, job_ids: Sequence[str], num_tokens: int, tokens_per_second: float) -> None:
    """All jobs' tokens, evenly spread over time, as a worker appends them."""
    connection = redis.Redis.from_url(url)
    batch = 20
    interval = 1 / tokens_per_second / max(1, len(job_ids) / batch)
    for job_id in job_ids:
        marker = Marker(job_id=job_id, attempt=1, worker="writer", prompt_token_ids=[1])
        connection.xadd(keys.stream_key(job_id), {keys.MARKER_FIELD: marker.to_wire()}, id="1-0")
    due = time.monotonic()
    for token in range(num_tokens):
        for start in range(0, len(job_ids), batch):
            due += interval
            time.sleep(max(0.0, due - time.monotonic()))
            with connection.pipeline(transaction=False) as pipe:
                for job_id in job_ids[start : start + batch]:
                    _append(pipe, job_id, token, is_last=token == num_tokens - 1)
                pipe.execute()


def _append(pipe: Any, job_id: str, token: int, *, is_last: bool) -> None:
    key = keys.stream_key(job_id)
    text = f"{time.time():.6f} "
    reason: Any = "length" if is_last else None
    entries: list[Chunk | Done] = [
        Chunk(job_id=job_id, token_offset=token, text=text, token_ids=[token], finish_reason=reason)
    ]
    if is_last:
        entries.append(Done(job_id=job_id, done=True, status="finished", usage=Usage(completion_tokens=token + 1)))
    for number, entry in enumerate(entries):
        entry_id, data = f"1-{token + 1 + number}", entry.to_wire()
        pipe.xadd(key, {keys.DATA_FIELD: data}, id=entry_id)
        pipe.publish(key, f"{entry_id} {data}")


def _run_plain(url: str, options: argparse.Namespace) -> Measured:
    job_ids = [f"plain-{number}" for number in range(options.num_streams)]
    ours, theirs = multiprocessing.Pipe()
    reader = multiprocessing.Process(target=_read_plain, args=(url, job_ids, theirs))
    reader.start()
    assert ours.recv() == "subscribed"
    _write(url, job_ids, options.num_tokens, options.tokens_per_second)
    measured: Measured = ours.recv()
    reader.join()
    return measured


def _read_plain(url: str, job_ids: Sequence[str], pipe: Any) -> None:
    async def read() -> Measured:
        before = memory_bytes(os.getpid(), "VmRSS")
        async with redis.asyncio.Redis.from_url(url) as connection, connection.pubsub() as pubsub:
            await pubsub.subscribe(*(keys.stream_key(job_id) for job_id in job_ids))
            pipe.send("subscribed")
            delays, num_open = [], len(job_ids)
            memory = memory_bytes(os.getpid(), "VmRSS")
            started = time.process_time()
            async for message in pubsub.listen():
                if message["type"] != "message":
                    continue
                entry = json.loads(message["data"].partition(b" ")[2])
                if entry.get("done"):
                    num_open -= 1
                    if num_open == 0:
                        break
                else:
                    delays.append(time.time() - float(entry["text"]))
            return _measured(delays, time.process_time() - started, memory, memory - before, len(job_ids))
        raise AssertionError("unreachable")

    pipe.send(asyncio.run(read()))


def _run_gateway(url: str, options: argparse.Namespace) -> Measured:
    with gateway_process(url) as (address, gateway):
        port = urlsplit(address).port
        before = memory_bytes(gateway.pid, "VmRSS")
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        reader = context.Process(target=_read_http, args=(port, options.num_streams, theirs))
        reader.start()
        job_ids = ours.recv()
        cpu, memory = cpu_seconds(gateway.pid), memory_bytes(gateway.pid, "VmRSS")
        _write(url, job_ids, options.num_tokens, options.tokens_per_second)
        delays = ours.recv()
        reader.join()
        spent = cpu_seconds(gateway.pid) - cpu
        return _measured(delays, spent, memory, memory - before, options.num_streams)


def _read_http(port: int, num_streams: int, pipe: Any) -> None:
    """Clients as lean as they can be, so that they take little from the gateway's cores."""
    delays: list[float] = []
    connecting = asyncio.Semaphore(32)  # a burst beyond the kernel's backlog would wait for its own retransmissions

    async def follow(number: int, opened: asyncio.Queue[str]) -> None:
        async with connecting:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"model": MODEL, "prompt": f"stream {number}", "stream": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        )
        writer.write(f"{head}\r\n\r\n".encode() + body)
        async for line in reader:
            if line.startswith(b"x-promptmill-job-id: "):
                opened.put_nowait(line.split()[1].decode())
            elif line.startswith(b"data: {"):
                delays.append(time.time() - float(json.loads(line[6:])["choices"][0]["text"]))
            elif line.startswith(b"data: [DONE]"):
                break
        writer.close()

    async def run() -> None:
        opened: asyncio.Queue[str] = asyncio.Queue()
        followers = [asyncio.create_task(follow(number, opened)) for number in range(num_streams)]
        pipe.send([await opened.get() for _ in range(num_streams)])
        await asyncio.gather(*followers)
        pipe.send(delays)

    asyncio.run(run())


def _measured(delays: list[float], cpu: float, memory: int, growth: int, num_streams: int) -> Measured:
    return Measured(
        delays=sorted(delays), cpu_seconds=cpu, memory_bytes=memory, growth_bytes=growth, num_streams=num_streams
    )


if __name__ == "__main__":
    main()
