"""The jobs that a worker holds: every claim until its commit, and the admitted jobs."""

from collections import deque
from collections.abc import Iterator

from worker.claim import Claim
from worker.running_job import RunningJob, Stage, StopCause


class HeldJobs:
    """Changed by the loop's thread only; `claims`, `holds`, `is_committing` and `lost` may be read from any thread."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}  # by job id, in the order of the claims
        self._jobs: dict[str, RunningJob] = {}  # the admitted ones of these
        self._waiting: deque[Claim] = deque()  # the others
        self._early_stops: dict[str, StopCause] = {}  # of waiting jobs, by job id
        self._lost: list[Claim] = []

    def __len__(self) -> int:
        return len(self._claims)

    def claims(self) -> list[Claim]:
        return list(self._claims.values())

    def lost(self) -> list[Claim]:
        """Claims that now belong to another attempt, as noticed outside a heartbeat: the next heartbeat reports that
        their worker lives."""
        return list(self._lost)

    def note_lost(self, claim: Claim) -> None:
        self._lost.append(claim)

    def forget_lost(self, num_claims: int) -> None:
        """Drop the first lost claims, which a heartbeat has reported."""
        del self._lost[:num_claims]

    def holds(self, job_id: str) -> bool:
        return job_id in self._claims

    def is_current(self, claim: Claim) -> bool:
        return self._claims.get(claim.job_id) is claim

    def is_committing(self, claim: Claim) -> bool:
        """Whether only the job's commit is left to do."""
        job = self._jobs.get(claim.job_id)
        return job is not None and job.claim is claim and job.stage is Stage.COMMITTING

    def is_current_job(self, job: RunningJob) -> bool:
        return self._jobs.get(job.job_id) is job

    def get(self, job_id: str) -> RunningJob | None:
        """The admitted job; None if it is not held or not admitted yet."""
        return self._jobs.get(job_id)

    def generating(self) -> Iterator[RunningJob]:
        return (job for job in self._jobs.values() if job.stage is Stage.ADMITTED)

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine has or will get. A waiting job counts as one."""
        return len(self._waiting) + sum(job.num_sequences for job in self.generating())

    def take(self, claim: Claim) -> None:
        """Add a claim. It replaces an older claim of the same job, whose lease must have ended, or of a job that had
        the same id."""
        self._claims.pop(claim.job_id, None)
        self._early_stops.pop(claim.job_id, None)
        self._claims[claim.job_id] = claim
        self._waiting.append(claim)

    def next_waiting(self) -> Claim | None:
        """The claim to admit next; it is still waiting until `admit`."""
        while self._waiting and not self.is_current(self._waiting[0]):
            self._waiting.popleft()
        return self._waiting[0] if self._waiting else None

    def admit(self, job: RunningJob) -> None:
        """Add the job of the claim that `next_waiting` returned."""
        assert self._waiting[0] is job.claim
        self._waiting.popleft()
        self._jobs[job.job_id] = job
        job.stop_cause = self._early_stops.pop(job.job_id, job.stop_cause)

    def postpone(self, claim: Claim) -> None:
        """Take the claim that `next_waiting` returned out of the waiting ones until `wait_again`."""
        assert self._waiting[0] is claim
        self._waiting.popleft()

    def wait_again(self, claim: Claim) -> None:
        """Put the claim behind those that wait."""
        self._waiting.append(claim)

    def stop_early(self, job_id: str, cause: StopCause) -> None:
        """Stop the job as soon as it is admitted."""
        self._early_stops[job_id] = cause

    def release(self, claim: Claim) -> None:
        """Drop a job that is committed or belongs to another attempt."""
        if self.is_current(claim):
            del self._claims[claim.job_id]
            self._jobs.pop(claim.job_id, None)
            self._early_stops.pop(claim.job_id, None)
