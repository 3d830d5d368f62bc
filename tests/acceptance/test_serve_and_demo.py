"""`promptmill serve` and `promptmill demo` as processes: what they print, what they start, and that nothing is left."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import openai
import pytest
import redis

from producer import Client
from tests.fakes.ports import free_port
from tests.fakes.tiny_models import make_tiny_model
from tests.fakes.waiting import wait_until
from worker import gateway_process
from worker.started_process import StartedProcess

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

START_SECONDS = 240.0  # the demo model's first start converts it into the cache
LEAVE_SECONDS = 10.0
NUM_TOKENS = 2000  # which take longer than to kill who serves them
ONE_THREAD = ("--num-threads", "1")  # two threads wait for each other where another core is busy
MARK = "PROMPTMILL_TEST_MARK"


class Command:
    """`promptmill …` with a mark in its environment, by which every process it starts is found again."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.mark = uuid4().hex
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process: Any = StartedProcess(
            [sys.executable, "-m", "producer", *arguments],
            env={**os.environ, MARK: self.mark},
            text=True,
            **options,
        )
        self.process: subprocess.Popen[str] = process

    def end(self, signum: int) -> int:
        self.process.send_signal(signum)
        return self.process.wait(30)

    def living_processes(self, command: Sequence[str] = ()) -> list[int]:
        """Those of this command, or all."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (folder / "cmdline").read_text(errors="replace").split("\0")
                is_meant = not command or arguments == [*command, ""]
                if is_meant and wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # it ended, or is not ours
                continue
        return found

    def has_left_nothing(self) -> bool:
        """A child that has lost its parent while it was importing may take a moment to see it."""
        end = time.monotonic() + LEAVE_SECONDS
        while self.living_processes() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.living_processes()

    def clean_up(self) -> None:
        self.process.kill()
        self.has_left_nothing()  # a server hides its environment: it is ended by its guard
        for pid in self.living_processes():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def start() -> Iterator[type[Command]]:
    started: list[Command] = []

    class Tracked(Command):
        def __init__(self, *arguments: str, **options: Any) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    yield Tracked
    for command in started:
        command.clean_up()


def wait_for_worker(url: str, command: Command) -> None:
    end = time.monotonic() + START_SECONDS
    with Client(url) as client:
        while not client.workers():
            assert command.process.poll() is None and time.monotonic() < end
            time.sleep(0.1)


def test_serve_answers_keeps_its_data_and_leaves_nothing_behind(start: type[Command], tmp_path: Path) -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    command = start(
        "serve", *ONE_THREAD, "--redis-port", str(port), "--data-dir", str(tmp_path), stderr=subprocess.DEVNULL
    )
    assert command.process.stdout is not None
    greeting = [command.process.stdout.readline() for _ in range(5)]
    assert url in greeting[0] and str(tmp_path) in greeting[0]
    assert (
        f'promptmill submit "What is the capital of France?" --max-tokens 20 --stream --redis-url {url}' in greeting[2]
    )
    wait_for_worker(url, command)
    base_url = greeting[3].split()[1]
    with openai.OpenAI(base_url=base_url, api_key="none") as openai_client:
        done = openai_client.completions.create(model="smollm2-135m", prompt="The capital of France is", temperature=0)
        assert "Paris" in done.choices[0].text
    with Client(url) as client:
        job = client.submit("What is the capital of France?", max_tokens=12, temperature=0)
        assert job.result(timeout=120).choices[0].token_ids
    assert command.end(signal.SIGINT) == 0
    assert command.has_left_nothing()

    again = start(
        "serve", *ONE_THREAD, "--redis-port", str(port), "--data-dir", str(tmp_path), stderr=subprocess.DEVNULL
    )
    assert again.process.stdout is not None and again.process.stdout.readline()
    with Client(url) as client:
        assert client.job(job.id).result(timeout=30).choices[0].token_ids
    assert again.end(signal.SIGTERM) == 0  # while the model is still being loaded
    assert again.has_left_nothing()


def test_a_killed_serve_leaves_nothing_running_and_the_next_goes_on_with_its_data(
    start: type[Command], tmp_path: Path
) -> None:
    model = str(make_tiny_model("llama", tmp_path / "model", max_position_embeddings=2 * NUM_TOKENS))
    port = free_port()
    own = ("--redis-port", str(port), "--data-dir", str(tmp_path / "data"))
    options = (*own, "--lease-seconds", "2", "--model", model, *ONE_THREAD)
    url = f"redis://127.0.0.1:{port}/0"
    killed = start("serve", *options, stderr=subprocess.DEVNULL)
    assert killed.process.stdout is not None and url in killed.process.stdout.readline()
    wait_for_worker(url, killed)
    with Client(url) as client:
        job = client.submit([5, 6, 7], max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        next(job.stream(timeout=START_SECONDS))
        killed.end(signal.SIGKILL)
        again = start("serve", *options, stderr=subprocess.DEVNULL)  # while the others still end
        assert again.process.stdout is not None and url in again.process.stdout.readline()
        assert killed.has_left_nothing()
        result = job.result(timeout=START_SECONDS)
    assert result.attempts > 1 and len(result.choices[0].token_ids) == NUM_TOKENS
    assert again.end(signal.SIGTERM) == 0
    assert again.has_left_nothing()


def test_serve_starts_what_was_killed_again_and_ends_with_its_redis(start: type[Command], tmp_path: Path) -> None:
    model = str(make_tiny_model("llama", tmp_path, max_position_embeddings=4 * NUM_TOKENS))
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    options = ("--redis-port", str(port), "--model", model, "--lease-seconds", "2", *ONE_THREAD)
    command = start("serve", *options, stderr=subprocess.PIPE)
    assert command.process.stdout is not None and command.process.stderr is not None
    greeting = [command.process.stdout.readline() for _ in range(5)]
    assert url in greeting[0]

    def ask() -> object:
        with openai.OpenAI(base_url=greeting[3].split()[1], api_key="none", max_retries=0) as client:
            return client.models.list()

    assert ask()
    [gateway] = command.living_processes(gateway_process.COMMAND)
    os.kill(gateway, signal.SIGKILL)
    wait_until(lambda: gateway not in command.living_processes())
    assert ask(), "who asks while it is started again waits for it"

    wait_for_worker(url, command)
    with Client(url) as client:
        job = client.submit([5, 6, 7], max_tokens=4 * NUM_TOKENS - 3, temperature=0, ignore_eos=True)
        chunks = job.stream(timeout=START_SECONDS)
        next(chunks)
        [first] = client.workers()
        os.kill(first.pid, signal.SIGKILL)
        assert not any(chunk.reset for chunk in chunks)
        assert job.result(timeout=START_SECONDS).attempts == 2
        assert any(worker.pid != first.pid for worker in client.workers())

    with redis.Redis(port=port) as connection:
        os.kill(int(connection.info("server")["process_id"]), signal.SIGKILL)
    _, err = command.process.communicate(timeout=60)
    assert command.process.returncode == 3
    assert "the worker was killed (signal 9); it is started again" in err
    assert f"Error: redis-server on port {port} ended with code -9: " in err
    assert command.has_left_nothing()


def test_serve_on_a_given_redis_starts_none_of_its_own(start: type[Command], redis_url: str, tmp_path: Path) -> None:
    model = str(make_tiny_model("llama", tmp_path))
    command = start("serve", *ONE_THREAD, "--model", model, "--redis-url", redis_url, stderr=subprocess.DEVNULL)
    assert command.process.stdout is not None
    assert command.process.stdout.readline() == f"redis    {redis_url}\n"
    wait_for_worker(redis_url, command)
    assert command.end(signal.SIGTERM) == 0
    assert command.has_left_nothing()
    with redis.Redis.from_url(redis_url) as connection:
        assert connection.ping()


def test_the_demo_answers_every_prompt_and_leaves_nothing_behind(start: type[Command]) -> None:
    command = start("demo", *ONE_THREAD)
    out, err = command.process.communicate(timeout=START_SECONDS)
    assert command.process.returncode == 0, err
    assert "> What is the capital of France?" in out and "Paris" in out
    assert "all in" in out and "tokens/s" in out and "failed" not in out
    assert "curl" in out and '"object":"chat.completion"' in out
    assert command.has_left_nothing()


def test_the_demo_draws_panels_in_a_terminal(start: type[Command], tmp_path: Path) -> None:
    model = str(make_tiny_model("llama", tmp_path))
    terminal, end = pty.openpty()
    command = start("demo", *ONE_THREAD, "--model", model, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    with os.fdopen(terminal, "rb", buffering=0) as screen:
        while select.select([screen], [], [], START_SECONDS)[0]:
            try:
                shown += screen.read(65536)
            except OSError:  # how a pseudo-terminal says that the other side is closed
                break
    assert command.process.wait(30) == 0
    text = shown.decode(errors="replace")
    assert "╭─" in text and " What is the capital of France? " in text and "all in" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_the_demo_ended_early_leaves_nothing_behind(start: type[Command]) -> None:
    command = start("demo", *ONE_THREAD)
    assert command.process.stdout is not None
    assert "starting a worker" in command.process.stdout.readline()
    assert command.end(signal.SIGTERM) == 130
    assert command.has_left_nothing()


def test_a_demo_whose_model_is_missing_says_so_in_one_line(start: type[Command], tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    command = start("demo", *ONE_THREAD, "--model", str(missing))
    _, err = command.process.communicate(timeout=START_SECONDS)
    assert command.process.returncode == 3
    (line,) = [line for line in err.splitlines() if line]
    assert line.startswith("Error: ") and str(missing) in line
    assert command.has_left_nothing()
