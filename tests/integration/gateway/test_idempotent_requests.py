"""Requests with a key, in the header or in the body: asked again, they find their jobs, however these have ended."""

import asyncio
from typing import Any

import httpx2 as httpx
import openai
import pytest
import redis

from producer import RedisUnavailableError
from producer.contract import ErrorCode, ErrorInfo, keys
from producer.gateway.job_records import RECORD_PREFIX, JobRecord, JobRecords
from producer.job import AsyncJob
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateways import RunningGateway, StartGateway, open_client
from tests.fakes.waiting import wait_until

KEYED: list[dict[str, Any]] = [
    {"extra_headers": {"Idempotency-Key": "order-7"}},
    {"extra_body": {"idempotency_key": "order-7"}},
]
DIED = ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="the engine died", retryable=True)


@pytest.mark.parametrize("keyed", KEYED)
def test_one_that_failed_leaves_the_others_of_its_request_alone(
    client: openai.OpenAI, worker: FakeWorker, keyed: dict[str, Any]
) -> None:
    asked: Any = {"model": "fake", "prompt": ["good", "bad"], **keyed}
    jobs = []

    def end_the_bad_one(job: Any) -> None:
        jobs.append(job.begin())
        if job.arguments["prompt"] == "bad":
            job.end("failed", error=DIED)

    with worker.serving(end_the_bad_one):
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the engine died") as error:
                client.completions.create(**asked)
            assert error.value.response.headers["x-should-retry"] == "false", "it would fail again"
    [good] = [job for job in jobs if job.arguments["prompt"] == "good"]
    assert len(jobs) == 2 and not good.is_cancelled()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_failure_is_retried_where_that_makes_another_job(
    client: openai.OpenAI, worker: FakeWorker, is_streamed: bool
) -> None:
    with worker.serving(lambda job: job.begin().end("failed", error=DIED)):
        for options, is_retried in [({}, "true"), *((keyed, "false") for keyed in KEYED)]:
            with pytest.raises(openai.InternalServerError) as error:
                client.completions.create(model="fake", prompt="x", stream=is_streamed, **options)
            assert error.value.response.headers["x-should-retry"] == is_retried


@pytest.mark.parametrize("keyed", KEYED)
def test_a_client_that_leaves_does_not_cancel_what_it_will_ask_for_again(
    gateway: RunningGateway, worker: FakeWorker, keyed: dict[str, Any]
) -> None:
    asked: Any = {"model": "fake", "prompt": "x", **keyed}
    with open_client(gateway) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(**asked, timeout=2.0)
        job = worker.claim().begin()
        job.write("done", finish_reason="stop")
        job.end()
        assert client.completions.create(**asked).choices[0].text == "done"


def test_an_answer_is_not_found_by_somebody_else_who_spells_its_key(
    redis_url: str, start_gateway: StartGateway, echoing: FakeWorker
) -> None:
    key, gateway = new_key(redis_url, "mine"), start_gateway(allow_anonymous=True)
    asked: Any = {"model": "fake", "prompt": "x"}
    with open_client(gateway, api_key=key) as client:
        client.completions.create(**asked, **KEYED[0])
    spelt = {"idempotency-key": f"{key.split('-')[1]}:order-7"}
    answer = httpx.post(f"{gateway.url}/v1/completions", json=asked, headers=spelt)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize("keyed", KEYED)
def test_an_answer_that_is_asked_for_again_costs_no_tokens_again(
    redis_url: str, redis_client: redis.Redis, gateway: RunningGateway, worker: FakeWorker, keyed: dict[str, Any]
) -> None:
    key = new_key(redis_url, "small", "--tokens-per-minute", "600")
    asked: Any = {"model": "fake", "prompt": "w " * 99, "max_tokens": 500, **keyed}

    def num_left() -> float:
        return float(redis_client.hget(f"promptmill:gateway:rate:{key.split('-')[1]}", "tokens") or 0)

    with open_client(gateway, api_key=key) as client, worker.serving(echo):
        client.completions.create(**asked)
        after_the_first = num_left()
        assert after_the_first < 450
        for _ in range(2):
            client.completions.create(**asked)
        assert num_left() >= after_the_first


def test_an_answer_is_found_again_while_the_queue_takes_no_more(
    start_gateway: StartGateway, worker: FakeWorker
) -> None:
    asked: Any = {"model": "fake", "prompt": "x", **KEYED[0]}
    with open_client(start_gateway(max_queue_depth=2)) as client:
        with worker.serving(echo):
            client.completions.create(**asked)
        worker.connection.rpush("rq:queue:promptmill", "a", "b")
        assert client.completions.create(**asked).choices[0].text == "x "
        with pytest.raises(openai.RateLimitError, match="nothing was enqueued"):
            client.completions.create(**{**asked, "prompt": ["x", "one more"]})
    assert worker.connection.llen("rq:queue:promptmill") == 2


def test_a_key_that_is_empty_or_too_long_is_refused_by_name(
    redis_url: str, start_gateway: StartGateway, echoing: FakeWorker
) -> None:
    key, gateway = new_key(redis_url, "mine"), start_gateway(allow_anonymous=True)

    def refused_field(header: str | None, in_body: str | None, **more: str) -> str | None:
        body = {"model": "fake", "prompt": "x", "idempotency_key": in_body}
        headers = more if header is None else {"idempotency-key": header, **more}
        answer = httpx.post(f"{gateway.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == (400 if "error" in answer.json() else 200)
        param: str | None = answer.json().get("error", {}).get("param")
        return param

    assert [refused_field("k" * length, None) for length in (0, 1, 200, 201)] == [
        *("idempotency-key", None, None, "idempotency-key")
    ]
    assert [refused_field(None, "k" * length) for length in (256, 257)] == [None, "idempotency_key"]
    whose = {"authorization": f"Bearer {key}"}
    assert [refused_field(None, "k" * length, **whose) for length in (200, 256)] == [None, "idempotency_key"]


@pytest.mark.parametrize("is_another_alive", [True, False])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_is_found_again_while_no_worker_serves_its_model(
    gateway: RunningGateway, worker: FakeWorker, redis_client: redis.Redis, is_another_alive: bool, is_streamed: bool
) -> None:
    asked: Any = {"model": "fake", "prompt": ["one two", "three"], "stream": is_streamed, **KEYED[0]}
    with open_client(gateway) as client:

        def texts() -> list[str]:
            done = client.completions.create(**asked)
            choices = [choice for chunk in done for choice in chunk.choices] if is_streamed else done.choices
            return ["".join(choice.text for choice in choices if choice.index == index) for index in range(2)]

        with worker.serving(echo):
            assert texts() == ["one two ", "three "]
        worker.announce("another", seconds=60 if is_another_alive else -1)
        wait_until(lambda: [model.id for model in client.models.list()] == ["another"] * is_another_alive)
        assert texts() == ["one two ", "three "] and redis_client.llen("rq:queue:promptmill") == 0
        with pytest.raises(openai.ConflictError, match="was used for another request"):
            client.completions.create(**{**asked, "prompt": ["one two", "four"]})
        with pytest.raises(openai.InternalServerError, match="alive; nothing was enqueued"):
            client.completions.create(**{**asked, "extra_headers": {"Idempotency-Key": "order-8"}})


def test_an_answer_that_is_asked_for_again_is_as_old_as_it_was(
    client: openai.OpenAI, echoing: FakeWorker, redis_client: redis.Redis
) -> None:
    asked: Any = {"model": "fake", "prompt": "x", **KEYED[0]}
    first = client.completions.create(**asked)
    [name] = [key.decode() for key in redis_client.scan_iter(f"{RECORD_PREFIX}*")]
    record = JobRecord.model_validate_json(redis_client.get(name) or b"")
    redis_client.set(name, record.model_copy(update={"created": 7}).model_dump_json(), ex=60)
    again = client.completions.create(**asked)
    assert (again.id, again.created) == (first.id, 7)
    assert redis_client.ttl(name) > 6 * 24 * 3600


def test_a_key_that_is_used_again_after_its_job_is_forgotten_is_of_the_new_job(
    gateway: RunningGateway, client: openai.OpenAI, echoing: FakeWorker, redis_client: redis.Redis
) -> None:
    first = client.completions.create(model="fake", prompt="x", **KEYED[0])
    job_id = first.id.removeprefix("cmpl-")
    redis_client.delete(f"rq:job:{job_id}", keys.result_key(job_id), keys.stream_key(job_id))
    second = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "y"}], **KEYED[0])
    found = httpx.get(f"{gateway.url}/v1/jobs/{job_id}").json()
    assert second.created >= first.created
    assert (found["url"], found["created"]) == ("/v1/chat/completions", second.created)
    assert found["response"]["object"] == "chat.completion"


@pytest.mark.parametrize("is_written", [False, True], ids=["before its record", "behind its record"])
def test_a_key_of_two_requests_at_once_is_of_one_of_them(
    gateway: RunningGateway,
    client: openai.OpenAI,
    echoing: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    is_written: bool,
) -> None:
    """The other one comes in before the first has its job, and both ask for the same in another form."""
    write = JobRecords.write
    others: list[Any] = []

    def ask_the_other() -> None:
        others.append(client.responses.create(model="fake", input="x", max_output_tokens=5, **KEYED[0]))

    async def meet(self: JobRecords, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(JobRecords, "write", write)
        written = await write(self, *args, **kwargs) if is_written else None
        await asyncio.to_thread(ask_the_other)
        return written or await write(self, *args, **kwargs)

    monkeypatch.setattr(JobRecords, "write", meet)
    asked: Any = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="fake", **asked, **KEYED[0])
    assert error.value.code == ErrorCode.IDEMPOTENCY_CONFLICT
    assert client.responses.retrieve(others[0].id).output_text == others[0].output_text != ""


def test_of_two_requests_at_once_with_a_key_the_one_that_has_the_job_has_its_record(
    gateway: RunningGateway, client: openai.OpenAI, echoing: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both in one form: the other one is refused for its body, once it has written its record."""
    write = JobRecords.write

    async def write_both(self: JobRecords, records: dict[str, JobRecord]) -> list[JobRecord]:
        written = await write(self, records)
        await write(self, {name: record.model_copy(update={"model": "other"}) for name, record in records.items()})
        return written

    monkeypatch.setattr(JobRecords, "write", write_both)
    created = client.responses.create(model="fake", input="x", max_output_tokens=5, **KEYED[0])
    assert created.model == client.responses.retrieve(created.id).model == "fake"


def test_a_job_that_is_asked_after_keeps_its_record(
    gateway: RunningGateway, client: openai.OpenAI, echoing: FakeWorker, redis_client: redis.Redis
) -> None:
    client.completions.create(model="fake", prompt="x")
    [name] = [key.decode() for key in redis_client.scan_iter(f"{RECORD_PREFIX}*")]
    redis_client.expire(name, 60)
    job_id = name.removeprefix(RECORD_PREFIX)
    assert httpx.get(f"{gateway.url}/v1/jobs/{job_id}").json()["status"] == "finished"
    assert redis_client.ttl(name) > 6 * 24 * 3600


@pytest.mark.parametrize(("keyed", "is_retried"), [({}, "false"), *((keyed, "true") for keyed in KEYED)])
def test_a_queue_that_goes_away_amid_a_request_is_asked_again_only_where_that_makes_no_other_job(
    client: openai.OpenAI,
    gateway: RunningGateway,
    worker: FakeWorker,
    monkeypatch: pytest.MonkeyPatch,
    keyed: dict[str, Any],
    is_retried: str,
) -> None:
    async def lose_the_reply(*args: Any, **options: Any) -> list[AsyncJob]:
        raise RedisUnavailableError("Connection closed by server.")

    assert gateway.context is not None
    monkeypatch.setattr(gateway.context.client, "submit_many", lose_the_reply)
    with pytest.raises(openai.InternalServerError, match="it may or may not have been") as refused:
        client.completions.create(model="fake", prompt="x", **keyed)
    assert refused.value.response.headers["x-should-retry"] == is_retried
