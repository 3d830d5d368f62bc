"""Jobs that ended of late, as the results streams tell: the newest thousands of them, by id and in order."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from producer.contract import ErrorInfo, JobOutcome, Result, Timings, Usage

MAX_JOBS = 5_000


@dataclass(frozen=True, slots=True)
class EndedJob:
    """One line of a results stream, but for what the console does not show. `ended_at`: epoch seconds, Redis' clock."""

    job_id: str
    queue: str
    ended_at: float
    status: JobOutcome
    model: str | None
    usage: Usage
    timings: Timings
    attempts: int
    error: ErrorInfo | None

    @classmethod
    def from_line(cls, result: Result, queue: str, ended_at: float) -> "EndedJob":
        return cls(
            job_id=result.job_id,
            queue=queue,
            ended_at=ended_at,
            status=result.status,
            model=result.model,
            usage=result.usage,
            timings=result.timings,
            attempts=result.attempts,
            error=result.error,
        )


class EndedJobs:
    """A job that ends twice (it was retried) counts with its last end."""

    def __init__(self, max_jobs: int = MAX_JOBS) -> None:
        self._max_jobs = max_jobs
        self._jobs: OrderedDict[str, EndedJob] = OrderedDict()

    def add(self, job: EndedJob) -> None:
        self._jobs[job.job_id] = job
        self._jobs.move_to_end(job.job_id)
        if len(self._jobs) > self._max_jobs:
            self._jobs.popitem(last=False)

    def find(self, job_id: str) -> EndedJob | None:
        return self._jobs.get(job_id)

    def newest(self, limit: int) -> Iterator[EndedJob]:
        return islice(reversed(self._jobs.values()), limit)
