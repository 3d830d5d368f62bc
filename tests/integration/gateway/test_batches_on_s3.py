"""A batch whose files lie in a bucket, from the upload to the last byte of its answers: the official client, a gateway
with its carrier process, a server of S3's protocol."""

import json
from typing import Any

import openai
import pytest

from tests.fakes.batches import URL, jsonl, line
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.file_stores import BucketOfFiles
from tests.fakes.flaky_s3 import BUCKET, FlakyS3
from tests.fakes.gateways import StartGateway, open_client
from tests.fakes.held_job import HeldJob
from tests.fakes.storing_worker import storing
from tests.fakes.waiting import wait_until

NUM_LINES = 60


@pytest.fixture
def bucket(s3_endpoint: str, request: pytest.FixtureRequest) -> BucketOfFiles:
    return BucketOfFiles(s3_endpoint, request.node.name)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    found = [json.loads(text) for text in client.files.content(str(file_id)).read().splitlines()]
    by_id = {entry["custom_id"]: entry for entry in found}
    assert len(by_id) == len(found)
    return by_id


def test_a_result_that_may_not_be_read_is_its_lines_error_alone(
    start_gateway: StartGateway, low: FakeWorker, s3_server: FlakyS3
) -> None:
    store = storing(s3_server.endpoint)

    def store_and_refuse(held: HeldJob) -> None:
        if held.arguments["prompt"] == "secret":
            s3_server.refused.add(f"/{BUCKET}/jobs/{held.job_id}.json")
        store(held)

    requests = [line(name, name) for name in ("a", "secret", "b")]
    gateway = start_gateway(s3_endpoint_url=s3_server.endpoint)
    with open_client(gateway) as client, low.serving(store_and_refuse):
        file_id = client.files.create(file=("in.jsonl", jsonl(requests)), purpose="batch").id
        made = client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h")
        wait_until(lambda: client.batches.retrieve(made.id).status == "completed")
        batch = client.batches.retrieve(made.id)
        output, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert set(output) == {"a", "b"} and set(errors) == {"secret"}
    refused = errors["secret"]["response"]
    assert (refused["status_code"], refused["body"]["error"]["code"]) == (502, "result_store_error")
    assert "AccessDenied" in refused["body"]["error"]["message"]


def test_a_batch_on_s3_is_answered_line_by_line_and_leaves_nothing_when_it_is_deleted(
    start_gateway: StartGateway, low: FakeWorker, bucket: BucketOfFiles
) -> None:
    requests = [line(f"r{at}", "fail" if at % 20 == 7 else f"words of {at}") for at in range(NUM_LINES)]
    failing = {entry["custom_id"] for entry in requests if entry["body"]["prompt"] == "fail"}
    with open_client(start_gateway(**bucket.settings)) as client, low.serving(echo):
        file_id = client.files.create(file=("in.jsonl", jsonl(requests)), purpose="batch").id
        made = client.batches.create(input_file_id=file_id, endpoint=URL, completion_window="24h")
        wait_until(lambda: client.batches.retrieve(made.id).status not in ("validating", "in_progress", "finalizing"))
        batch = client.batches.retrieve(made.id)
        assert (batch.status, batch.errors) == ("completed", None)
        counts = batch.request_counts
        assert counts is not None
        assert (counts.total, counts.completed, counts.failed) == (
            NUM_LINES,
            NUM_LINES - len(failing),
            len(failing),
        )
        output, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
        assert set(errors) == failing and set(output) | failing == {entry["custom_id"] for entry in requests}
        assert output["r3"]["response"]["body"]["choices"][0]["text"] == "words of 3 "
        assert len(bucket.names()) >= 3
        for name in (file_id, batch.output_file_id, batch.error_file_id):
            assert client.files.delete(str(name)).deleted
        wait_until(lambda: not bucket.names())
