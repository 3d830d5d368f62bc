"""kill -9 to a worker in the middle of a call that is streamed to somebody."""

from pathlib import Path
from typing import Any

from producer import Client
from producer.contract import Chunk, join_deltas
from tests.acceptance.system import System
from tests.fakes.chat_templates import HERMES
from tests.fakes.tiny_models import make_tiny_model

LINES = {f"line_{at}": {"type": "string", "minLength": 60, "maxLength": 60} for at in range(6)}
SCHEMA = {"type": "object", "properties": LINES, "required": list(LINES), "additionalProperties": False}
NUM_SHOWN = 40  # characters of the arguments that the subscriber has seen when the worker is killed
FIELDS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Write a poem."}],
    "tools": [{"type": "function", "function": {"name": "write", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "write"}},
    "max_tokens": 1000,
    "n": 2,
    "seed": 6,
}


def test_a_call_that_its_worker_died_with_is_ended_by_the_next_as_if_nothing_had_happened(
    system: System, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(HERMES)
    options = [
        "--model",
        str(make_tiny_model("llama", tmp_path / "model")),
        "--num-threads",
        "1",
        "--lease-seconds",
        "3",
    ]
    options += ["--chat-template", str(template), "--tool-parser", "hermes"]
    doomed = system.start_worker(*options)
    with Client(system.url) as client:
        job = client.submit(**FIELDS, job_id="poem")
        stream = job.stream(timeout=120)
        chunks: list[Chunk] = []
        while num_shown(chunks) < NUM_SHOWN:
            chunks.append(next(stream))
        doomed.kill()
        doomed.wait()
        assert not any(chunk.finish_reason for chunk in chunks)
        system.start_worker(*options)
        chunks += list(stream)
        result = job.result(timeout=120)
        undisturbed = client.submit(**FIELDS).result(timeout=120)
    assert (result.attempts, undisturbed.attempts) == (2, 1)
    assert not any(chunk.reset for chunk in chunks)
    for choice, other in zip(result.choices, undisturbed.choices, strict=True):
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        deltas = [delta for chunk in mine for delta in chunk.tool_calls or ()]
        assert [token_id for chunk in mine for token_id in chunk.token_ids] == choice.token_ids == other.token_ids
        assert join_deltas(deltas) == choice.tool_calls
        assert sum("id" in delta for delta in deltas) == 1  # said once, though two workers wrote the call
        assert choice.tool_calls is not None and other.tool_calls is not None
        assert [call["function"] for call in choice.tool_calls] == [call["function"] for call in other.tool_calls]
        assert choice.finish_reason == other.finish_reason == "tool_calls"


def num_shown(chunks: list[Chunk]) -> int:
    return sum(len(delta["function"]["arguments"]) for chunk in chunks for delta in chunk.tool_calls or ())
