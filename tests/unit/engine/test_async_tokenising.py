"""A long prompt is tokenised beside the event loop of whoever asks, not on it."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from engine import ContextLengthError, InferenceEngine, InvalidRequestError, SamplingParams
from engine.tokenizer import Tokenizer

ONE = SamplingParams(max_tokens=1)


async def stream(engine: InferenceEngine, prompt: str) -> None:
    async for _ in engine.generate_stream(prompt, ONE):
        pass


CALLS: dict[str, Callable[[InferenceEngine, str], Awaitable[object]]] = {
    "generate_async": lambda engine, prompt: engine.generate_async(prompt, ONE),
    "generate_stream": stream,
    "embed_async": lambda engine, prompt: engine.embed_async([prompt]),
}


@pytest.mark.parametrize("kind", CALLS)
async def test_the_event_loop_does_not_tokenise(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    threads: set[int] = set()
    encode = Tokenizer.encode_batch

    def noting(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        threads.add(threading.get_ident())
        return encode(tokenizer, texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", noting)
    await CALLS[kind](engine, "hello world")
    assert threads and threading.get_ident() not in threads


@pytest.mark.parametrize("kind", CALLS)
async def test_a_call_cancelled_while_it_tokenises_starts_no_request(
    engine: InferenceEngine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    loop, began, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    encode = Tokenizer.encode_batch

    def held(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        loop.call_soon_threadsafe(began.set)
        may_end.wait()
        return encode(tokenizer, texts, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "encode_batch", held)
    task = asyncio.ensure_future(CALLS[kind](engine, "hello world"))
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_end.set()
    await loop.shutdown_default_executor()
    assert engine.get_stats()["num_requests"] == 0


async def test_a_stream_refuses_token_ids_and_params_at_the_call_and_text_with_the_first_piece(
    engine: InferenceEngine,
) -> None:
    for prompt in ([], "", [1, -1], None):
        with pytest.raises(InvalidRequestError, match="prompt"):
            engine.generate_stream(prompt)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="n must be 1"):
        engine.generate_stream("hello", SamplingParams(n=2))
    too_long = engine.generate_stream("hello world " * engine.info.max_model_len)
    with pytest.raises(ContextLengthError, match="shorten the prompt"):
        await anext(too_long)
