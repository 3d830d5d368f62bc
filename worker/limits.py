"""When running jobs must end: deadlines, and RQ's timeouts, which are engine time of an attempt.

The next one is at hand without a look at every job. Knows nothing of what ending a job means.
"""

import heapq

from worker.held_jobs import HeldJobs
from worker.running_job import RunningJob, Stage

_MAX_STALE = 64  # entries of jobs that have ended, beside as many as there are jobs


class Limits:
    """Used from the loop's thread. `now`: monotonic seconds, `epoch_now`: the clock that deadlines are held against."""

    def __init__(self, held: HeldJobs) -> None:
        self._held = held
        self._deadlines: list[tuple[float, str]] = []  # heap of (epoch seconds, job id)
        self._timeouts: list[tuple[float, str]] = []  # heap of (monotonic seconds, job id)

    def add(self, job: RunningJob) -> None:
        """The engine has the job."""
        if job.deadline is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.job_id))
        if job.times_out_at is not None:
            heapq.heappush(self._timeouts, (job.times_out_at, job.job_id))
        if len(self._deadlines) + len(self._timeouts) > 2 * len(self._held) + _MAX_STALE:
            self._rebuild()

    def seconds_until_due(self, now: float, epoch_now: float) -> float | None:
        """None: no limit is near or far. May be that of a job that has ended."""
        waits = [at - clock for heap, clock in self._clocks(now, epoch_now) for at, _ in heap[:1]]
        return max(0.0, min(waits)) if waits else None

    def take_passed(self, now: float, epoch_now: float) -> list[RunningJob]:
        """The jobs that still run and have passed a limit. Each limit is told of once."""
        passed = []
        for heap, clock in self._clocks(now, epoch_now):
            while heap and heap[0][0] <= clock:
                job = self._held.get(heapq.heappop(heap)[1])
                if job is not None and job.stage is Stage.ADMITTED and job.passed_limit(now, epoch_now) is not None:
                    passed.append(job)
        return passed

    def _clocks(self, now: float, epoch_now: float) -> tuple[tuple[list[tuple[float, str]], float], ...]:
        return (self._deadlines, epoch_now), (self._timeouts, now)

    def _rebuild(self) -> None:
        """Drop what belongs to jobs that have ended."""
        running = [job for job in self._held.generating() if job.submitted_at is not None]
        self._deadlines = [(job.deadline, job.job_id) for job in running if job.deadline is not None]
        self._timeouts = [(job.times_out_at, job.job_id) for job in running if job.times_out_at is not None]
        heapq.heapify(self._deadlines)
        heapq.heapify(self._timeouts)
