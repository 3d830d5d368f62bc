"""The jobs of a chaos run, from its seed: all kinds mixed, each reproducible by its id alone."""

import random
from dataclasses import dataclass, field
from typing import Any

TENANTS = (None, None, "acme", "zeta")
CLASSES = (None, None, "high", "low")
STOP_STRINGS = ("e", "th", "\n", "qz", "ab")
WORDS = (
    "river",
    "mill",
    "naïve",
    "quick",
    "brown",
    "fox",
    "世界",
    "lazy",
    "dog",
    "jumps",
    "over",
    "stone",
    "wheel",
    "grain",
)


@dataclass(frozen=True, slots=True)
class ChaosJob:
    job_id: str
    queue: str | None
    priority_class: str | None
    fields: dict[str, Any] = field(hash=False)


def make_jobs(seed: int, num_jobs: int, max_tokens: tuple[int, int], *, has_chat: bool = True) -> list[ChaosJob]:
    """`max_tokens`: the least and the most that a job asks for. `has_chat`: whether the model takes messages."""
    rng = random.Random(f"jobs of {seed}")
    return [_make_job(rng, f"chaos-{seed}-{at}", max_tokens, has_chat) for at in range(num_jobs)]


def _make_job(rng: random.Random, job_id: str, max_tokens: tuple[int, int], has_chat: bool) -> ChaosJob:
    text = " ".join(rng.choices(WORDS, k=rng.randint(2, 24)))
    fields: dict[str, Any] = {
        "max_tokens": rng.randint(*max_tokens),
        "temperature": rng.choice((0.0, 0.0, 0.7, 1.0)),
        "ignore_eos": rng.random() < 0.7,
        "n": rng.choice((1, 1, 1, 2, 3)),
        "priority": rng.choice((0, 0, -1, 5)),
        "tenant": rng.choice(TENANTS),
        "stream": rng.random() < 0.9,
        "metadata": {"job": job_id},
    }
    if rng.random() < 0.3 and has_chat:
        fields["messages"] = [{"role": "user", "content": text}]
    else:
        fields["prompt"] = text
    if rng.random() < 0.4:
        fields["stop"] = rng.sample(STOP_STRINGS, k=rng.randint(1, 2))
    if rng.random() < 0.5:
        fields["seed"] = rng.randrange(2**63)
    return ChaosJob(job_id, None, rng.choice(CLASSES), fields)
