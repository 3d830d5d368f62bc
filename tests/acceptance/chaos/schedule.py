"""What goes wrong, and when: a list of events that follows from the seed alone."""

import random
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    KILL_PARENT = "kill -9 the worker"
    KILL_CHILD = "kill -9 its engine"
    HANG_CHILD = "SIGSTOP its engine: it is killed where that lasts, and goes on where not"
    TERMINATE = "SIGTERM the worker"
    STOP = "SIGSTOP the worker, SIGCONT later"
    CUT = "cut connections of the worker"
    RESTART_REDIS = "kill -9 Redis, start it again"


WEIGHTS = {
    Fault.KILL_PARENT: 4,
    Fault.KILL_CHILD: 3,
    Fault.HANG_CHILD: 3,
    Fault.TERMINATE: 3,
    Fault.STOP: 3,
    Fault.CUT: 4,
    Fault.RESTART_REDIS: 2,
}


STEP_TIMEOUT_SECONDS = 4.0  # of the workers of a run: longer than a step of a tiny model on a busy machine


@dataclass(frozen=True, slots=True)
class Event:
    at_seconds: float
    """From the start of the faults."""
    fault: Fault
    slot: int
    """Which worker it hits; none for Redis."""
    seconds: float
    """How long it lasts: until the worker is started again, woken, or Redis is back."""

    def __str__(self) -> str:
        return f"{self.at_seconds:6.2f} s  {self.fault} [{self.slot}] for {self.seconds:.2f} s"


def make_schedule(seed: int, *, seconds: float, num_workers: int, lease_seconds: float) -> list[Event]:
    """Faults for `seconds`, a few seconds apart; every kind comes before any comes twice."""
    rng = random.Random(f"faults of {seed}")
    kinds = list(Fault)
    rng.shuffle(kinds)
    events: list[Event] = []
    at = rng.uniform(0.5, 1.5)
    while at < seconds:
        fault = kinds.pop() if kinds else rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        events.append(Event(at, fault, rng.randrange(num_workers), _duration(rng, fault, lease_seconds)))
        at += rng.uniform(0.2, 2.5)
    return events


def _duration(rng: random.Random, fault: Fault, lease_seconds: float) -> float:
    if fault is Fault.STOP:  # shorter than a lease, or longer: then it wakes as a zombie
        return rng.uniform(0.5, 2.5) * lease_seconds
    if fault is Fault.HANG_CHILD:
        return rng.uniform(0.2, 2.0) * STEP_TIMEOUT_SECONDS
    if fault is Fault.RESTART_REDIS:
        return rng.choice((0.0, rng.uniform(0.0, 1.0), rng.uniform(1.0, 1.5) * lease_seconds))
    return rng.uniform(0.0, 2.0)
