"""One attempt's stream, what the engine puts out for it, and what is found of it later."""

from engine.outputs import RequestOutput
from producer.contract import Chunk, EntryId, Marker, parse_entry
from worker.outlet.job_stream import JobStream
from worker.outlet.stored_stream import StoredStream


def output(text: str, *token_ids: int, index: int = 0, offset: int = 0, cached: int = 0) -> RequestOutput:
    return RequestOutput(
        request_id="j", index=index, token_offset=offset, token_ids=list(token_ids), text=text, num_cached_tokens=cached
    )


def stream(num_choices: int = 1) -> JobStream:
    opened = JobStream("j", 2, publish=True, num_prompt_tokens=4, num_choices=num_choices)
    opened.mark(Marker(job_id="j", attempt=2, worker="w", reset=True))
    return opened


def chunks_of(stream: JobStream) -> list[Chunk]:
    stream.encode_pending()
    entries = stream.unsent()[1]
    found = [
        parse_entry(wire)
        for entry_id, wire in zip(entries[::2], entries[1::2], strict=True)
        if EntryId.parse(entry_id).seq > 0
    ]
    return [entry for entry in found if isinstance(entry, Chunk)]


def stored(before: JobStream) -> StoredStream:
    """What Redis has of an attempt that is gone."""
    before.encode_pending()
    flat = [part.encode() for part in before.unsent()[1]]
    fields = [b"m", *[b"d"] * (len(flat) // 2 - 1)]
    return StoredStream(
        [(entry_id, {name: wire}) for entry_id, name, wire in zip(flat[::2], fields, flat[1::2], strict=True)]
    )
