"""Whoever reads an answer as a stream of events, drops it at any moment and goes on behind its cursor at any gateway.

Several ask under one idempotency key at once: the job is the same, and each sees all of it.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from tests.acceptance.chaos.asking import Asking, answer_text

URL = "/v1/completions"


@dataclass(slots=True)
class StreamReader(Asking):
    """`job_id` and `num_visits`: of a job that was asked for with `body` under `key`."""

    key: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    job_id: str | None = None
    num_visits: int = 0
    _texts: dict[int, str] = field(default_factory=dict)
    _cursor: str | None = None
    _has_ended: bool = False

    @property
    def has_begun(self) -> bool:
        return self.job_id is not None

    def go(self, client: httpx.Client) -> None:
        while not self._has_ended:
            self.num_visits += 1
            with suppress(httpx.TransportError):
                self._visit(client, self.rng.choice(self.urls), self.rng.choice((None, self.rng.randint(1, 40))))
            if not self._has_ended:
                self.pause()
        right = {index: answer_text(self.body, index) for index in range(self.body["n"])}
        if self._texts != right:
            self.problems.append(f"saw {self._texts} instead of {right}")

    def _visit(self, client: httpx.Client, url: str, max_events: int | None) -> None:
        """Read some events, and leave in the middle or at the end."""
        begins_anew = (
            not self.keeps_all or self.rng.random() < 0.1
        )  # a cursor alone may lead to another attempt's entries
        if self.job_id is None or self._cursor is None or begins_anew:
            self._texts, self._cursor = {}, None
            headers = {"idempotency-key": self.key}
            asked = client.stream("POST", f"{url}{URL}", json=self.body, headers=headers)
        else:
            asked = client.stream("GET", f"{url}/v1/jobs/{self.job_id}/stream?after={self._cursor}")
        with asked as response:
            if response.status_code != 200:
                if response.status_code < 500 and response.status_code not in (404, 408, 429):
                    raise AssertionError(f"{response.status_code} {response.read()!r}")
                return
            for at, event in enumerate(line for line in response.iter_lines() if line.startswith("data: ")):
                if event == "data: [DONE]":
                    self._has_ended = True
                if self._has_ended or at == max_events or not self._take(json.loads(event.removeprefix("data: "))):
                    return

    def _take(self, event: dict[str, Any]) -> bool:
        """False: an error, which says that the stream ends early."""
        if "error" in event:
            return False
        ours = event.get("promptmill", {})
        if ours.get("reset"):
            self._texts = {}
            if self.keeps_all:
                self.problems.append("a reset")
        for choice in event["choices"]:
            self._texts[choice["index"]] = self._texts.get(choice["index"], "") + choice["text"]
        self._cursor = ours.get("cursor", self._cursor)
        job_id = ours.get("job_id", self.job_id)
        if self.job_id not in (None, job_id):
            self.problems.append(f"one key, two jobs: {self.job_id} {job_id}")
        self.job_id = job_id
        return True
