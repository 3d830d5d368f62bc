"""How long a gateway takes to validate and enqueue a file of 50,000 requests, in how much memory, and who notices.

A gateway process is given the file through the API. First nobody works, so that all of it must be enqueued; then a sink
answers the jobs as fast as it can be written. Meanwhile a client asks /health/live again and again. Run with `python -m
benchmarks.batch_file`.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx2 as httpx
import openai
import redis

from benchmarks.gateway_fixture import announce, gateway_process
from benchmarks.process_figures import children, memory_bytes
from benchmarks.report import print_and_keep
from producer.contract import Choice, Result, Usage, keys
from worker.embedded_redis import EmbeddedRedis

MODEL = "none"
URL: Final = "/v1/chat/completions"
QUEUE = keys.class_queue(keys.DEFAULT_QUEUE, "low")
NUM_SYSTEM_PROMPTS = 8
SAMPLE_SECONDS = 0.02

WHOLE_FILE_AT_ONCE = ("--batch-max-in-flight", "1000000", "--max-queue-depth", "1000000")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-lines", type=int, default=50_000)
    parser.add_argument("--system-chars", type=int, default=600)
    parser.add_argument("--user-chars", type=int, default=300)
    options = parser.parse_args()
    with EmbeddedRedis() as server, tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        _write_file(source, options)
        announce(server.url, MODEL)
        with gateway_process(server.url, "--files", f"{folder}/files", *WHOLE_FILE_AT_ONCE) as (address, process):
            rows = _measure(server.url, process.pid, address, source, options.num_lines)
    columns = ["phase", "seconds", "lines/s", "gateway, peak", "carrier, peak", "/health/live p50", "p99", "max"]
    notes = [
        f"{options.num_lines} lines, {source_megabytes(options)} MB; Redis, gateway, carrier, client on the same cores",
        "validated: from POST /v1/batches to in_progress; enqueued: to the last job on its queue, none of them running",
        "answered: a sink takes all jobs and writes their results; to `completed`, both files readable",
    ]
    print_and_keep("batch_file", columns, rows, notes)


def source_megabytes(options: argparse.Namespace) -> int:
    size: float = options.num_lines * (options.system_chars + options.user_chars + 150)
    return round(size / 1e6)


def _write_file(path: Path, options: argparse.Namespace) -> None:
    rng = random.Random(7)

    def text(num_chars: int) -> str:
        return "".join(rng.choices("etaoin shrdlu", k=num_chars))

    systems = [text(options.system_chars) for _ in range(NUM_SYSTEM_PROMPTS)]
    with path.open("w") as file:
        for number in range(options.num_lines):
            messages = [
                {"role": "system", "content": rng.choice(systems)},
                {"role": "user", "content": text(options.user_chars)},
            ]
            body = {"model": MODEL, "messages": messages, "max_tokens": 100, "temperature": 0}
            line = {"custom_id": f"request-{number}", "method": "POST", "url": URL, "body": body}
            file.write(json.dumps(line) + "\n")


def _measure(url: str, pid: int, address: str, source: Path, num_lines: int) -> list[list[str]]:
    with (
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=600) as client,
        redis.Redis.from_url(url) as connection,
    ):
        rows = []
        watch = _Watch(pid, address)
        with watch:
            time.sleep(3.0)
        rows.append(watch.row("idle", None, num_lines))

        with source.open("rb") as file:
            file_id = client.files.create(file=file, purpose="batch").id
        watch = _Watch(pid, address)
        with watch:
            began = time.monotonic()
            batch = client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h")
            _wait(lambda: client.batches.retrieve(batch.id).status != "validating")
            validated = time.monotonic() - began
            assert client.batches.retrieve(batch.id).status == "in_progress"
            _wait(lambda: connection.llen(f"rq:queue:{QUEUE}") >= num_lines)
            enqueued = time.monotonic() - began
        rows.append(watch.row("validated", validated, num_lines, is_part=True))
        rows.append(watch.row("validated and enqueued", enqueued, num_lines))

        watch = _Watch(pid, address)
        sink = multiprocessing.Process(target=_answer_all, args=(url, num_lines))
        with watch:
            began = time.monotonic()
            sink.start()
            _wait(lambda: client.batches.retrieve(batch.id).status == "completed")
            answered = time.monotonic() - began
        sink.join()
        ended = client.batches.retrieve(batch.id)
        assert ended.request_counts is not None and ended.request_counts.completed == num_lines
        assert ended.output_file_id is not None
        lines = client.files.content(ended.output_file_id).read().splitlines()
        assert len({json.loads(line)["custom_id"] for line in lines}) == len(lines) == num_lines
        rows.append(watch.row("answered", answered, num_lines))
    return rows


def _wait(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.1)


@dataclass
class _Watch:
    """How long /health/live takes while the block runs, and how much memory the gateway and its carrier."""

    pid: int
    address: str
    latencies: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=lambda: {"gateway": 0, "carrier": 0})

    def __enter__(self) -> "_Watch":
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with httpx.Client(base_url=self.address, timeout=60) as client:
            while not self._is_over.wait(SAMPLE_SECONDS):
                began = time.perf_counter()
                client.get("/health/live")
                self.latencies.append(time.perf_counter() - began)
                carriers = sum(_resident_bytes(child) for child in children(self.pid))
                self.peaks["carrier"] = max(self.peaks["carrier"], carriers)
                self.peaks["gateway"] = max(self.peaks["gateway"], _resident_bytes(self.pid))

    def row(self, phase: str, seconds: float | None, num_lines: int, *, is_part: bool = False) -> list[str]:
        """`is_part`: of a phase whose figures stand in the next row."""
        ordered = sorted(self.latencies)
        figures = [
            *(f"{peak / 2**20:.0f} MiB" for peak in (self.peaks["gateway"], self.peaks["carrier"])),
            *(f"{1000 * ordered[int(share * (len(ordered) - 1))]:.1f} ms" for share in (0.5, 0.99, 1.0)),
        ]
        speed = ["", ""] if seconds is None else [f"{seconds:.1f}", f"{num_lines / seconds:.0f}"]
        return [phase, *speed, *(figures if not is_part else [""] * len(figures))]


def _resident_bytes(pid: int) -> int:
    try:
        return memory_bytes(pid, "VmRSS")
    except OSError:
        return 0


def _answer_all(url: str, num_jobs: int) -> None:
    """A worker without an engine: each job's result, its line and its status, hundreds in one round trip."""
    usage = Usage(prompt_tokens=250, completion_tokens=100, total_tokens=350)
    choice = Choice(index=0, text="an answer " * 30, token_ids=list(range(100)), finish_reason="length")
    num_left = num_jobs
    with redis.Redis.from_url(url) as connection:
        while num_left:
            ids = connection.lpop(f"rq:queue:{QUEUE}", 200) or []
            with connection.pipeline(transaction=False) as pipeline:
                for job_id in ids:
                    name = job_id.decode()
                    whole = Result(job_id=name, model=MODEL, status="finished", choices=[choice], usage=usage)
                    pipeline.set(keys.result_key(name), whole.to_wire(), ex=keys.RESULT_TTL_SECONDS)
                    pipeline.hset(f"rq:job:{name}", "status", "finished")
                    pipeline.publish(keys.results_channel(QUEUE), json.dumps({"job_id": name}))
                pipeline.execute()
            num_left -= len(ids)


if __name__ == "__main__":
    main()
