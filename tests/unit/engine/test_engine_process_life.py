"""The engine's child at both ends of its life: starts that fail or hang, and stops whatever it does."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import EngineDiedError, InferenceEngine, ModelLoadError, SamplingParams
from engine.process import ChildProcess, _LastWords
from tests.fakes.echo_engines import (
    ENDLESS,
    POISON,
    SOUND,
    child_pid,
    process_engine,
    wait_for_restarts,
)
from tests.fakes.fake_core import CORE_PATH, write_fake_model
from tests.fakes.output_recorder import OutputRecorder
from tests.fakes.processes import is_alive, wait_until_gone
from tests.fakes.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.mark.parametrize("has_stderr", [True, False])
def test_a_child_that_dies_while_loading_is_reported_with_its_last_words(
    tmp_path: Path, has_stderr: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_stderr:
        monkeypatch.setattr(sys, "stderr", None)  # as in a process that was started with it closed
    with pytest.raises(ModelLoadError, match=r"exit code 3; its last words:\ncannot open the device"):
        process_engine(tmp_path, crashed_start=1).start()


def test_what_a_child_writes_is_logged_with_no_character_cut_in_two(caplog: pytest.LogCaptureFixture) -> None:
    end, start = os.pipe()
    words = _LastWords(os.fdopen(end, "rb"))
    with os.fdopen(start, "w", encoding="utf-8") as stream:
        stream.write("x" + 5000 * "é" + "\nlast\n")
    assert words.close().endswith("é\nlast")
    assert "".join(record.getMessage() for record in caplog.records) == "x" + 5000 * "é" + "last"


def test_a_child_is_read_on_whatever_a_log_handler_of_the_application_raises() -> None:
    """Else it would wait for ever for room in the pipe."""

    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise RuntimeError(record.getMessage())

    end, start = os.pipe()
    log, handler = logging.getLogger("engine.process"), Broken()
    log.addHandler(handler)
    try:
        words = _LastWords(os.fdopen(end, "rb"))
        with os.fdopen(start, "w") as stream:
            stream.write("first\nsecond\n")
        assert words.close() == "first\nsecond"
    finally:
        log.removeHandler(handler)


def test_a_core_that_cannot_be_imported_is_reported(tmp_path: Path) -> None:
    engine = InferenceEngine(
        write_fake_model(tmp_path), _start_child=partial(ChildProcess, core_path="tests.fakes.no_core:Core")
    )
    with pytest.raises(ModelLoadError, match="ModuleNotFoundError"):
        engine.start()


def test_a_process_that_cannot_be_started_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(ModelLoadError, match="its process cannot be started"):
        process_engine(tmp_path).start()


def test_an_engine_whose_process_cannot_be_started_again_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = OutputRecorder()
    with process_engine(tmp_path, step_seconds=0.001) as engine:
        engine.submit("job-1", [SOUND], ENDLESS, on_output=recorder)
        recorder.wait_for_tokens(1)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
        os.kill(child_pid(engine), signal.SIGKILL)
        assert "its process cannot be started" in str(recorder.wait_for_end().error)


def test_a_start_that_hangs_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"start_timeout_seconds \(1 s\)"):
        process_engine(tmp_path, {"start_timeout_seconds": 1.0}, hung_start=1).start()


def test_a_device_that_is_short_of_memory_at_a_restart_is_tried_again(tmp_path: Path) -> None:
    recorder = OutputRecorder()
    with process_engine(tmp_path, step_seconds=0.001, short_start=2) as engine:
        engine.submit("job-1", [SOUND], ENDLESS, on_output=recorder)
        recorder.wait_for_tokens(1)
        os.kill(child_pid(engine), signal.SIGKILL)
        wait_for_restarts(engine, 2)
        recorder.wait_for_tokens(len(recorder.token_ids) + 1)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ({"refused_start": 2}, "holds no weights: fetch the model again"),
        ({"crashed_start": 2}, "cannot open the device"),
        ({"fingerprint_by_start": True}, "came back as fake 2, it was fake 1"),
    ],
)
def test_an_engine_that_cannot_start_again_fails_its_requests_with_the_reason(
    tmp_path: Path, script: dict[str, Any], reason: str
) -> None:
    recorder = OutputRecorder()
    with process_engine(tmp_path, step_seconds=0.001, **script) as engine:
        engine.submit("job-1", [SOUND], ENDLESS, on_output=recorder)
        recorder.wait_for_tokens(1)
        os.kill(child_pid(engine), signal.SIGKILL)
        last = recorder.wait_for_end()
        assert (last.finish_reason, last.error_kind) == ("error", "died")
        assert last.error is not None
        assert reason in last.error
        assert not engine.is_healthy
        with pytest.raises(EngineDiedError, match=reason):
            engine.generate([SOUND])
        engine.abort("job-1")
        assert engine.get_stats()["num_requests"] == 0
        if "fingerprint_by_start" in script:  # nothing is left that another arithmetic would be mixed into
            engine.start()
            assert engine.is_healthy and engine.generate([SOUND], SamplingParams(max_tokens=1))
        else:
            with pytest.raises(ModelLoadError, match=reason):
                engine.start()


def test_stop_ends_a_child_whatever_it_does(tmp_path: Path) -> None:
    engine = process_engine(tmp_path, hung_by=POISON)
    recorder = OutputRecorder()
    with engine:
        pid = child_pid(engine)
        engine.submit("job-1", [POISON], ENDLESS, on_output=recorder)
        os.kill(pid, signal.SIGSTOP)
    assert recorder.wait_for_end().error_kind == "stopped"
    wait_until_gone(pid)


def test_stop_ends_a_child_that_has_stopped_in_the_middle_of_a_message(tmp_path: Path) -> None:
    recorder = OutputRecorder()
    with process_engine(tmp_path, stopped_by=POISON, killed_at=5) as engine:
        pid = child_pid(engine)
        engine.submit("job-1", [POISON], ENDLESS, on_output=recorder)
        recorder.wait_for_tokens(5)
        begun = time.monotonic()
    assert recorder.wait_for_end().error_kind == "stopped" and time.monotonic() - begun < 30  # 120 for the message
    wait_until_gone(pid)


def test_stop_while_the_model_is_loading_ends_the_start(tmp_path: Path) -> None:
    engine = process_engine(tmp_path, hung_start=1)
    errors: list[Exception] = []

    def start() -> None:
        try:
            engine.start()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    wait_until(lambda: engine._supervisor is not None and engine._supervisor._child.running is not None)
    engine.stop()
    thread.join(60)
    assert [str(error) for error in errors] == ["the engine was stopped"]


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[InferenceEngine]:
    with process_engine(tmp_path, step_seconds=0.001) as engine:
        yield engine


def test_the_child_leaves_interrupts_to_its_parent(engine: InferenceEngine) -> None:
    recorder = OutputRecorder()
    engine.submit("job-1", [SOUND], SamplingParams(max_tokens=300), on_output=recorder)
    recorder.wait_for_tokens(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child_pid(engine), number)
    assert recorder.wait_for_end().finish_reason == "length"
    assert engine.get_stats()["num_restarts"] == 0


def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    model = write_fake_model(tmp_path)
    code = (
        "import sys, signal\n"
        "from functools import partial\n"
        "from engine import InferenceEngine\n"
        "from engine.process import ChildProcess\n"
        f"engine = InferenceEngine({model!r}, _start_child=partial(ChildProcess, core_path={CORE_PATH!r}))\n"
        "engine.start()\n"
        "print(engine._supervisor._child.running.pid, flush=True)\n"
        "signal.pause()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    wait_until_gone(pid)
