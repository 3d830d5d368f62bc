import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from engine.engine import InferenceEngine
from worker.embedded_redis import EmbeddedRedis
from worker.held_signals import ending_signals, held_signals
from worker.run import run_worker
from worker.settings import WorkerSettings
from worker.started_process import running

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


class Asked(Exception):
    """What the handler under a test raises."""


@pytest.fixture(autouse=True)
def raising_handler() -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise Asked

    saved = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, old in saved.items():
        signal.signal(number, old)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Every process that is started, with a signal that comes before anybody has been told of it."""
    processes: list[subprocess.Popen[bytes]] = []

    start = subprocess.Popen.__init__

    def signalled_start(process: "subprocess.Popen[bytes]", *args: Any, **options: Any) -> None:
        start(process, *args, **options)
        processes.append(process)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess.Popen, "__init__", signalled_start)
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_delivered_where_the_block_ends(number: signal.Signals) -> None:
    steps = []
    with pytest.raises(Asked), held_signals():
        signal.raise_signal(number)
        steps.append("begun")
    assert steps == ["begun"]
    with pytest.raises(Asked):
        signal.raise_signal(number)  # the handler is back


def test_a_block_that_fails_leaves_the_handlers_as_they_were() -> None:
    with pytest.raises(ValueError, match="mine"), held_signals():
        raise ValueError("mine")
    with pytest.raises(Asked):
        signal.raise_signal(signal.SIGTERM)


def test_a_hang_up_that_nohup_keeps_away_stays_away() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert ending_signals() == [signal.SIGINT, signal.SIGTERM]
    with held_signals():
        signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def start_sleeper() -> None:
    with running(SLEEPER):
        raise AssertionError("the block was entered")


def start_redis() -> None:
    with EmbeddedRedis():
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("start", [start_sleeper, start_redis])
def test_a_signal_that_comes_while_a_process_is_started_leaves_none(
    started: list["subprocess.Popen[bytes]"], start: Callable[[], None]
) -> None:
    with pytest.raises(Asked):
        start()
    assert [process.poll() is not None for process in started] == [True]


def test_a_signal_that_comes_while_the_engine_is_launched_stops_it(
    monkeypatch: pytest.MonkeyPatch, started: list["subprocess.Popen[bytes]"]
) -> None:
    launch = InferenceEngine.launch

    def signalled_launch(engine: InferenceEngine) -> None:
        launch(engine)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(InferenceEngine, "launch", signalled_launch)
    with pytest.raises(SystemExit):
        run_worker(WorkerSettings(redis_url="redis://127.0.0.1:1/0", model="no-such-model"))
    assert [process.poll() is not None for process in started] == [True]
