"""A simulated fleet for the console's screenshots: an hour of results, and workers that go on as if they had models.

It writes to a real Redis what workers and producers write: results lines, streams, leases, registries, what workers
say of themselves.
"""

import asyncio
import math
import random
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import redis
from redis.typing import EncodableT, FieldT

from producer import Client
from producer.contract import ErrorCode, ErrorInfo, Result, Timings, Usage, WorkerInfo, keys
from tests.fakes.batches import batch_bench, line
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.held_job import HeldJob

HISTORY_SECONDS = 3590
TICK_SECONDS = 0.1
TOKENS_PER_SECOND = 58.0
CHARS_PER_TOKEN = 4

PROMPTS = [
    "Summarise the attached support ticket in two sentences.",
    "Translate the product description into Dutch and keep the tone.",
    "Extract name, street and city from this letter as JSON.",
    "Is this review positive, negative or mixed? Answer with one word.",
    "Write a subject line for a newsletter about autumn recipes.",
    "Which of these invoices is overdue? List their numbers.",
    "Rewrite the paragraph for a reader without background knowledge.",
    "Name three risks in the following contract clause.",
    "Give the article a headline of at most eight words.",
    "Classify the call by topic: billing, delivery, returns or other.",
]
ANSWER = (
    "The customer reports that the second parcel of the order arrived a day late and that its box was torn, but that "
    "nothing in it is broken. She would like to know whether the delivery fee can be given back, and asks for a reply "
    "by e-mail rather than by telephone. The first parcel came in time. "
)
FAILURES = [
    ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message="prompt: has 9,214 tokens; the model takes 8,192 in all"),
    ErrorInfo(code=ErrorCode.DEADLINE_EXCEEDED, message="the job's deadline passed before it had put out a token"),
    ErrorInfo(
        code=ErrorCode.INVALID_REQUEST, message="response_format: the schema does not compile: unknown type 'dat'"
    ),
]


@dataclass(frozen=True)
class Load:
    """A queue of the fleet: jobs that end in a second, their tokens, the seconds to a first token, tokens a second."""

    queue: str
    model: str
    jobs_per_second: float
    num_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    phase: float


LOADS = [
    Load("promptmill", "qwen3-8b", 0.9, 220, 0.35, 62.0, 0.0),
    Load("promptmill:low", "qwen3-8b", 1.1, 310, 2.4, 58.0, 2.1),
    Load("promptmill@acme", "qwen3-8b", 0.25, 140, 0.5, 60.0, 4.0),
    Load("extraction", "smollm2-135m", 0.7, 45, 0.12, 85.0, 1.0),
]


class Fleet:
    def __init__(self, url: str, seed: int = 11) -> None:
        self._url = url
        self._redis = redis.Redis.from_url(url)
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._members = [
            Member(url, "gpu-a-0", "cuda:0", "qwen3-8b", ["promptmill", "promptmill@acme"], 9, 41_200, 0.71),
            Member(url, "gpu-a-1", "cuda:1", "qwen3-8b", ["promptmill:low"], 24, 41_200, 0.88),
            Member(url, "cpu-b", "cpu", "smollm2-135m", ["extraction"], 4, 2_048, 0.23),
        ]

    def write_history(self) -> None:
        """The last hour, up to now."""
        now = time.time()
        for load in LOADS:
            with self._redis.pipeline(transaction=False) as pipe:
                at = now - HISTORY_SECONDS
                while (at := at + self._random.expovariate(self._rate(load, at - now))) < now:
                    self._add_end(pipe, load, at, now)
                pipe.execute()

    def _rate(self, load: Load, seconds: float) -> float:
        """Jobs a second, some time ago: waves, and eight minutes in which a worker was missing."""
        wave = 1 + 0.35 * math.sin(seconds / 420 + load.phase) + 0.1 * math.sin(seconds / 90)
        return load.jobs_per_second * wave * (0.45 if self._is_short(load, seconds) else 1.0)

    def _is_short(self, load: Load, seconds: float) -> bool:
        return -1500 < seconds < -1020 and load.model == "qwen3-8b"

    def _add_end(self, pipe: "redis.client.Pipeline", load: Load, at: float, now: float) -> None:
        slow = 5.0 if self._is_short(load, at - now) else 1.0
        num_tokens = max(4, round(load.num_tokens * self._random.lognormvariate(0, 0.45)))
        first = load.first_token_seconds * slow * self._random.lognormvariate(0, 0.4)
        failed = self._random.random() < (0.02 if slow > 1 else 0.006)
        result = Result(
            job_id=f"{self._random.getrandbits(128):032x}",
            model=load.model,
            status="failed" if failed else "finished",
            usage=Usage(prompt_tokens=4 * num_tokens, completion_tokens=num_tokens, total_tokens=5 * num_tokens),
            timings=Timings(
                queued=first * 0.7,
                first_token=None if failed else first,
                total=first + num_tokens / load.tokens_per_second,
            ),
            attempts=1,
            error=self._random.choice(FAILURES) if failed else None,
        )
        pipe.xadd(keys.results_channel(load.queue), {keys.DATA_FIELD: result.to_wire()}, id=f"{int(at * 1000)}-*")
        if failed or at > now - 20:
            _add_record(pipe, load.queue, result, at, self._random.choice(PROMPTS))

    def start(self, files: Path) -> None:
        """Jobs on every queue, batches whose files lie in `files`, and workers at work on them."""
        with Client(self._url) as client:
            for load, number in zip(LOADS, (60, 0, 24, 40), strict=True):
                queue, tenant = keys.split_tenant(load.queue)
                for _ in range(number):
                    prompt = self._random.choice(PROMPTS)
                    client.submit(prompt, queue=queue, tenant=tenant, max_tokens=load.num_tokens)
        asyncio.run(self._make_batches(files))
        for member in self._members:
            member.start(self._stop)

    async def _make_batches(self, files: Path) -> None:
        """One whose file is wrong, one that ends soon, and one that is under way for long."""
        async with batch_bench(self._url, files) as bench:
            broken = [line("a", PROMPTS[0], body={"model": "qwen3-8b"}), line("a", PROMPTS[1], url="/v1/images")]
            await bench.create(broken)
            for number in (24, 400):
                body = {"model": "qwen3-8b", "max_tokens": 300}
                lines = [line(f"review-{at}", self._random.choice(PROMPTS), body=body) for at in range(number)]
                await bench.create(lines, metadata={"project": "reviews"})

    def stop(self) -> None:
        self._stop.set()
        for member in self._members:
            member.join()
        self._redis.close()


def _add_record(pipe: "redis.client.Pipeline", queue: str, result: Result, at: float, prompt: str) -> None:
    seconds = result.timings.total or 0.0
    fields: dict[FieldT, EncodableT] = {
        "status": result.status,
        "origin": queue,
        "description": f"promptmill.generate(prompt='{prompt}')",
        "enqueued_at": _utc(at - seconds),
        "started_at": _utc(at - seconds + (result.timings.queued or 0.0)),
        "ended_at": _utc(at),
    }
    pipe.hset(f"rq:job:{result.job_id}", mapping=fields)
    pipe.set(keys.result_key(result.job_id), result.to_wire())
    pipe.zadd(f"rq:{'failed' if result.status == 'failed' else 'finished'}:{queue}", {result.job_id: at + 86_400})


def _utc(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass
class Underway:
    held: HeldJob
    begun_at: float
    num_tokens: int
    num_written: int = 0


@dataclass
class Member:
    """One worker of the fleet, on a thread."""

    url: str
    name: str
    device: str
    model: str
    queues: list[str]
    num_jobs: int
    num_blocks: int
    kv_share: float
    _jobs: list[Underway] = field(default_factory=list)
    _num_ended: int = 0

    def start(self, stop: threading.Event) -> None:
        self._stop = stop
        self._random = random.Random(self.name)
        self._started_at = time.time() - 3 * 3600 - self._random.random() * 7200
        self._workers = [FakeWorker(self.url, queue, self.name) for queue in self.queues]
        self._thread = threading.Thread(target=self._run, name=self.name)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(30)
        for worker in self._workers:
            worker.close()

    def _run(self) -> None:
        beat_at = 0.0
        while not self._stop.wait(TICK_SECONDS):
            self._claim()
            for job in list(self._jobs):
                self._advance(job)
            if time.time() >= beat_at:
                self._beat()
                beat_at = time.time() + 1.0

    def _claim(self) -> None:
        for worker in self._workers:
            if len(self._jobs) >= self.num_jobs:
                return
            held = worker.try_claim(0.001)
            if held is None or not held.attempt:
                continue
            now = time.time()
            worker.connection.hset(f"rq:job:{held.job_id}", "started_at", _utc(now))
            worker.connection.zadd(f"rq:wip:{held.queue}", {f"{held.job_id}:1": now + 3600})
            held.model, held.num_prompt_tokens = self.model, self._random.randint(200, 2_000)
            self._jobs.append(Underway(held.begin(), now, self._random.randint(200, 900)))

    def _advance(self, job: Underway) -> None:
        wanted = min(job.num_tokens, int((time.time() - job.begun_at) * TOKENS_PER_SECOND))
        number = wanted - job.num_written
        if number:
            places = range(job.num_written * CHARS_PER_TOKEN, wanted * CHARS_PER_TOKEN)
            text = "".join(ANSWER[at % len(ANSWER)] for at in places)
            job.num_written = wanted
            job.held.write(text, finish_reason="stop" if wanted == job.num_tokens else None, num_tokens=number)
        if wanted == job.num_tokens:
            self._end(job)

    def _end(self, job: Underway) -> None:
        seconds = time.time() - job.begun_at
        job.held.timings = Timings(queued=0.3, first_token=0.45, total=seconds)
        self._num_ended += 1
        fails = self._num_ended % 13 == 5
        job.held.end("failed", error=self._random.choice(FAILURES)) if fails else job.held.end()
        connection = job.held.connection
        connection.hset(f"rq:job:{job.held.job_id}", "ended_at", _utc(time.time()))
        connection.zrem(f"rq:wip:{job.held.queue}", f"{job.held.job_id}:1")
        registry = "failed" if fails else "finished"
        connection.zadd(f"rq:{registry}:{job.held.queue}", {job.held.job_id: time.time() + 86_400})
        self._jobs.remove(job)

    def _beat(self) -> None:
        used = round(self.num_blocks * self.kv_share * self._random.uniform(0.94, 1.04))
        info = WorkerInfo(
            name=self.name,
            queues=self.queues,
            models=[self.model],
            context_length=8192,
            device=self.device,
            hostname=self.name.rpartition("-")[0],
            pid=1,
            started_at=self._started_at,
            num_running=len(self._jobs),
            num_waiting=self._random.randint(0, 3),
            kv_blocks_used=used,
            kv_blocks_free=self.num_blocks - used,
            tokens_per_second=round(len(self._jobs) * self._random.uniform(54, 62), 1),
            beat_at=time.time(),
        )
        connection = self._workers[0].connection
        connection.set(keys.worker_key(self.name), info.model_dump_json(), ex=15)
        connection.zadd(keys.WORKERS_KEY, {self.name: time.time() + 15})
        connection.zadd(keys.MODELS_KEY, {self.model: time.time()})
