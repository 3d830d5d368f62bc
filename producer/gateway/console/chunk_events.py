"""A job's chunks as the console's events: `data: {json}`, each with its cursor. Pure.

The same for every job, whoever enqueued it and for whatever API: text, thoughts and calls as they come.
"""

import json
from typing import Any

from producer.contract import Chunk, Usage


class ChunkEvents:
    """Renders one job's chunks (`producer.gateway.job_stream.Renderer`)."""

    def render(self, chunk: Chunk, cursor: str) -> list[bytes]:
        if chunk.reset:
            return []  # told by `render_reset`
        fields = {
            "cursor": cursor,
            "index": chunk.index,
            "num_tokens": len(chunk.token_ids),
            "text": chunk.text,
            "reasoning": chunk.reasoning,
            "tool_calls": chunk.tool_calls,
            "prompt": chunk.prompt.text if chunk.prompt is not None else None,
            "finish_reason": chunk.finish_reason,
        }
        return [_event({name: value for name, value in fields.items() if value is not None})]

    def render_reset(self, cursor: str) -> bytes:
        return _event({"cursor": cursor, "reset": True})

    def render_usage(self, usage: Usage) -> bytes:
        return _event({"usage": usage.model_dump()})


def _event(fields: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(fields, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
