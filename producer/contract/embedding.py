"""What a job of task `embed` may ask for, and how its vectors travel: float32, little endian, in base64."""

import base64
import struct
from collections.abc import Mapping
from typing import Any

MAX_INPUTS = 2048  # of one job

# Beside these a job that generates nothing can ask for nothing.
EMBED_FIELDS = frozenset(
    {
        *("v", "task", "model", "prompt", "inputs", "dimensions"),
        *("priority", "deadline", "tenant", "stream", "metadata", "idempotency_key"),
    }
)
EMBED_ONLY = frozenset({"inputs", "dimensions"})


def find_embedding_problem(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """The field at fault and the rule that it breaks. `given`: the job's fields that differ from their defaults."""
    if given.get("task") != "embed":
        name = next((name for name in given if name in EMBED_ONLY), None)
        return (name, f"{name}: is for jobs of task 'embed'; set task to 'embed', or leave it out") if name else None
    for name in given:
        if name not in EMBED_FIELDS:
            remedy = "give a prompt or inputs instead" if name == "messages" else "leave it out"
            return name, f"{name}: has no meaning with task 'embed', which generates nothing; {remedy}"
    if ("prompt" in given) == ("inputs" in given):
        count = "both" if "prompt" in given else "neither"
        return "inputs", f"give exactly one of prompt and inputs with task 'embed'; {count} given"
    if not given.get("inputs", ["x"]):
        return "inputs", "inputs is empty; give at least one text, or the token ids of one"
    empty = next((at for at, text in enumerate(given.get("inputs", ())) if len(text) == 0), None)
    if empty is not None:
        return f"inputs[{empty}]", f"inputs[{empty}] is empty; give at least one character or token id"
    return None


def encode_vector(float32_bytes: bytes) -> str:
    """`float32_bytes`: little endian."""
    return base64.b64encode(float32_bytes).decode()


def decode_vector(encoded: str) -> list[float]:
    data = base64.b64decode(encoded)
    return list(struct.unpack(f"<{len(data) // 4}f", data))
