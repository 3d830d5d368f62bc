"""`BatchRun` on real files and a real Redis: answers, broken lines, backpressure, priority classes."""

import json
import re
from pathlib import Path

import pytest
import redis

from producer import BatchFileError, InvalidJobError
from producer.contract import ErrorCode, ErrorInfo
from tests.fakes.batch_runs import answers, by_id, chat, completion, run
from tests.fakes.command_line import Invoke
from tests.fakes.fake_worker import FakeWorker, echo
from tests.fakes.held_job import HeldJob


def test_every_line_is_answered_in_openais_shape(redis_url: str, worker: FakeWorker, files: tuple[Path, Path]) -> None:
    files[0].write_text(chat("c1", "one two", n=2) + "\n\n" + completion("t1", "three four", max_tokens=1) + "\n")
    with worker.serving(echo):
        progress = run(redis_url, files)
    assert (progress.num_lines, progress.num_done, progress.num_failed) == (2, 2, 0)
    assert progress.num_output_tokens == 22 and re.fullmatch("[0-9]+ tokens/s", progress.speed)
    found = by_id(files[1])
    response = found["c1"]["response"]
    assert found["c1"]["error"] is None and response["status_code"] == 200
    assert response["body"]["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in response["body"]["choices"]] == ["one two ", "one two "]
    assert response["body"]["choices"][1]["finish_reason"] == "length"
    body = found["t1"]["response"]["body"]
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "three ")
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 6,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_a_broken_line_fails_alone(redis_url: str, worker: FakeWorker, files: tuple[Path, Path]) -> None:
    lines = [
        chat("good", "hello"),
        "{broken",
        json.dumps({"url": "/v1/completions", "body": {"prompt": "no id"}}),
        chat("good", "again"),
        json.dumps({"custom_id": "elsewhere", "url": "/v1/images", "body": {}}),
        json.dumps({"custom_id": "bodiless", "url": "/v1/completions"}),
        completion("hot", "hello", temperature=9),
        completion("unknown", "hello", temprature=0),
        completion("failing", "fail"),
        completion("keyed", "hello", idempotency_key="order-1"),
        '"no object"',
        json.dumps({"custom_id": "half \ud800", "url": "/v1/completions", "body": {"prompt": "\ud800"}}),
    ]
    files[0].write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    with worker.serving(echo):
        progress = run(redis_url, files)
    assert (progress.num_lines, progress.num_done, progress.num_failed) == (13, 13, 12)
    found = answers(files[1])
    bad = {answer["error"]["line"]: answer["error"]["code"] for answer in found if answer["error"] is not None}
    assert bad == {
        2: "invalid_json_line",
        3: "missing_custom_id",
        4: "duplicate_custom_id",
        5: "invalid_url",
        6: "invalid_body",
        11: "invalid_json_line",
        13: "invalid_json_line",
    }
    refused = {answer["custom_id"]: answer["response"] for answer in found if answer["error"] is None}
    assert refused["good"]["status_code"] == 200
    assert refused["hot"]["status_code"] == 400
    assert refused["hot"]["body"]["error"] == {
        "message": "temperature: must be at most 2; got 9",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "invalid_request",
    }
    assert "did you mean temperature?" in refused["unknown"]["body"]["error"]["message"]
    assert refused["failing"]["status_code"] == 500
    assert refused["keyed"]["body"]["error"]["param"] == "idempotency_key"
    assert refused["half \ud800"]["body"]["error"]["param"] == "prompt"

    before = files[1].read_bytes()
    assert run(redis_url, files).num_done == 13  # nothing is left to do, and nothing is written twice
    assert files[1].read_bytes() == before


def test_lines_that_begin_alike_are_run_next_to_each_other(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    systems = ["You are terse. " * 20, "You are kind. " * 20]
    files[0].write_text("".join(completion(f"{n}", systems[n % 2] + str(n)) + "\n" for n in range(8)))
    with worker.serving(echo):
        run(redis_url, files)
    assert [answer["custom_id"] for answer in answers(files[1])] == ["0", "2", "4", "6", "1", "3", "5", "7"]


def test_no_more_jobs_are_in_flight_than_allowed(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path], redis_client: redis.Redis
) -> None:
    files[0].write_text("".join(completion(f"r{i}", "word") + "\n" for i in range(60)))
    depths: list[int] = []

    def measure(held: HeldJob) -> None:
        depths.append(1 + int(redis_client.llen("rq:queue:promptmill")))
        echo(held)

    with worker.serving(measure):
        assert run(redis_url, files, max_in_flight=8).num_done == 60
    assert 2 <= max(depths) <= 8


def test_a_model_nobody_serves_fails_its_lines_only(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    worker.announce("mine")
    files[0].write_text(chat("a", "word", model="mine") + "\n" + chat("b", "word", model="gpt-9") + "\n")
    with worker.serving(echo):
        run(redis_url, files)
    found = by_id(files[1])
    assert found["a"]["response"]["status_code"] == 200
    assert found["b"]["response"]["status_code"] == 404
    assert found["b"]["response"]["body"]["error"]["code"] == "model_not_found"
    files[1].unlink()
    with worker.serving(echo):
        assert run(redis_url, files, model="mine").num_failed == 0


@pytest.mark.parametrize(
    ("drained", "given", "taken"),
    [
        (["promptmill", "promptmill:low"], None, "promptmill:low"),  # behind those who wait for their answers
        (["promptmill", "promptmill:low"], "", "promptmill"),
        (["promptmill"], None, "promptmill"),
        (["promptmill"], "high", "promptmill:high"),
        ([], None, "promptmill"),
    ],
)
def test_lines_go_to_the_low_class_unless_another_is_named_or_nobody_drains_it(
    redis_url: str, files: tuple[Path, Path], drained: list[str], given: str | None, taken: str
) -> None:
    files[0].write_text(chat("a", "word") + "\n")
    with FakeWorker(redis_url, queue=taken) as worker:
        if drained:
            worker.announce("fake", queues=drained, seconds=60)
        with worker.serving(echo):
            progress = run(redis_url, files, priority_class=given)
    assert progress.num_done == 1
    assert progress.idle_queue == (None if taken in drained else taken)


def test_a_model_named_for_all_lines_that_nobody_serves_is_refused_before_any(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text(chat("a", "word") + "\n")
    with pytest.raises(InvalidJobError, match="no live worker serves 'gpt-9'"):
        run(redis_url, files, model="gpt-9")
    with worker.serving(echo):
        assert run(redis_url, files).num_failed == 0


@pytest.mark.parametrize("kind", ["lines", "table"])
def test_a_file_runs_as_a_tenants(
    redis_url: str, promptmill: Invoke, tmp_path: Path, files: tuple[Path, Path], kind: str
) -> None:
    if kind == "lines":
        embedding = {"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "x", "model": "fake", "tenant": "b"}}
        files[0].write_text(chat("a", "word", tenant="zeta") + "\n" + json.dumps(embedding) + "\n")
        given: list[object] = [*files]
    else:
        (tmp_path / "in.csv").write_text("text\nword\n")
        given = [tmp_path / "in.csv", tmp_path / "out.csv", "--prompt", "{text}"]
    asked: list[str] = []

    def remember(held: HeldJob) -> None:
        asked.append(held.arguments["tenant"])
        held.begin().end("failed", error=ErrorInfo(code=ErrorCode.ENGINE_ERROR, message="no"))

    with FakeWorker(redis_url, queue="promptmill@acme") as worker:
        worker.announce("fake", queues=["promptmill"], seconds=60)
        with worker.serving(remember):
            promptmill("run", *given, "--tenant", "acme")
            refused = promptmill(
                "run", *given[:1], tmp_path / f"other{files[1].suffix}", *given[2:], "--tenant", "not one"
            )
    assert asked == ["acme"] * (2 if kind == "lines" else 1)
    assert refused.exit_code == 2 and "tenant" in refused.stderr
    assert not list(tmp_path.glob("other*"))  # what was refused has left nothing behind


def test_answers_of_another_model_are_not_taken_for_this_ones(
    redis_url: str, worker: FakeWorker, files: tuple[Path, Path]
) -> None:
    files[0].write_text(chat("a", "word") + "\n")
    models: list[str | None] = []

    def remember(held: HeldJob) -> None:
        models.append(held.arguments.get("model"))
        echo(held)

    worker.announce("one", "two")
    with worker.serving(remember):
        for model in (None, "one", "two", "one"):  # the last finds what it was told before
            files[1].unlink(missing_ok=True)
            assert run(redis_url, files, model=model).num_failed == 0
        with pytest.raises(BatchFileError, match="goes with another --model"):
            run(redis_url, files, model="two")
    assert models == [None, "one", "two"]


def test_files_that_cannot_be_used_are_named(redis_url: str, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(chat("a", "b") + "\n")
    with pytest.raises(BatchFileError, match=r"in\.jsonl is the input as well"):
        run(redis_url, (source, source))
    with pytest.raises(BatchFileError, match=r"missing\.jsonl cannot be read"):
        run(redis_url, (tmp_path / "missing.jsonl", target))
    with pytest.raises(BatchFileError, match="nowhere"):
        run(redis_url, (source, tmp_path / "nowhere" / "out.jsonl"))
    with pytest.raises(BatchFileError, match="/dev/null is not a regular file"):
        run(redis_url, (source, Path("/dev/null")))
    target.write_text('{"something": "else"}\n')
    with pytest.raises(BatchFileError, match="line 1, is not an answer of a batch"):
        run(redis_url, (source, target))
    assert target.read_text() == '{"something": "else"}\n'
