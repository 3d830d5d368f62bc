"""A job's chunks as the console's events: `data: {json}`, each with its cursor. Pure.

The same for every job, whoever enqueued it and for whatever API: text, thoughts and calls as they come.
"""

from producer.contract import Chunk, Usage
from producer.gateway.renderer import DONE, Renderer, encode_event


class ChunkEvents(Renderer):
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
        return [encode_event({name: value for name, value in fields.items() if value is not None})]

    def render_reset(self, cursor: str) -> bytes:
        return encode_event({"cursor": cursor, "reset": True})

    def render_end(self, usage: Usage) -> bytes:
        return encode_event({"usage": usage.model_dump()}) + DONE
