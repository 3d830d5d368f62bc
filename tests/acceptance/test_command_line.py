"""`promptmill …` as a user types it, against a worker with the real model."""

import json
from pathlib import Path

import pytest

from tests.acceptance.system import System

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


def test_submit_prints_a_sentence_with_paris_and_streams_the_same_text(running_system: System) -> None:
    arguments = ["submit", "What is the capital of France?", "--max-tokens", "20", "--temperature", "0"]
    plain, streamed = running_system.run(*arguments), running_system.run(*arguments, "--stream")
    assert (plain.returncode, streamed.returncode) == (0, 0), plain.stderr + streamed.stderr
    assert "Paris" in plain.stdout
    assert streamed.stdout.strip() == plain.stdout.strip()


def test_submit_as_json_gives_a_result_that_result_gives_again(running_system: System) -> None:
    done = running_system.run("submit", "Name a colour.", "--max-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "finished" and result["usage"]["completion_tokens"] <= 8
    again = running_system.run("result", result["job_id"], "--json")
    assert json.loads(again.stdout) == result


def test_a_bad_temperature_is_refused_by_name_before_it_is_enqueued(running_system: System) -> None:
    done = running_system.run("submit", "Hello", "--temperature", "9")
    assert done.returncode == 2
    assert "temperature" in done.stderr and "Traceback" not in done.stderr


def test_a_model_that_nobody_serves_is_refused_with_the_ones_that_are(running_system: System) -> None:
    done = running_system.run("submit", "Hello", "--model", "no-such-model")
    assert done.returncode == 2
    assert "no-such-model" in done.stderr and "smollm2-135m" in done.stderr


def test_a_prompt_longer_than_the_context_fails_with_the_numbers(running_system: System) -> None:
    done = running_system.run("submit", "word " * 20_000, "--max-tokens", "5")
    assert done.returncode == 1
    assert "8192" in done.stderr and "Traceback" not in done.stderr


def test_status_shows_the_worker_and_what_it_serves(running_system: System) -> None:
    done = running_system.run("status", "--json")
    assert done.returncode == 0, done.stderr
    assert "smollm2-135m" in done.stdout


def test_redis_out_of_reach_is_one_clear_line(running_system: System) -> None:
    done = running_system.run("submit", "Hello", PROMPTMILL_REDIS_URL="redis://127.0.0.1:1/0")
    assert done.returncode == 3
    assert "127.0.0.1:1" in done.stderr and "Traceback" not in done.stderr


def test_run_answers_every_line_once_and_a_broken_line_fails_alone(running_system: System, tmp_path: Path) -> None:
    body = {"model": "smollm2-135m", "max_tokens": 12, "temperature": 0}
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    lines = [
        json.dumps(
            {
                "custom_id": f"r{i}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {**body, "messages": messages},
            }
        )
        for i in range(5)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([*lines[:2], "{broken", *lines[2:]]) + "\n")

    first = running_system.run("run", str(source), str(target))
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    good = {answer["custom_id"]: answer for answer in answers if answer["error"] is None}
    assert sorted(good) == [f"r{i}" for i in range(5)], first.stderr
    for answer in good.values():
        assert "Paris" in answer["response"]["body"]["choices"][0]["message"]["content"]
    assert len(answers) == 6

    running_system.run("run", str(source), str(target))
    again = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(answer["custom_id"] for answer in again if answer["error"] is None) == sorted(good)
