"""The official client against a gateway, a worker and the demo model: what the model itself has a part in."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.acceptance.system import MODEL, System
from tests.fakes.response_judge import bodies_of, judge_events

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

ASK: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def openai_client(running_system: System) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running_system.gateway_url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_says_what_the_whole_answer_says(openai_client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": ASK, "max_tokens": 16, "temperature": 0}
    whole = openai_client.chat.completions.create(**options)
    stream = openai_client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and "Paris" in text
    assert whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_an_answer_follows_its_schema_and_has_its_logprobs(openai_client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        is_city: bool

    done = openai_client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Answer, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2
    )
    assert isinstance(done.choices[0].message.parsed, Answer)
    assert done.choices[0].logprobs is not None and done.choices[0].logprobs.content
    assert all(token.logprob <= 0 for token in done.choices[0].logprobs.content)


def test_a_response_is_the_chats_answer_however_it_is_asked_for(openai_client: openai.OpenAI) -> None:
    chat = openai_client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=16, temperature=0)
    asked: Any = {"model": MODEL, "input": ASK[0]["content"], "max_output_tokens": 16, "temperature": 0}
    whole = openai_client.responses.create(**asked)
    assert whole.output_text == chat.choices[0].message.content and "Paris" in whole.output_text
    assert whole.usage is not None and chat.usage is not None
    assert whole.usage.total_tokens == chat.usage.total_tokens
    stream = openai_client.responses.create(**asked, stream=True, background=True)
    events = bodies_of(next(stream) for _ in range(2))
    stream.close()
    rest = openai_client.responses.retrieve(events[0]["response"]["id"], stream=True, starting_after=1)
    streamed = judge_events([*events, *bodies_of(rest)])
    assert streamed.output_text == whole.output_text
    next_one = openai_client.responses.create(
        model=MODEL, input="Say it again.", previous_response_id=streamed.id, max_output_tokens=16, temperature=0
    )
    items = openai_client.responses.input_items.list(next_one.id, order="asc")
    texts = [item.content[0].text for item in items if item.type == "message"]  # type: ignore[union-attr]
    assert texts == [asked["input"], whole.output_text, "Say it again."]


def test_a_response_follows_its_schema_and_has_its_logprobs(openai_client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        is_city: bool

    done = openai_client.responses.parse(
        model=MODEL,
        input=ASK,
        text_format=Answer,
        max_output_tokens=24,
        temperature=0,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
    )
    assert isinstance(done.output_parsed, Answer)
    content = done.output[0].content[0]  # type: ignore[union-attr,index]
    assert content.logprobs and all(token.logprob <= 0 for token in content.logprobs)  # type: ignore[union-attr]


def test_a_prompt_beyond_the_context_is_a_bad_request(openai_client: openai.OpenAI) -> None:
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            openai_client.completions.create(model=MODEL, prompt="word " * 20_000, stream=is_streamed)
        assert error.value.code == "context_length_exceeded"


def test_texts_that_mean_the_same_have_vectors_that_are_near(openai_client: openai.OpenAI) -> None:
    texts = ["Paris is the capital of France.", "The capital of France is Paris.", "def main(): return 7 * [0]"]
    together = openai_client.embeddings.create(model=MODEL, input=texts)
    vectors = [item.embedding for item in together.data]
    same, other = (sum(a * b for a, b in zip(vectors[0], vector, strict=True)) for vector in vectors[1:])
    assert other < same <= 1 + 1e-6
    alone = [openai_client.embeddings.create(model=MODEL, input=text).data[0].embedding for text in texts]
    assert alone == vectors and together.usage.prompt_tokens > len(texts)
