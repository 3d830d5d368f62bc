"""One line an event, as text or JSON."""

import json
import logging
from collections.abc import Iterator

import pytest

from producer.logs import configure_logging


@pytest.fixture(autouse=True)
def _root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_is_one_line_an_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    logging.getLogger("worker.service").info("action=job_failed job_id=%s error=%s", "j", "two\nlines")
    logging.getLogger("worker.service").debug("action=hidden")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("info worker.service action=job_failed job_id=j error=two\\nlines")


def test_json_has_the_action_as_a_member(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    logging.getLogger("worker.service").warning("action=job_failed job_id=%s", "größe")
    event = json.loads(capsys.readouterr().err)
    assert (event["action"], event["message"], event["level"]) == ("job_failed", "job_id=größe", "warning")
    assert event["logger"] == "worker.service" and event["time"].endswith("Z")


def test_a_traceback_stays_on_the_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("x").exception("action=crash")
    (line,) = capsys.readouterr().err.splitlines()
    assert "ValueError: why" in json.loads(line)["exception"]


def test_libraries_that_log_every_step_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    logging.getLogger("botocore.hooks").info("chatter")
    logging.getLogger("rq.worker").warning("worth knowing")
    assert capsys.readouterr().err.count("\n") == 1
