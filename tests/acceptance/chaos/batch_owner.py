"""Whoever has batches run: uploads a file, makes a batch of it, perhaps cancels it, and reads what there is meanwhile.

Asks any gateway, and again where one does not answer, until the batch has ended or the run is over.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import redis

from producer.gateway.batches.batch_keys import batch_key
from tests.acceptance.chaos.asking import Asking
from tests.fakes.batches import URL, jsonl, line

MAX_TOKENS = 30
LARGE_CHARS = 600_000  # of a prompt of one word: with some of them a file is written to S3 in pieces
ENDED = ("completed", "failed", "expired", "cancelled")


@dataclass(slots=True)
class Line:
    body: dict[str, Any]
    is_refused: bool = False


@dataclass(slots=True)
class Plan:
    """A batch to be: its lines by custom_id, and what becomes of it besides."""

    name: str
    lines: dict[str, Line]
    is_invalid: bool
    cancel_after: float | None = None  # seconds
    expire_after: float | None = None

    @property
    def data(self) -> bytes:
        rows = [line(custom_id, body=entry.body) for custom_id, entry in self.lines.items()]
        return jsonl([*rows, rows[0]] if self.is_invalid else rows)

    @classmethod
    def make(cls, name: str, rng: random.Random, *, may_be_large: bool) -> "Plan":
        share, is_large = rng.choice((0.0, 0.2)), rng.random() < 0.2 and may_be_large
        lines: dict[str, Line] = {}
        for at in range(rng.randint(1, 60)):
            body: dict[str, Any] = {
                "prompt": f"{name} {at}",
                "seed": rng.randrange(900),
                "max_tokens": rng.randint(1, MAX_TOKENS),
            }
            if is_large and rng.random() < 0.4:
                body["prompt"] += " " + "x" * LARGE_CHARS
            is_refused = rng.random() < share
            lines[f"{name}-{at}"] = Line(body | ({"temperature": 9} if is_refused else {}), is_refused)
        plan = cls(name, lines, is_invalid=rng.random() < 0.1)
        if rng.random() < 0.3:
            plan.cancel_after = rng.uniform(0.0, 8.0)
        elif rng.random() < 0.2:
            plan.expire_after = rng.uniform(0.0, 6.0)
        return plan


@dataclass(slots=True, kw_only=True)
class Owner(Asking):
    plan: Plan
    connection: redis.Redis
    num_uploads: int = 0
    has_begun: bool = False
    _counts: tuple[int, int] = (0, 0)
    _output: bytes = b""

    def go(self, client: httpx.Client) -> None:
        file = self.until(lambda url: self._upload(client, url))
        batch_id = self._create(client, file["id"])
        if self.plan.expire_after is not None:
            expires_at = int(time.time() + self.plan.expire_after)
            self._in_redis(lambda: self.connection.hset(batch_key(batch_id), "expires_at", expires_at))
        self.has_begun = True
        cancel_at = None if self.plan.cancel_after is None else time.monotonic() + self.plan.cancel_after
        while True:
            if cancel_at is not None and time.monotonic() >= cancel_at:
                self.until(lambda url: client.post(f"{url}/v1/batches/{batch_id}/cancel"), 200, 409)
                cancel_at = None
            batch = self.until(lambda url: client.get(f"{url}/v1/batches/{batch_id}"))
            if self.keeps_all:
                self._look(client, batch)
            if batch["status"] in ENDED:
                return
            self.pause()

    def _upload(self, client: httpx.Client, url: str) -> httpx.Response:
        self.num_uploads += 1
        files = {"file": (f"{self.plan.name}.jsonl", self.plan.data)}
        return client.post(f"{url}/v1/files", files=files, data={"purpose": "batch"})

    def _create(self, client: httpx.Client, file_id: str) -> str:
        """Where it is not known whether there is a batch, the list is asked: as the gateway tells its clients."""
        body = {"input_file_id": file_id, "endpoint": URL, "completion_window": "24h"}
        metadata = {"metadata": {"name": self.plan.name}}
        while True:
            made = self.ask(lambda url: client.post(f"{url}/v1/batches", json=body | metadata))
            if made is not None and made.status_code == 200:
                return str(made.json()["id"])
            page = self.until(lambda url: client.get(f"{url}/v1/batches", params={"limit": 100}))
            found = [batch["id"] for batch in page["data"] if batch["metadata"]["name"] == self.plan.name]
            if found:
                return str(found[0])
            self.pause()

    def _look(self, client: httpx.Client, batch: dict[str, Any]) -> None:
        """Counts never go back, and what was written stays as it is."""
        counts = (batch["request_counts"]["completed"], batch["request_counts"]["failed"])
        if counts[0] < self._counts[0] or counts[1] < self._counts[1] or sum(counts) > batch["request_counts"]["total"]:
            self.problems.append(f"counts {counts} behind {self._counts}, of {batch['request_counts']['total']}")
        self._counts = counts
        if not batch["output_file_id"] or self.rng.random() < 0.7:
            return
        answer = self.ask(lambda url: client.get(f"{url}/v1/files/{batch['output_file_id']}/content"))
        if answer is None or answer.status_code != 200:
            return
        if not answer.content.startswith(self._output):
            self.problems.append(f"its output does not begin with the {len(self._output)} bytes seen before")
        num_lines = [json.loads(text)["custom_id"] for text in answer.content.splitlines()]
        if len(num_lines) < counts[0]:
            self.problems.append(f"{len(num_lines)} lines, and the batch says {counts[0]}")
        self._output = answer.content

    def _in_redis(self, call: Callable[[], object]) -> None:
        while True:
            try:
                call()
                return
            except redis.RedisError:
                self.pause()
