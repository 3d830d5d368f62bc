"""/v1/batches through the official client, on a gateway with its own carrier process."""

import json
from typing import Any

import httpx2 as httpx
import openai
import pytest
import redis as redis_py

from producer.contract import keys
from producer.gateway.api_keys import add_key, make_key
from producer.gateway.batches.batch_keys import ID_PREFIX, index_key
from producer.gateway.files.file_keys import EVERYBODYS, make_id
from producer.transport import Transport
from tests.fakes.batches import URL, counts_of, jsonl, line
from tests.fakes.command_line import new_key
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.gateways import RunningGateway, open_client
from tests.fakes.waiting import eventually, wait_until

LOW = keys.class_queue(keys.DEFAULT_QUEUE, "low")
ENDED = ("completed", "failed", "expired", "cancelled")


def upload(client: openai.OpenAI, lines: Any) -> str:
    """The id of a new file."""
    return client.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch").id


def read(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """A file's lines by custom_id; each is there once."""
    assert file_id is not None
    lines = [json.loads(text) for text in client.files.content(file_id).read().splitlines()]
    by_id = {entry["custom_id"]: entry for entry in lines}
    assert len(by_id) == len(lines)
    return by_id


def start(client: openai.OpenAI, file_id: str, **fields: Any) -> Any:
    return client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h", **fields)


def wait(client: openai.OpenAI, batch_id: str, *statuses: str) -> Any:
    wait_until(lambda: client.batches.retrieve(batch_id).status in (statuses or ENDED))
    return client.batches.retrieve(batch_id)


def test_a_batch_goes_through_every_status_to_its_end(client: openai.OpenAI, low: FakeWorker, redis_url: str) -> None:
    file_id = upload(client, [line("a", "one two"), line("b", "fail")])
    created = start(client, file_id, metadata={"run": "7"}, extra_body={"output_expires_after": EXPIRY})
    assert (created.object, created.status, created.input_file_id) == ("batch", "validating", file_id)
    assert created.expires_at == created.created_at + 24 * 3600
    assert (created.errors, created.output_file_id, created.model) == (None, None, None)
    running = wait(client, created.id, "in_progress")
    assert (running.model, running.request_counts.total, running.metadata) == ("fake", 2, {"run": "7"})
    with low.serving(echo):
        ended = wait(client, created.id)
    assert ended.status == "completed"
    answered, failed = read(client, ended.output_file_id)["a"], read(client, ended.error_file_id)["b"]
    assert answered["response"]["body"]["choices"][0]["text"] == "one two " and answered["error"] is None
    assert failed["response"]["status_code"] == 500
    purposes = {file.id: (file.purpose, file.status) for file in client.files.list()}
    assert purposes[ended.output_file_id] == purposes[ended.error_file_id] == ("batch_output", "processed")
    assert (ended.request_counts.completed, ended.request_counts.failed) == (1, 1)
    assert ended.usage.total_tokens == ended.usage.input_tokens + ended.usage.output_tokens > 0
    assert ended.in_progress_at <= ended.finalizing_at <= ended.completed_at
    stats = httpx.get(f"{client.base_url}".replace("/v1/", "/stats")).json()
    assert stats["batches"]["completed"] == 1
    metrics = httpx.get(f"{client.base_url}".replace("/v1/", "/metrics")).text
    assert 'promptmill_batches{status="completed"} 1.0' in metrics


EXPIRY = {"anchor": "created_at", "seconds": 3600}


async def test_the_asynchronous_client_sees_the_same(gateway: RunningGateway, low: FakeWorker, redis_url: str) -> None:
    async with (
        openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client,
    ):
        file = await client.files.create(file=("in.jsonl", jsonl([line("a"), line("b")])), purpose="batch")
        created = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        assert [batch.id async for batch in client.batches.list()] == [created.id]

        async def has_come_to(status: str) -> openai.types.Batch | None:
            batch = await client.batches.retrieve(created.id)
            return batch if batch.status == status else None

        await eventually(lambda: has_come_to("in_progress"))
        cancelled = await client.batches.cancel(created.id)
        assert cancelled.status in ("cancelling", "cancelled") and cancelled.cancelling_at
        ended = await eventually(lambda: has_come_to("cancelled"))
        content = await client.files.content(str(ended.error_file_id))
        assert {json.loads(text)["error"]["code"] for text in content.read().splitlines()} == {"batch_cancelled"}


def test_an_idempotency_key_makes_one_batch_of_two_requests(
    gateway: RunningGateway, low: FakeWorker, redis_url: str, redis_client: redis_py.Redis
) -> None:
    headers = {"Idempotency-Key": "nightly-7"}
    with open_client(gateway) as client:
        file_id = upload(client, [line("a")])
        created = start(client, file_id, extra_headers=headers)
        again = start(client, file_id, extra_headers=headers)
        assert again.id == created.id and again.created_at == created.created_at
        with pytest.raises(openai.ConflictError) as error:
            start(client, file_id, metadata={"run": "8"}, extra_headers=headers)
        assert error.value.code == "idempotency_conflict" and error.value.response.headers["x-should-retry"] == "false"
        assert start(client, file_id).id != created.id
        with low.serving(echo):
            assert wait(client, created.id).status == "completed"
        assert start(client, file_id, extra_headers=headers).status == "completed"
        assert len(client.batches.list().data) == 2
        text = new_key(redis_url, "theirs")
        wait_until(lambda: _is_refused(gateway))
        with open_client(gateway, api_key=text) as other:
            theirs = start(other, upload(other, [line("a")]), extra_headers=headers)
        assert theirs.id != created.id
    [asked, _] = redis_client.keys("promptmill:batches:asked:*")
    assert 0 < redis_client.ttl(asked) <= 24 * 3600


def test_a_file_that_fails_validation_says_where(client: openai.OpenAI, low: FakeWorker) -> None:
    created = start(client, upload(client, [line("a"), line("a"), line("b", url="/v1/chat/completions")]))
    failed = wait(client, created.id)
    assert failed.status == "failed" and failed.failed_at and failed.errors.object == "list"
    assert [(entry.line, entry.code, entry.param) for entry in failed.errors.data] == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "url_mismatch", "url"),
    ]
    with pytest.raises(openai.ConflictError, match="is failed and cannot be cancelled"):
        client.batches.cancel(created.id)


def test_a_cancelled_batch_ends_with_an_error_for_every_line(
    client: openai.OpenAI, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    created = start(client, upload(client, [line(str(number)) for number in range(20)]))
    wait(client, created.id, "in_progress")
    wait_until(lambda: redis_client.llen(f"rq:queue:{LOW}") == 20)
    for _ in range(2):
        assert client.batches.cancel(created.id).status in ("cancelling", "cancelled")
    ended = wait(client, created.id)
    assert (ended.status, ended.request_counts.failed, ended.request_counts.total) == ("cancelled", 20, 20)
    assert redis_client.llen(f"rq:queue:{LOW}") == 0


def test_output_can_be_read_while_the_batch_runs_and_its_files_cannot_be_deleted(
    client: openai.OpenAI, low: FakeWorker
) -> None:
    file_id = upload(client, [line("a", "one"), line("b", "two")])
    created = start(client, file_id)
    echo(low.claim())
    wait_until(lambda: counts_of(client, created.id) == (1, 0))
    running = client.batches.retrieve(created.id)
    assert running.status == "in_progress" and list(read(client, running.output_file_id)) == ["a"]
    for held in (file_id, str(running.output_file_id)):
        with pytest.raises(openai.ConflictError):
            client.files.delete(held)
    with low.serving(echo):
        ended = wait(client, created.id)
    assert (ended.status, ended.output_file_id) == ("completed", running.output_file_id)
    assert set(read(client, ended.output_file_id)) == {"a", "b"}
    assert client.files.delete(file_id).deleted


def test_lists_forget_batches_that_are_long_gone(
    client: openai.OpenAI, low: FakeWorker, redis_client: redis_py.Redis
) -> None:
    index = index_key(EVERYBODYS)
    redis_client.zadd(index, {make_id(ID_PREFIX, 1_700_000_000, 0): 0})
    batch = start(client, upload(client, [line("a")]))
    assert redis_client.zrange(index, 0, -1) == [batch.id.encode()]


def test_lists_go_from_the_newest_on_page_by_page(client: openai.OpenAI, low: FakeWorker) -> None:
    file_id = upload(client, [line("a")])
    ids = [start(client, file_id).id for _ in range(7)]
    assert [batch.id for batch in client.batches.list(limit=3)] == ids[::-1]  # all pages
    page = client.batches.list(limit=3)
    assert (len(page.data), page.has_more) == (3, True)
    second = client.batches.list(limit=3, after=page.data[-1].id)
    assert [batch.id for batch in second.data] == ids[3:0:-1]
    assert client.batches.list(limit=1, after=ids[0]).data == []
    with pytest.raises(openai.BadRequestError, match="limit"):
        client.batches.list(limit=101)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/images"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {"k": "x" * 513}}, "metadata.k"),
        ({"metadata": {"k": 7}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_bad_request_names_its_field(gateway: RunningGateway, fields: dict[str, Any], param: str) -> None:
    good = {"input_file_id": "file-1", "endpoint": URL, "completion_window": "24h"}
    response = httpx.post(f"{gateway.url}/v1/batches", json={**good, **fields})
    error = response.json()["error"]
    assert response.status_code == 400 and error["message"].startswith(param), error
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"


def test_what_is_not_there_is_not_found(client: openai.OpenAI) -> None:
    for file_id in ("file-1", "file-" + "0" * 30, f"{upload(client, [1])}:parts"):
        with pytest.raises(openai.NotFoundError, match="input_file_id: there is no file"):
            start(client, file_id)
    for batch_id in ("batch_1", "batch_" + "0" * 30, "batch_" + "0" * 30 + ":answered"):
        with pytest.raises(openai.NotFoundError, match="no batch"):
            client.batches.retrieve(batch_id)
        with pytest.raises(openai.NotFoundError, match="no batch"):
            client.batches.cancel(batch_id)


def test_a_key_sees_its_own_batches_and_files_alone(gateway: RunningGateway, low: FakeWorker, redis_url: str) -> None:
    made = {name: make_key(name=name, is_operator=name == "operator") for name in ("ours", "theirs", "operator")}
    transport = Transport(redis_url)
    for key, _ in made.values():
        transport.run(add_key(key))
    transport.close()
    clients = {name: open_client(gateway, api_key=text) for name, (_, text) in made.items()}
    wait_until(lambda: _is_refused(gateway))  # the first key counts once the gateway looks again
    file_id = upload(clients["ours"], [line("a")])
    batch = start(clients["ours"], file_id)
    assert clients["operator"].batches.retrieve(batch.id).id == batch.id
    assert [found.id for found in clients["operator"].batches.list()] == [batch.id]
    assert [found.id for found in clients["ours"].batches.list()] == [batch.id]
    assert list(clients["theirs"].batches.list()) == []
    with pytest.raises(openai.NotFoundError):
        clients["theirs"].batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        clients["theirs"].batches.cancel(batch.id)
    with pytest.raises(openai.NotFoundError):
        start(clients["theirs"], file_id)
    for client in clients.values():
        client.close()


def test_a_key_that_may_not_use_the_model_fails_its_batch(
    gateway: RunningGateway, low: FakeWorker, redis_url: str
) -> None:
    key, text = make_key(name="narrow", models=["other"], tenant="acme")
    transport = Transport(redis_url)
    transport.run(add_key(key))
    transport.close()
    wait_until(lambda: _is_refused(gateway))
    with open_client(gateway, api_key=text) as client:
        failed = wait(client, start(client, upload(client, [line("a")])).id)
    assert failed.status == "failed" and failed.errors.data[0].code == "model_not_allowed"


def _is_refused(gateway: RunningGateway) -> bool:
    return httpx.get(f"{gateway.url}/v1/batches").status_code == 401
