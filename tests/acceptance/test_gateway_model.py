"""The official client against a gateway, a worker and the demo model: what the model itself has a part in."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.acceptance.system import MODEL, System

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
