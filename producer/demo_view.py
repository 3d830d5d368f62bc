"""The demo's viewer: a handful of prompts streamed side by side, then a table of what they took.

A plain client of the queues, run by `promptmill demo` as a process of its own; what it does, any service can do.
"""

import signal
import sys
import threading
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from producer.client import Client
from producer.contract import Result
from producer.errors import JobFailedError, PromptmillError
from producer.job import Job

GREEDY: dict[str, float] = {"temperature": 0.0}
CREATIVE: dict[str, float] = {"temperature": 0.6, "top_p": 0.9, "seed": 7}
PROMPTS = {  # each with its own way of sampling, in one batch
    "What is the capital of France?": GREEDY,
    "Explain in two sentences why the sky is blue.": GREEDY,
    "Write a haiku about autumn rain.": CREATIVE,
    "List three uses for a brick.": GREEDY,
    "What is a black hole? Answer for a child.": GREEDY,
    "Give me a simple recipe for pancakes.": CREATIVE,
    "Why do cats purr?": CREATIVE,
    "Tell a very short story about a lighthouse keeper.": CREATIVE,
}
MAX_TOKENS = 96
MIN_COLUMN_WIDTH = 38  # characters
MIN_PANEL_HEIGHT = 4  # lines, frame included
REFRESHES_PER_SECOND = 12
POLL_SECONDS = 0.2


@dataclass
class Answer:
    """One prompt's answer as it grows: written by the thread that follows it, read by the display."""

    prompt: str
    job: Job
    text: str = ""
    num_tokens: int = 0
    result: Result | None = None
    error: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def follow(self) -> None:
        try:
            for chunk in self.job.stream():
                if chunk.reset:
                    self.text, self.num_tokens = "", 0
                self.text += chunk.text
                self.num_tokens += len(chunk.token_ids)
            self.result = self.job.result(timeout=60)
        except JobFailedError as error:
            self.error = error.error.message
        except PromptmillError as error:
            self.error = str(error)
        finally:
            self.ended.set()


def main() -> int:
    """Exit code 0 if every prompt was answered, 1 if one was not, 3 if Redis cannot be reached."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the terminal gets its cursor back
    console = Console()
    try:
        with Client() as client:
            _wait_for_worker(client, console)
            return _show(client, console)
    except PromptmillError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130


def _wait_for_worker(client: Client, console: Console) -> None:
    message = "starting a worker (the first start prepares the model, about half a minute)"
    if not console.is_terminal:
        console.print(message)
    with console.status(message):
        while not (workers := client.workers()):
            time.sleep(POLL_SECONDS)
    names = ", ".join(workers[0].models)
    console.print(f"[bold]{names}[/] on {workers[0].device}, {len(PROMPTS)} prompts at once", highlight=False)


def _show(client: Client, console: Console) -> int:
    started = time.monotonic()
    requests = [
        {"messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS, **sampling}
        for prompt, sampling in PROMPTS.items()
    ]
    jobs = client.submit_many(requests)
    answers = [Answer(prompt, job) for prompt, job in zip(PROMPTS, jobs, strict=True)]
    threads = [threading.Thread(target=answer.follow, daemon=True) for answer in answers]
    for thread in threads:
        thread.start()
    if console.is_terminal:
        _watch(answers, console)
    else:
        _print_as_they_end(answers, console)
    seconds = time.monotonic() - started
    console.print(_summary(answers, seconds, console.width))
    return 1 if any(answer.error for answer in answers) else 0


def _watch(answers: list[Answer], console: Console) -> None:
    with Live(console=console, refresh_per_second=REFRESHES_PER_SECOND, get_renderable=lambda: _grid(answers, console)):
        for answer in answers:
            while not answer.ended.wait(POLL_SECONDS):
                pass  # in short waits, so that Ctrl-C is heard


def _print_as_they_end(answers: list[Answer], console: Console) -> None:
    waiting = list(answers)
    while waiting:
        for answer in [answer for answer in waiting if answer.ended.is_set()]:
            waiting.remove(answer)
            console.print(f"> {answer.prompt}", markup=False, highlight=False)
            console.print(answer.error or answer.text.strip(), markup=False, highlight=False)
            console.print()
        time.sleep(POLL_SECONDS)


def _grid(answers: list[Answer], console: Console) -> Table:
    num_columns = max(1, min(4, console.width // MIN_COLUMN_WIDTH))
    num_rows = -(-len(answers) // num_columns)
    height = max(MIN_PANEL_HEIGHT, (console.height - 2) // num_rows)
    grid = Table.grid(expand=True)
    for _ in range(num_columns):
        grid.add_column(ratio=1)
    panels = [_panel(answer, console, console.width // num_columns, height) for answer in answers]
    for row in range(0, len(panels), num_columns):
        grid.add_row(*panels[row : row + num_columns])
    return grid


def _panel(answer: Answer, console: Console, width: int, height: int) -> Panel:
    """The answer's last lines that fit."""
    text = Text(answer.error or answer.text.strip(), style="red" if answer.error else "")
    lines = text.wrap(console, max(1, width - 4))[-(height - 2) :]
    style = "red" if answer.error else "green" if answer.ended.is_set() else "cyan"
    return Panel(
        Text("\n").join(lines),
        title=Text(answer.prompt),
        title_align="left",
        subtitle=f"{answer.num_tokens} tokens",
        subtitle_align="right",
        border_style=style,
        height=height,
    )


def _summary(answers: list[Answer], seconds: float, width: int) -> Table:
    table = Table(title="what each took")
    names = ("tokens", "first token", "tokens/s", "end")
    room = width - sum(len(name) + 3 for name in names) - 8
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, max_width=max(len("prompt"), room))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for answer in answers:
        table.add_row(*_row(answer))
    num_tokens = sum(answer.num_tokens for answer in answers)
    table.add_section()
    table.add_row(f"all in {seconds:.1f} s", str(num_tokens), "", f"{num_tokens / seconds:.1f}", "")
    return table


def _row(answer: Answer) -> tuple[str | Text, ...]:
    prompt = Text(answer.prompt)
    if answer.result is None:
        return prompt, str(answer.num_tokens), "", "", Text("failed", style="red")
    usage, timings = answer.result.usage, answer.result.timings
    first, total = timings.first_token or 0.0, timings.total or 0.0
    rate = usage.completion_tokens / total if total else 0.0
    end = answer.result.choices[0].finish_reason if answer.result.choices else answer.result.status
    return prompt, str(usage.completion_tokens), f"{first:.2f} s", f"{rate:.1f}", end


if __name__ == "__main__":
    sys.exit(main())
