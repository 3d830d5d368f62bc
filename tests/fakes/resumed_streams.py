"""Streams that an attempt before left behind, and what the next one has to make of them."""

from typing import Any

import redis

from engine.sampling_params import SamplingParams
from producer.contract import Choice, Chunk, Marker, Result, keys
from tests.fakes.fake_engine import expected_logprob, expected_tokens
from tests.fakes.fake_tokenizer import FakeTokenizer, text_of
from tests.fakes.redis_reads import stream_rows
from tests.fakes.worker_runs import stored_chunks
from worker.logprobs import LogprobWriter
from worker.scripts import RESUME_FIELD
from worker.translate import default_seed

NUM_TOKENS = 60
PROMPT = [3, 4]


def answer(job_id: str, index: int = 0, num_tokens: int = NUM_TOKENS) -> list[int]:
    return expected_tokens(PROMPT, SamplingParams(max_tokens=num_tokens, seed=default_seed(job_id)), index)


def check_whole(client: redis.Redis, result: Result, *, num_choices: int = 1) -> None:
    """The stream, joined, and the result are what one attempt alone would have given."""
    assert result.status == "finished"
    for index in range(num_choices):
        token_ids = answer(result.job_id, index)
        choice = result.choices[index]
        assert (choice.token_ids, choice.text, choice.finish_reason) == (token_ids, text_of(token_ids), "length")
    chunks = stored_chunks(client, result.job_id)
    for choice in result.choices:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert [token_id for chunk in mine for token_id in chunk.token_ids] == choice.token_ids
        assert [chunk.token_offset for chunk in mine] == [
            sum(len(chunk.token_ids) for chunk in mine[:at]) for at in range(len(mine))
        ]
    assert result.usage.completion_tokens == num_choices * NUM_TOKENS
    assert result.usage.prompt_tokens == len(PROMPT)


def check_logprobs(client: redis.Redis, result: Result) -> None:
    """Every token has its own, in the stream and in the result, and the prompt came once, first."""
    writer = LogprobWriter(FakeTokenizer())  # type: ignore[arg-type]
    chunks = stored_chunks(client, result.job_id)
    holders: list[Chunk | Choice] = [*chunks, *result.choices]
    for holder in holders:
        assert holder.logprobs == [writer.write(expected_logprob(token_id, 2)) for token_id in holder.token_ids]
    assert [chunk.prompt for chunk in chunks if chunk.prompt is not None] == [result.prompt]
    assert chunks[0].prompt is not None and result.prompt is not None
    assert result.prompt.logprobs == [None, writer.write(expected_logprob(PROMPT[1], 2))]
    assert (result.prompt.text, result.prompt.token_ids) == (text_of(PROMPT), PROMPT)


def markers(client: redis.Redis, job_id: str) -> list[Marker]:
    rows = stream_rows(client, keys.stream_key(job_id))
    return [Marker.model_validate_json(fields[b"m"]) for _, fields in rows if b"m" in fields]


def write_stream(client: redis.Redis, job_id: str, *entries: Chunk, **fields: Any) -> None:
    """What an attempt before left behind, and the flag of the sweeper that found it."""
    begun: dict[str, Any] = {"prompt_token_ids": PROMPT, "seed": default_seed(job_id), "fingerprint": "fake"}
    marker = Marker(job_id=job_id, attempt=1, worker="dead", **{**begun, **fields})
    client.xadd(keys.stream_key(job_id), {"m": marker.to_wire()}, id="1-0")
    for seq, entry in enumerate(entries, 1):
        client.xadd(keys.stream_key(job_id), {"d": entry.to_wire()}, id=f"1-{seq}")
    enqueued_at = client.hget(f"rq:job:{job_id}", "enqueued_at")
    assert enqueued_at is not None
    client.hset(f"rq:job:{job_id}", RESUME_FIELD, enqueued_at)


def chunk(job_id: str, token_ids: list[int], *, offset: int = 0, **fields: Any) -> Chunk:
    given = {"text": text_of(token_ids), **fields}
    return Chunk(job_id=job_id, token_offset=offset, token_ids=token_ids, **given)
