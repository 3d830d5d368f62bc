"""A job's chunks as OpenAI's stream events: who is told what, once, and from where on."""

import json
from typing import Any

import pytest

from producer.contract import Chunk, FinishReason, PromptEcho, TokenLogprob, Usage
from producer.gateway.chunk_bodies import ChunkRenderer
from producer.gateway.job_records import JobRecord
from producer.openai.request import CHAT_URL, COMPLETIONS_URL

USAGE = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)


def renderer(
    url: str = CHAT_URL, *, includes_usage: bool = False, is_resumed: bool = False, **of: Any
) -> ChunkRenderer:
    """`of`: fields of the job's record."""
    record = JobRecord(key_id=None, url=url, response_id="id-7", model="fake", created=1700, **of)
    return ChunkRenderer("job-7", record, includes_usage=includes_usage, is_resumed=is_resumed)


def events(data: bytes) -> list[Any]:
    *texts, last = data.split(b"\n\n")
    assert last == b""
    return [text.removeprefix(b"data: ").decode() for text in texts]


def render(of: ChunkRenderer, cursor: str = "1-1", **chunk: Any) -> list[Any]:
    told = b"".join(of.render(Chunk(job_id="job-7", **chunk), cursor))
    return [json.loads(event) for event in events(told)]


def choices(of: ChunkRenderer, **chunk: Any) -> list[Any]:
    return [choice for event in render(of, **chunk) for choice in event["choices"]]


def tokens(*texts: str) -> list[TokenLogprob]:
    return [TokenLogprob(token_id=1, token=text, bytes=list(text.encode()), logprob=-0.5) for text in texts]


def test_a_chat_has_its_role_once_for_each_choice_and_the_cursor_stands_in_a_chunks_last_event() -> None:
    chat = renderer()
    first = render(chat, "1-1", text="a", finish_reason="stop")
    assert [event["choices"][0]["delta"] for event in first] == [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        {},
    ]
    assert [event["promptmill"] for event in first] == [{"job_id": "job-7"}] * 2 + [
        {"job_id": "job-7", "cursor": "1-1"}
    ]
    assert [event["choices"][0]["finish_reason"] for event in first] == [None, None, "stop"]
    head = {"id": "id-7", "object": "chat.completion.chunk", "created": 1700, "model": "fake"}
    assert all(head.items() <= event.items() for event in first)
    assert choices(chat, index=1, text="b")[0]["delta"]["role"] == "assistant"
    assert [choice["delta"] for choice in choices(chat, index=1, text="c")] == [{"content": "c"}]


@pytest.mark.parametrize("is_resumed", [True, False])
def test_whoever_resumes_is_told_no_role_and_everybody_is_where_the_answer_begins_anew(is_resumed: bool) -> None:
    chat = renderer(is_resumed=is_resumed)
    deltas = [choice["delta"] for choice in choices(chat, text="a")]
    assert deltas[-1] == {"content": "a"} and len(deltas) == (1 if is_resumed else 2)
    [reset] = [json.loads(event) for event in events(chat.render_reset("2-0"))]
    assert (reset["choices"], reset["promptmill"]) == ([], {"job_id": "job-7", "cursor": "2-0", "reset": True})
    assert [list(choice["delta"]) for choice in choices(chat, text="a")] == [["role", "content"], ["content"]]


def test_tokens_whose_text_is_held_back_have_their_logprobs_at_once() -> None:
    [_, chat] = choices(renderer(), token_ids=[1], logprobs=tokens("a"))
    assert chat["delta"] == {"content": ""} and chat["logprobs"]["content"][0]["token"] == "a"
    [completion] = choices(renderer(COMPLETIONS_URL), token_ids=[1], logprobs=tokens("a"))
    assert completion["text"] == "" and completion["logprobs"]["tokens"] == ["a"]
    assert render(renderer(COMPLETIONS_URL), token_ids=[1]) == []


def test_a_completions_offsets_count_on_in_each_choice_behind_its_echo_and_begin_anew_with_the_answer() -> None:
    completion = renderer(COMPLETIONS_URL, num_choices=2, first_index=4)
    echo = PromptEcho(text="xyz", token_ids=[1], logprobs=[None])
    told = choices(completion, prompt=echo, text="ab", token_ids=[1], logprobs=tokens("ab"))
    assert [(choice["index"], choice["text"]) for choice in told] == [(4, "xyz"), (5, "xyz"), (4, "ab")]
    assert [choice["logprobs"]["text_offset"] for choice in told] == [[0], [0], [3]]
    for index, offset in ((0, 5), (1, 3)):
        [choice] = choices(completion, index=index, text="c", token_ids=[1], logprobs=tokens("c"))
        assert (choice["index"], choice["logprobs"]["text_offset"]) == (4 + index, [offset])
    completion.render_reset("2-0")
    [choice] = choices(completion, text="c", token_ids=[1], logprobs=tokens("c"))
    assert choice["logprobs"]["text_offset"] == [0]


@pytest.mark.parametrize("url", [CHAT_URL, COMPLETIONS_URL])
@pytest.mark.parametrize(
    ("reason", "told"), [("length", "length"), ("deadline", "length"), ("cancelled", None), ("error", None)]
)
def test_an_end_is_told_in_openais_words_and_what_is_no_answers_end_is_not(
    url: str, reason: FinishReason, told: str | None
) -> None:
    last = choices(renderer(url), text="a", token_ids=[1], finish_reason=reason)[-1]
    assert last["finish_reason"] == told


def test_usage_is_told_behind_the_last_chunk_where_it_is_asked_for() -> None:
    [plain] = render(renderer(COMPLETIONS_URL), text="a")
    assert "usage" not in plain and renderer(COMPLETIONS_URL).render_end(USAGE) == b"data: [DONE]\n\n"
    asked = renderer(COMPLETIONS_URL, includes_usage=True)
    [chunk] = render(asked, text="a")
    last, done = events(asked.render_end(USAGE))
    assert chunk["usage"] is None and done == "[DONE]"
    assert json.loads(last)["choices"] == [] and json.loads(last)["usage"]["total_tokens"] == 5
