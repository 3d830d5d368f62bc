"""Throughput and latency over the last hour, in buckets of ten seconds a queue. Pure: times are given, none is read.

A job counts in the bucket in which it ended, with all its tokens. Latencies are counted in logarithmic bins, so that
buckets can be merged and a busy hour takes no more memory than a quiet one; a percentile is exact to half a bin.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from producer.gateway.console.ended_jobs import EndedJob

BUCKET_SECONDS = 10
WINDOW_SECONDS = 3600
BIN_GROWTH = 1.05  # of a latency bin over the one below: percentiles to 2.5 %
MIN_SECONDS = 0.001  # everything below is the first bin


@dataclass(slots=True)
class Bucket:
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0  # RQ's stopped ones, too
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    first_token: Counter[int] = field(default_factory=Counter)  # latency bin → jobs
    total: Counter[int] = field(default_factory=Counter)

    def add(self, job: EndedJob) -> None:
        self.num_finished += job.status == "finished"
        self.num_failed += job.status == "failed"
        self.num_cancelled += job.status in ("cancelled", "stopped")
        self.num_prompt_tokens += job.usage.prompt_tokens
        self.num_output_tokens += job.usage.completion_tokens
        if job.timings.first_token is not None:
            self.first_token[_bin_of(job.timings.first_token)] += 1
        if job.timings.total is not None and job.status == "finished":  # what was cut short says nothing
            self.total[_bin_of(job.timings.total)] += 1

    def merge(self, other: "Bucket") -> None:
        self.num_finished += other.num_finished
        self.num_failed += other.num_failed
        self.num_cancelled += other.num_cancelled
        self.num_prompt_tokens += other.num_prompt_tokens
        self.num_output_tokens += other.num_output_tokens
        self.first_token.update(other.first_token)
        self.total.update(other.total)


class ResultSeries:
    """Buckets by queue and by number, which is the epoch second divided by `BUCKET_SECONDS`."""

    def __init__(self) -> None:
        self._buckets: dict[str, dict[int, Bucket]] = {}

    @property
    def queues(self) -> list[str]:
        """Those that have had an end in the window."""
        return sorted(self._buckets)

    def add(self, job: EndedJob) -> None:
        buckets = self._buckets.setdefault(job.queue, {})
        buckets.setdefault(int(job.ended_at) // BUCKET_SECONDS, Bucket()).add(job)

    def forget(self, now: float) -> None:
        """What is older than the window."""
        first = int(now - WINDOW_SECONDS) // BUCKET_SECONDS
        for queue, buckets in list(self._buckets.items()):
            for number in [number for number in buckets if number < first]:
                del buckets[number]
            if not buckets:
                del self._buckets[queue]

    def read(self, now: float, step_seconds: int, queue: str | None = None) -> tuple[int, list[Bucket]]:
        """The window up to the last whole step: the epoch second it begins at, and a bucket a step, the oldest first.

        `step_seconds` is a multiple of `BUCKET_SECONDS`; `queue` None: all queues together.
        """
        end = int(now) // step_seconds * step_seconds
        begin = end - WINDOW_SECONDS // step_seconds * step_seconds
        steps = [Bucket() for _ in range((end - begin) // step_seconds)]
        chosen = self._buckets.values() if queue is None else [self._buckets.get(queue, {})]
        for number, bucket in ((number, bucket) for buckets in chosen for number, bucket in buckets.items()):
            at = (number * BUCKET_SECONDS - begin) // step_seconds
            if 0 <= at < len(steps):
                steps[at].merge(bucket)
        return begin, steps


def merged(buckets: Iterable[Bucket]) -> Bucket:
    whole = Bucket()
    for bucket in buckets:
        whole.merge(bucket)
    return whole


def percentile(bins: Counter[int], share: float) -> float | None:
    """Seconds that this share of the counted jobs took at most; None where none was counted."""
    left = math.ceil(share * bins.total())
    for number, count in sorted(bins.items()):
        left -= count
        if left <= 0:
            return float(MIN_SECONDS * BIN_GROWTH ** (number + 0.5))
    return None


def _bin_of(seconds: float) -> int:
    return max(0, math.floor(math.log(max(seconds, MIN_SECONDS) / MIN_SECONDS, BIN_GROWTH)))
