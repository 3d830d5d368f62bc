"""The jobs of a chaos run, from its seed: all kinds mixed, each reproducible by its id alone."""

import random
from collections.abc import Callable
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
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["mill", "river", "stone wheel"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 4},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}
    for name, parameters in (("weigh", SCHEMA), ("now", {"type": "object", "properties": {}}))
]
CALL_TOKENS = 160  # a call spelt in bytes: cut off by some limits, whole under others


@dataclass(frozen=True, slots=True)
class ChaosJob:
    job_id: str
    queue: str | None
    priority_class: str | None
    fields: dict[str, Any] = field(hash=False)


def make_jobs(seed: int, num_jobs: int, max_tokens: tuple[int, int], *, has_chat: bool = True) -> list[ChaosJob]:
    """`max_tokens`: the least and the most that a job asks for, but for calls. `has_chat`: the model takes messages."""
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
    if rng.random() < 0.4 and has_chat:
        fields["messages"] = [{"role": "user", "content": text}]
    else:
        fields["prompt"] = text
    if rng.random() < 0.4:
        fields["stop"] = rng.sample(STOP_STRINGS, k=rng.randint(1, 2))
    if rng.random() < 0.5:
        fields["seed"] = rng.randrange(2**63)
    for share, add in _EXTRAS:
        if rng.random() < share:
            add(rng, fields)
    return ChaosJob(job_id, None, rng.choice(CLASSES), fields)


def _add_form(rng: random.Random, fields: dict[str, Any]) -> None:
    if "messages" in fields and rng.random() < 0.5:
        fields["tools"] = TOOLS
        fields["tool_choice"] = rng.choice(("auto", "required", {"type": "function", "function": {"name": "weigh"}}))
        fields["parallel_tool_calls"] = False
        fields["max_tokens"] += rng.randint(0, CALL_TOKENS)
        return
    schema = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA}}
    form = rng.choice(("response_format", "regex", "choice", "grammar"))
    fields[form] = {
        "response_format": rng.choice((schema, {"type": "json_object"})),
        "regex": r"(mill|stone){2,9}-[0-9]{3,9}",
        "choice": ["yes", "no", "yesterday", "never ever"],
        "grammar": f'start: "<a>" /[a-f]{{3,20}}/ "</a>" %json {{"enum": {[1, 22, 333]}}}',
    }[form]


def _add_logprobs(rng: random.Random, fields: dict[str, Any]) -> None:
    fields |= {"logprobs": True, "top_logprobs": rng.choice((0, 1, 3)), "echo": rng.random() < 0.3}


def _add_penalties(rng: random.Random, fields: dict[str, Any]) -> None:
    fields |= {"presence_penalty": rng.uniform(-1, 1), "frequency_penalty": rng.uniform(0, 1)}
    fields |= {"repetition_penalty": rng.uniform(0.9, 1.4), "logit_bias": {str(rng.randrange(256)): 4.0}}


def _add_repetition(rng: random.Random, fields: dict[str, Any]) -> None:
    """The bias makes a random model go round in circles, too: what follows is guessed by prompt lookup."""
    words = " ".join(rng.choices(WORDS, k=3))
    name = "prompt" if "prompt" in fields else "messages"
    text = f"{words}, " * rng.randint(4, 8)
    fields[name] = text if name == "prompt" else [{"role": "user", "content": text}]
    fields["temperature"] = 0.0


Extra = Callable[[random.Random, dict[str, Any]], None]
_EXTRAS: tuple[tuple[float, Extra], ...] = (
    (0.3, _add_form),
    (0.2, _add_logprobs),
    (0.2, _add_penalties),
    (0.2, _add_repetition),
)
