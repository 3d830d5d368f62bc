"""The command line against a real Redis and a fake worker: what it prints, where, and its exit codes."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from producer import Client
from tests.fakes.command_line import Invoke
from tests.fakes.fake_worker import FakeWorker, echo


def test_a_failed_result_as_json_is_printed_all_the_same(
    promptmill: Invoke, worker: FakeWorker, redis_url: str
) -> None:
    with Client(redis_url) as client:
        job = client.submit("fail")
    with worker.serving(echo):
        result = promptmill("result", job.id, "--json", "--timeout", "30")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == "engine_error"


def test_the_help_says_what_exit_codes_mean_and_which_redis_is_meant(promptmill: Invoke) -> None:
    shown = promptmill("--help").stdout
    for code in ("0    done", "1    a job failed", "2    a flag", "3    Redis cannot be reached", "130  interrupted"):
        assert code in shown
    assert "redis://localhost:6379" in promptmill("worker", "--help").stdout
    assert "redis://localhost:6379" not in promptmill("serve", "--help").stdout  # it starts one of its own


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["submit", "x", "--temperature", "9"], 2, "temperature: must be at most 2; got 9.0"),
        (["submit", "x", "--model", "other"], 2, "no live worker serves 'other'; served are: fake"),
        (["submit", "x", "--max-tokens", "many"], 2, "--max-tokens"),
        (["submit", "x", "--redis-url", "http://x"], 2, "--redis-url (PROMPTMILL_REDIS_URL)"),
        (["submit", "x", "--redis-url", "redis://:secret@127.0.0.1:1/0"], 3, "redis://:***@127.0.0.1:1/0 cannot be"),
        (["submit", "x", "--timeout", "0.05"], 1, "has not ended within 0.05 s"),
        (["submit", "x", "--timeout", "nan"], 2, "leave it out to wait without a limit"),
        (["submit", ""], 2, "PROMPT is empty"),
        (["submit", "x", "--detach", "--stream"], 2, "leave out --stream"),
        (["submit", "x", "--embed", "--stream"], 2, "leave out --stream"),
        (["submit", "x", "--embed", "--system", "y"], 2, "leave out --raw and --system"),
        (["submit", "x", "--embed", "--temperature", "0"], 2, "temperature: has no meaning with task 'embed'"),
        (["submit", "x", "--dimensions", "3"], 2, "add --embed"),
        (["result", "x", "--timeout", "-1"], 2, "--timeout"),
        (["result", "nobody"], 1, "there is no job nobody"),
        (["cancel", "nobody"], 1, "there is no job nobody"),
        (["run", "missing.jsonl", "out.jsonl"], 2, "missing.jsonl"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_every_failure_is_said_once_without_a_traceback(
    promptmill: Invoke, worker: FakeWorker, arguments: list[str], code: int, words: str
) -> None:
    result = promptmill(*arguments)
    assert result.exit_code == code
    assert words in result.stderr and "Traceback" not in result.stderr and "secret" not in result.stderr
    assert result.stdout == ""


def test_a_run_that_cannot_begin_says_why_in_one_line_without_a_bar(promptmill: Invoke, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("country\nFrance\n")
    result = promptmill("run", str(tmp_path / "in.csv"), str(tmp_path / "out.csv"), "--prompt", "{nobody}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: --prompt: there is no column 'nobody'; the columns are: country\n"


def test_cancel_tells_what_it_did_to_each(promptmill: Invoke, worker: FakeWorker, redis_url: str) -> None:
    with Client(redis_url) as client:
        ended = client.submit("a")
        echo(worker.claim())
        queued = client.submit("b")
    result = promptmill("cancel", queued.id, ended.id, "nobody")
    assert result.exit_code == 1
    assert result.stdout == f"{queued.id} cancelled\n{ended.id} had ended before\n"
    assert "nobody" in result.stderr
    shown = promptmill("result", queued.id)
    assert (shown.exit_code, shown.stdout) == (1, "\n")
    assert "was cancelled" in shown.stderr


def test_status_shows_queues_and_workers(promptmill: Invoke, worker: FakeWorker, redis_url: str) -> None:
    with Client(redis_url) as client:
        client.submit("a")
    shown = json.loads(promptmill("status", "--json").stdout)
    [queue] = shown["queues"]
    assert (queue["name"], queue["depth"], queue["registries"]["finished"]) == ("promptmill", 1, 0)
    assert [found["models"] for found in shown["workers"]] == [["fake"]]
    table = promptmill("status")
    assert table.exit_code == 0 and "fake" in table.stdout and "promptmill" in table.stdout
    assert "cancelled" in table.stdout and "…" not in table.stdout, "it fits into 80 characters"
    assert "scheduled" not in table.stdout, "nothing is"


def test_status_shows_the_tenants_that_have_work_or_failures_and_counts_the_others(
    promptmill: Invoke, redis_client: redis.Redis
) -> None:
    for tenant, registry in (("busy", "wip"), ("broken", "failed"), ("done", "finished"), ("over", "finished")):
        redis_client.sadd("rq:queues", f"rq:queue:promptmill@{tenant}")
        redis_client.zadd(f"rq:{registry}:promptmill@{tenant}", {f"{tenant}-{at}": time.time() for at in range(3)})
    redis_client.zadd("rq:failed:promptmill@over", {"x": time.time()})
    table = promptmill("status").stdout
    assert {word for word in table.split() if "@" in word} == {
        f"promptmill@{name}" for name in ("busy", "broken", "over")
    }
    assert "and 1 queues of tenants at rest, 3 jobs finished; to see them: --json" in table
    assert "promptmill@done" in promptmill("status", "--json").stdout


def test_status_without_a_worker_names_the_remedy(promptmill: Invoke, redis_url: str) -> None:
    result = promptmill("status")
    assert result.exit_code == 0 and "promptmill worker" in result.stdout


def test_run_answers_a_file_and_fails_for_a_broken_line(promptmill: Invoke, worker: FakeWorker, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "hello"}}
    source.write_text(json.dumps(good) + "\n")
    with worker.serving(echo):
        result = promptmill("run", str(source), str(target))
        assert result.exit_code == 0 and "1 answered, 0 failed" in result.stderr
        source.write_text(json.dumps(good) + "\n{broken\n")
        refused = promptmill("run", str(source), str(target))
        result = promptmill("run", str(source), str(tmp_path / "new.jsonl"))
    assert refused.exit_code == 2 and "out.jsonl, line 1, answers another input" in refused.stderr
    assert result.exit_code == 1 and "1 answered, 1 failed" in result.stderr
    assert "the first that failed, line 2: the line is not JSON: Expecting property name" in result.stderr
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 2


def test_a_run_that_nobody_works_on_says_so_and_one_in_a_log_says_how_far_it_is(
    promptmill: Invoke, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("producer.commands.progress.REPORT_SECONDS", 0.0)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": {"prompt": "hello"}}) + "\n")
    with FakeWorker(redis_url) as silent, silent.serving(echo):
        result = promptmill("run", str(source), str(tmp_path / "out.jsonl"), "--priority-class", "normal")
    assert "no live worker drains the queue 'promptmill'; the jobs wait for one" in result.stderr
    assert "1 of 1 done, 0 failed" in result.stderr


def test_what_the_terminals_encoding_lacks_is_printed_escaped(worker: FakeWorker, redis_url: str) -> None:
    with worker.serving(echo):
        done = subprocess.run(
            [sys.executable, "-m", "producer", "submit", "gr\u00f6\u00dfe \u2713"],
            env={**os.environ, "PROMPTMILL_REDIS_URL": redis_url, "PYTHONIOENCODING": "latin-1"},
            capture_output=True,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "gr\u00f6\u00dfe \\u2713" in done.stdout.decode("latin-1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [["--help"], ["status"], ["failed"]])
def test_output_that_finds_no_room_is_one_line(redis_url: str, arguments: list[str]) -> None:
    environment = {**os.environ, "PROMPTMILL_REDIS_URL": redis_url}
    for buffering in ("", "1"):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "producer", *arguments],
                env={**environment, "PYTHONUNBUFFERED": buffering},
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )
        assert done.returncode == 1
        assert done.stderr == "Error: standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_an_answer_that_finds_no_room_is_not_called_cancelled(worker: FakeWorker, redis_url: str) -> None:
    with open("/dev/full", "w") as full, worker.serving(echo):
        done = subprocess.run(
            [sys.executable, "-m", "producer", "submit", "hello"],
            env={**os.environ, "PROMPTMILL_REDIS_URL": redis_url},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    fate, reason = done.stderr.splitlines()
    words = fate.split()
    assert done.returncode == 1 and reason.startswith("Error: standard output cannot be written")
    assert " ".join(words[2:]) == f"had ended; to see its result: promptmill result {words[1]}"
    with Client(redis_url) as client:
        assert client.job(words[1]).result(timeout=20).status == "finished"
