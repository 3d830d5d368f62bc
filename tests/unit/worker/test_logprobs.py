"""Tokens and their log-probabilities as they are written for others."""

import math

import pytest

from engine.outputs import TokenLogprob
from engine.tokenizer import Tokenizer
from producer.contract import Chunk, parse_entry
from producer.contract.logprob import MIN_LOGPROB
from tests.fakes.tiny_tokenizers import byte_level_tokenizer
from worker.logprobs import LogprobWriter


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    raw = byte_level_tokenizer()
    raw.add_special_tokens(["<|end|>"])
    return Tokenizer(raw)


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_the_bytes_of_tokens_join_to_the_text_also_within_a_character(tokenizer: Tokenizer) -> None:
    writer, text = LogprobWriter(tokenizer), "a tree \N{EVERGREEN TREE} and \N{LATIN SMALL LETTER U WITH DIAERESIS}"
    written = [writer.write(TokenLogprob(token_id, -1.0, [])) for token_id in ids(tokenizer, text)]
    assert bytes(byte for entry in written for byte in entry.bytes).decode() == text
    assert any(entry.token == "\N{REPLACEMENT CHARACTER}" for entry in written)


def test_a_special_token_has_its_spelling_and_no_bytes(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|end|>")
    assert end is not None
    entry = LogprobWriter(tokenizer).write(TokenLogprob(end, -0.5, [(end, -0.5)]))
    assert (entry.token, entry.bytes, entry.top[0].token) == ("<|end|>", [], "<|end|>")


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1e30])
def test_what_json_cannot_hold_becomes_the_least_logprob(tokenizer: Tokenizer, value: float) -> None:
    entry = LogprobWriter(tokenizer).write(TokenLogprob(1, value, [(2, value)]))
    chunk = parse_entry(Chunk(job_id="j", token_ids=[1], logprobs=[entry]).to_wire())
    assert isinstance(chunk, Chunk) and chunk.logprobs is not None
    assert chunk.logprobs[0].logprob == chunk.logprobs[0].top[0].logprob == MIN_LOGPROB


def test_a_prompts_text_is_what_its_tokens_add_up_to(tokenizer: Tokenizer) -> None:
    token_ids = ids(tokenizer, "hello \N{EVERGREEN TREE}")
    echo = LogprobWriter(tokenizer).echo(token_ids)
    assert (echo.text, echo.token_ids, echo.logprobs) == ("hello \N{EVERGREEN TREE}", token_ids, None)
