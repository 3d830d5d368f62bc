"""What the demo shows, without a Redis: answers as a client would have filled them."""

import io
import threading
from typing import Any, cast

import pytest
from rich.console import Console

from producer import demo_view
from producer.contract import Choice, Chunk, ErrorCode, ErrorInfo, Result, Timings, Usage
from producer.demo_view import Answer
from producer.errors import JobFailedError
from producer.job import Job


class FakeJob:
    """Streams `texts`, one token each, then gives its result or raises."""

    def __init__(self, *texts: str, error: str | None = None) -> None:
        self.texts = texts
        self.error = error

    def stream(self) -> Any:
        for offset, text in enumerate(self.texts):
            yield Chunk(job_id="j", token_offset=offset, token_ids=[offset], text=text)
        if self.error is not None:
            raise JobFailedError("j", ErrorInfo(code=ErrorCode.ENGINE_ERROR, message=self.error))

    def result(self, timeout: float | None = None) -> Result:
        choice = Choice(index=0, text="".join(self.texts), token_ids=[0] * len(self.texts), finish_reason="stop")
        usage = Usage(completion_tokens=len(self.texts))
        timings = Timings(queued=0.1, first_token=0.5, total=2.0)
        return Result(job_id="j", status="finished", choices=[choice], usage=usage, timings=timings)


class FakeClient:
    def __init__(self, jobs: list[FakeJob]) -> None:
        self.jobs = jobs

    def submit_many(self, requests: list[dict[str, Any]]) -> list[FakeJob]:
        assert len(requests) == len(self.jobs)
        return self.jobs


def answer(job: FakeJob, prompt: str = "Why?") -> Answer:
    followed = Answer(prompt, cast(Job, job))
    followed.follow()
    return followed


def console(*, width: int = 100, height: int = 30, is_terminal: bool = False) -> Console:
    return Console(record=True, width=width, height=height, force_terminal=is_terminal, file=io.StringIO())


def test_an_answer_grows_with_its_stream_and_ends_with_its_result() -> None:
    followed = answer(FakeJob("Be", "cause", "."))
    assert (followed.text, followed.num_tokens, followed.error) == ("Because.", 3, None)
    assert followed.ended.is_set() and followed.result is not None


def test_a_reset_voids_what_was_shown() -> None:
    class Restarted(FakeJob):
        def stream(self) -> Any:
            yield from super().stream()
            yield Chunk(job_id="j", reset=True)
            yield from super().stream()

    assert answer(Restarted("a", "b")).text == "ab"


def test_a_failed_job_shows_its_reason() -> None:
    followed = answer(FakeJob("Be", error="the device was lost"))
    assert followed.error == "the device was lost" and followed.ended.is_set()


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize(("error", "code"), [(None, 0), ("the device was lost", 1)])
def test_every_answer_and_the_table_are_shown(is_terminal: bool, error: str | None, code: int) -> None:
    jobs = [FakeJob(f"answer {number}") for number in range(len(demo_view.PROMPTS) - 1)]
    screen = console(is_terminal=is_terminal)
    assert demo_view._show(cast(Any, FakeClient([*jobs, FakeJob("x", error=error)])), screen) == code
    shown = screen.export_text()
    for number in range(len(jobs)):
        assert f"answer {number}" in shown
    assert "tokens/s" in shown and "all in" in shown and "0.50 s" in shown
    assert (error in shown and "failed" in shown) if error else "failed" not in shown


@pytest.mark.parametrize(("width", "height"), [(20, 5), (80, 24), (120, 40), (300, 100)])
def test_the_grid_fits_the_terminal(width: int, height: int) -> None:
    screen = console(width=width, height=height)
    answers = [answer(FakeJob("word " * 200), prompt) for prompt in demo_view.PROMPTS]
    lines = screen.render_lines(demo_view._grid(answers, screen))
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
    if height >= 24 and width >= 80:
        assert len(lines) <= height - 2


def test_a_growing_answer_is_drawn_while_it_streams() -> None:
    screen, go_on = console(is_terminal=True), threading.Event()

    class Slow(FakeJob):
        def stream(self) -> Any:
            yield from super().stream()
            assert go_on.wait(60)

    waiting = Answer("Why?", cast(Job, Slow("Because", " so")))
    thread = threading.Thread(target=waiting.follow)
    thread.start()
    while waiting.num_tokens < 2:
        thread.join(0.001)
    screen.print(demo_view._grid([waiting], screen))
    go_on.set()
    thread.join()
    assert "Because so" in (shown := screen.export_text()) and "2 tokens" in shown
