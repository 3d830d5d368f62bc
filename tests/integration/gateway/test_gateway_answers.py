"""Whole answers through the official client: completions, chats, models, and what is refused."""

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest

from producer.contract import ErrorCode, ErrorInfo
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.held_job import HeldJob


def test_a_completion_is_answered(client: openai.OpenAI, echoing: FakeWorker) -> None:
    done = client.completions.create(model="fake", prompt="one two three", max_tokens=2)
    assert done.object == "text_completion" and done.model == "fake" and done.id.startswith("cmpl-")
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("one two ", "length")
    assert done.usage is not None and done.usage.total_tokens == 2 + len("one two ")


def test_a_chat_is_answered(client: openai.OpenAI, echoing: FakeWorker) -> None:
    done = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hello you"}])
    assert done.object == "chat.completion" and done.id.startswith("chatcmpl-")
    assert done.choices[0].message.role == "assistant" and done.choices[0].message.content == "Hello you "


async def test_the_asyncio_client_is_answered_too(gateway: RunningGateway, echoing: FakeWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        done = await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hello"}])
    assert done.choices[0].message.content == "Hello "


def test_every_choice_of_every_prompt_is_numbered_on(client: openai.OpenAI, echoing: FakeWorker) -> None:
    done = client.completions.create(model="fake", prompt=["a", "b"], n=2)
    assert [(choice.index, choice.text) for choice in done.choices] == [(0, "a "), (1, "a "), (2, "b "), (3, "b ")]
    assert done.usage is not None and done.usage.prompt_tokens == 4 and done.usage.completion_tokens == 8


def test_what_a_request_says_reaches_the_worker(client: openai.OpenAI, worker: FakeWorker) -> None:
    seen: list[dict[str, object]] = []

    def record(job: HeldJob) -> None:
        seen.append(job.arguments)
        job.begin().write("x", finish_reason="stop")
        job.end()

    with worker.serving(record):
        client.chat.completions.create(
            model="fake",
            messages=[{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}],
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            stop=["END"],
            n=1,
            user="somebody",
            metadata={"run": "1"},
            extra_body={"top_k": -1, "min_p": 0.1, "priority": -3, "ignore_eos": True, "stop_token_ids": [5]},
        )
    assert {name: value for name, value in seen[0].items() if name not in ("v", "messages")} == {
        "model": "fake",
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stop": ["END"],
        "metadata": {"run": "1"},
        "min_p": 0.1,
        "priority": -3,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "stream": False,
    }


def test_the_models_are_those_of_the_live_workers(client: openai.OpenAI, worker: FakeWorker, redis_url: str) -> None:
    other = FakeWorker(redis_url, queue="gpu", name="other")
    other.announce("org/large", "fake")
    dead = FakeWorker(redis_url, name="dead")
    dead.announce("gone", seconds=-1)
    assert [model.id for model in client.models.list()] == ["fake", "org/large"]
    assert client.models.retrieve("org/large").owned_by == "promptmill"
    with pytest.raises(openai.NotFoundError, match="'gone' is not served here"):
        client.models.retrieve("gone")
    other.close()
    dead.close()


def test_a_model_of_another_queue_is_found_there(client: openai.OpenAI, worker: FakeWorker, redis_url: str) -> None:
    other = FakeWorker(redis_url, queue="gpu", name="other")
    other.announce("large")

    def answer(job: HeldJob) -> None:
        job.begin().write("from gpu", finish_reason="stop")
        job.end()

    with other.serving(answer):
        done = client.completions.create(model="large", prompt="x")
    assert done.choices[0].text == "from gpu"
    other.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"prompt": ""}, "prompt"),
        ({"extra_body": {"top_q": 1}}, "top_q"),
        ({"suffix": "x"}, "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"stream": "yes"}}, "stream"),
    ],
)
def test_a_bad_request_names_its_field(
    client: openai.OpenAI, worker: FakeWorker, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**{"model": "fake", "prompt": "x", **fields})  # type: ignore[call-overload]
    assert error.value.param == param and error.value.code == "invalid_request" and error.value.request_id


def test_a_model_that_nobody_serves_is_not_found(client: openai.OpenAI, worker: FakeWorker) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="other", prompt="x")
    assert error.value.code == "model_not_found" and "served are: fake" in str(error.value)


def test_a_model_whose_workers_are_gone_is_unavailable_at_a_gateway_that_has_never_seen_them(
    client: openai.OpenAI, worker: FakeWorker
) -> None:
    worker.announce("another")
    with pytest.raises(openai.InternalServerError, match="no worker that serves 'fake' is alive") as error:
        client.completions.create(model="fake", prompt="x")
    assert (error.value.status_code, error.value.code) == (503, "no_worker")


@pytest.mark.parametrize("wrong", ["", "/v1/v1"])
def test_a_base_url_without_its_v1_is_told_so(gateway: RunningGateway, wrong: str) -> None:
    with (
        openai.OpenAI(base_url=gateway.url + wrong, api_key="none", max_retries=0) as client,
        pytest.raises(openai.NotFoundError, match=r"/v1/completions here: .* a base URL that ends in /v1"),
    ):
        client.completions.create(model="fake", prompt="x")


def test_a_service_of_openais_that_is_not_here_names_those_that_are(client: openai.OpenAI) -> None:
    told = r"POST /v1/images/generations: not found; text is read and written here: served are .*/v1/completions"
    with pytest.raises(openai.NotFoundError, match=told):
        client.images.generate(model="fake", prompt="x")


@pytest.mark.parametrize("base", ["", "/v1"])
def test_a_service_of_openais_whose_work_another_does_here_names_that(gateway: RunningGateway, base: str) -> None:
    responses = r"not found; ask /v1/responses instead, responses.create\(\)"
    with openai.OpenAI(base_url=gateway.url + base, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match=responses):
            client.conversations.create()
        with pytest.raises(openai.APIStatusError, match=r"ask /v1/responses for a summary"):
            client.responses.compact(model="gpt-5", input="x")
        with pytest.raises(openai.APIStatusError, match=r"a response's usage counts them, ask /v1/responses"):
            client.responses.input_tokens.count(model="gpt-5", input="x")
        with pytest.raises(
            openai.NotFoundError, match=r"not found; send the file whole, to /v1/files, files.create\(\)"
        ):
            client.uploads.create(bytes=1, filename="in.jsonl", mime_type="application/jsonl", purpose="batch")


@pytest.mark.parametrize(
    ("path", "fields", "told"),
    [
        ("responses", {"previous_response_id": "resp_\ud800"}, r"there is no response resp_\ud800"),
        ("responses", {"text": {"\ud800": 1}}, r"text.\ud800: unknown field"),
        (
            "chat/completions",
            {"stream": True, "stream_options": {"\ud800": 1}},
            r"stream_options.\ud800: unknown field",
        ),
    ],
)
def test_half_a_character_is_quoted_as_what_it_is(
    gateway: RunningGateway, worker: FakeWorker, path: str, fields: dict[str, Any], told: str
) -> None:
    body = json.dumps({"model": "fake", "input" if path == "responses" else "messages": [], **fields})
    body = body.replace("[]", '[{"role": "user", "content": "x"}]')
    answer = httpx.post(f"{gateway.url}/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and told in answer.json()["error"]["message"], answer.text


def test_a_method_that_a_path_does_not_take_is_told_which_it_does(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match=r"GET /v1/completions: method not allowed; it takes POST"):
        client.get("/completions", cast_to=object)


def test_without_a_worker_the_service_is_unavailable_for_a_while(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model="fake", prompt="x")
    assert error.value.status_code == 503 and error.value.code == "no_worker"
    assert error.value.response.headers["retry-after"] == "5"


def test_a_job_that_fails_says_why(gateway: RunningGateway, worker: FakeWorker) -> None:
    """With the client's own retries on: a failure that would come again is not tried again."""
    statuses = {
        ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
        ErrorCode.DEADLINE_EXCEEDED: 408,
        ErrorCode.TIMEOUT: 408,
        ErrorCode.ENGINE_ERROR: 500,
        ErrorCode.POISON: 500,
    }
    prompts: list[str] = []

    def fail(job: HeldJob) -> None:
        prompts.append(job.arguments["prompt"])
        reason = ErrorInfo(code=ErrorCode(prompts[-1]), message="the reason", param="prompt")
        job.begin().end("failed", error=reason)

    with worker.serving(fail), open_client(gateway, max_retries=2) as client:
        for code, status in statuses.items():
            with pytest.raises(openai.APIStatusError, match="the reason") as error:
                client.completions.create(model="fake", prompt=str(code))
            assert (error.value.status_code, error.value.code, error.value.param) == (status, code, "prompt")
    assert prompts == list(statuses), "each once"


def test_a_limit_that_is_too_high_is_named_as_the_caller_wrote_it(
    gateway: RunningGateway, client: openai.OpenAI, worker: FakeWorker
) -> None:
    message = "max_tokens is 9000, the context 8192"
    reason = ErrorInfo(code=ErrorCode.CONTEXT_LENGTH_EXCEEDED, message=message, param="max_tokens")
    asked = {"model": "fake", "messages": [{"role": "user", "content": "x"}]}
    create: Any = client.chat.completions.create
    with worker.serving(lambda job: job.begin().end("failed", error=reason)):
        for name in ("max_completion_tokens", "max_tokens"):
            for is_streamed in (False, True):
                with pytest.raises(openai.BadRequestError) as refused:
                    create(**asked, **{name: 9000}, stream=is_streamed)
                assert refused.value.param == name and f"{name} is 9000" in str(refused.value)
                job_id = refused.value.response.headers["x-promptmill-job-id"]
                later = httpx.get(f"{gateway.url}/v1/jobs/{job_id}").json()["error"]
                assert later["param"] == name and later["message"].startswith(f"{name} is")


def test_a_job_cancelled_by_somebody_else_is_a_conflict(client: openai.OpenAI, worker: FakeWorker) -> None:
    with (
        worker.serving(lambda job: job.begin().end("cancelled")),
        pytest.raises(openai.ConflictError) as error,
    ):
        client.completions.create(model="fake", prompt="x")
    assert error.value.code == "cancelled" and error.value.response.headers["x-should-retry"] == "false"


def test_an_answer_that_takes_too_long_is_given_up_and_its_job_cancelled(
    start_gateway: StartGateway, worker: FakeWorker
) -> None:
    gateway = start_gateway(request_timeout_seconds=0.2)
    with open_client(gateway, max_retries=2) as client, pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model="fake", prompt="x")
    assert error.value.status_code == 408 and error.value.code == "timeout"
    job_id = error.value.response.headers["x-promptmill-job-id"]
    assert worker.connection.hget(f"rq:job:{job_id}", "status") == b"canceled"
