"""What `promptmill run` makes of the engine's speed over 1,000 prompts; one that is killed asks nothing twice.

A table of questions is answered four times, with templates that share no KV block: by the engine alone and by the
command, undisturbed; then by the command, ended with SIGKILL and with SIGINT on its way and started anew each time, and
by the engine alone once more. On a CPU the answers must be the same to the letter. The end of every job is counted in
Redis: more ends than rows, or a row without its answer, ends the benchmark.

    python -m benchmarks.batch_run [--num-prompts 1000] [--max-tokens 12]
"""

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import redis

from benchmarks.report import print_and_keep
from benchmarks.worker_fixture import worker_process
from engine import InferenceEngine, SamplingParams
from producer.contract import keys

MODEL = "smollm2-135m"
UNDISTURBED, KILLED = "Question: {question}\nAnswer:", "Q. {question}\nA."

TOPICS = (
    *("the Danube", "photosynthesis", "a glacier", "the French Revolution", "gravity", "a violin", "the Moon"),
    *("bread", "a volcano", "democracy", "a bicycle", "the heart", "coffee", "an eclipse", "the Silk Road"),
    *("a beaver", "salt", "a lighthouse", "inflation", "the alphabet", "chess", "rain", "a bridge", "honey"),
    *("the Roman Empire", "a magnet", "sleep", "a coral reef", "paper", "the Sahara", "a telescope", "yeast"),
    *("a parliament", "silk", "an earthquake", "the Renaissance", "a windmill", "iron", "a fox", "the ozone layer"),
    *("jazz", "a glass window", "rice", "a compass", "the Alps", "steam", "a library", "the printing press"),
    *("an owl", "the number zero"),
)
QUESTIONS = (
    *("What is {}", "Why does {} matter", "Where does one find {}", "Who knows most about {}", "How old is {}"),
    *("How would a child draw {}", "What would be missing without {}", "What is often said about {}"),
    *("Which colour has {}", "What do people get wrong about {}", "How does one explain {} in a sentence"),
    *("What comes before {}", "What is the opposite of {}", "How large is {}", "What can be learnt from {}"),
    *("Which word rhymes with {}", "What does {} cost", "When does one think of {}", "How is {} measured"),
    "What is a story about {}",
)


@dataclass(frozen=True, slots=True)
class Pass:
    """One way through all prompts."""

    seconds: float
    responses: list[str]


def questions(num_prompts: int) -> list[str]:
    """Twenty about each of fifty topics, in an order that puts none of a kind together."""
    found = [f"{question.format(topic)}?" for question in QUESTIONS for topic in TOPICS]
    return found[:num_prompts]


def engine_alone(engine: InferenceEngine, template: str, asked: list[str], max_tokens: int) -> Pass:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prompts = [template.format(question=question) for question in asked]
    start = time.perf_counter()
    outputs = engine.generate_batch(prompts, params)
    seconds = time.perf_counter() - start
    if any(len(output.token_ids) != max_tokens for output in outputs):
        raise SystemExit("the engine gave another number of tokens than asked for")
    return Pass(seconds, [output.text for output in outputs])


class Command:
    """`promptmill run` on a table, as a process."""

    def __init__(self, redis_url: str, folder: Path, asked: list[str], max_tokens: int) -> None:
        self._redis_url = redis_url
        self._folder = folder
        self._max_tokens = max_tokens
        self._source = folder / "questions.csv"
        with self._source.open("w", newline="") as file:
            csv.writer(file).writerows([["question"], *([question] for question in asked)])

    def run(self, name: str, template: str, ends: dict[int, signal.Signals]) -> Pass:
        """`ends`: after so many answers the process gets that signal, and is started anew."""
        target = self._folder / f"{name}.csv"
        start = time.perf_counter()
        for num_answers, end in sorted(ends.items()):
            process = self._start(target, template)
            _wait_for_lines(target.with_name(target.name + ".journal"), num_answers, process)
            process.send_signal(end)
            process.wait()
        if self._start(target, template).wait() != 0:
            raise SystemExit("the last run did not answer every row")
        seconds = time.perf_counter() - start
        with target.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if any(row["completion_tokens"] != str(self._max_tokens) for row in rows):
            raise SystemExit("a row has another number of tokens than asked for")
        return Pass(seconds, [row["response"] for row in rows])

    def _start(self, target: Path, template: str) -> "subprocess.Popen[bytes]":
        flags = ["--raw", "--temperature", "0", "--ignore-eos", "--max-tokens", str(self._max_tokens)]
        command = [sys.executable, "-m", "producer", "run", str(self._source), str(target), "--prompt", template]
        environment = {**os.environ, "PROMPTMILL_REDIS_URL": self._redis_url}
        return subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.DEVNULL)


def _wait_for_lines(path: Path, num_lines: int, process: "subprocess.Popen[bytes]") -> None:
    while not path.exists() or path.read_bytes().count(b"\n") <= num_lines:  # the first one is no answer
        if process.poll() is not None:
            raise SystemExit("the run ended before its time")
        time.sleep(0.05)


def count_ends(redis_url: str) -> int:
    """Jobs that ended; a job that ended twice ends the benchmark."""
    with redis.Redis.from_url(redis_url) as connection:
        lines = connection.xrange(keys.results_channel(keys.DEFAULT_QUEUE))
    ids = [json.loads(fields[keys.DATA_FIELD.encode()])["job_id"] for _, fields in lines]
    if len(ids) != len(set(ids)):
        raise SystemExit("a job ended twice")
    return len(ids)


@click.command()
@click.option("--num-prompts", default=1000, show_default=True, type=click.IntRange(10, 1000))
@click.option("--max-tokens", default=12, show_default=True)
def main(num_prompts: int, max_tokens: int) -> None:
    asked = questions(num_prompts)
    ends = {num_prompts * 3 // 10: signal.SIGKILL, num_prompts * 6 // 10: signal.SIGINT}
    with (
        tempfile.TemporaryDirectory() as folder,
        InferenceEngine(MODEL) as engine,
        worker_process("--model", MODEL, "--log-level", "warning") as (redis_url, _),
    ):
        setting = f"{engine.info.dtype}, attention {engine.info.attention}"
        command = Command(redis_url, Path(folder), asked, max_tokens)
        engine_alone(engine, "{question}", asked[:8], max_tokens)
        passes = {"engine alone": engine_alone(engine, UNDISTURBED, asked, max_tokens)}
        passes["promptmill run"] = command.run("undisturbed", UNDISTURBED, {})
        num_ends = count_ends(redis_url)
        passes["promptmill run, ended twice and run again"] = command.run("killed", KILLED, ends)
        num_ends_killed = count_ends(redis_url) - num_ends
        passes["engine alone, the same prompts"] = engine_alone(engine, KILLED, asked, max_tokens)
    if num_ends != num_prompts or num_ends_killed != num_prompts:
        raise SystemExit(f"{num_prompts} rows, but {num_ends} and {num_ends_killed} jobs ended")
    report(passes, num_prompts, max_tokens, setting)


def report(passes: dict[str, Pass], num_prompts: int, max_tokens: int, setting: str) -> None:
    alone, run, killed, alone_again = passes.values()
    num_same = sum(
        a == b for a, b in zip(alone.responses + alone_again.responses, run.responses + killed.responses, strict=True)
    )
    rows = []
    for (name, one), reference in zip(passes.items(), (alone, alone, alone_again, alone_again), strict=True):
        speed, ratio = num_prompts * max_tokens / one.seconds, reference.seconds / one.seconds
        rows.append([name, f"{one.seconds:.1f}", f"{speed:.0f}", f"{num_prompts / one.seconds:.1f}", f"{ratio:.2f}"])
    notes = [
        f"SmolLM2-135M-Instruct, {setting}, {num_prompts} questions of a CSV file, {max_tokens} tokens each, greedy; "
        "from the start of the (first) process to the end of the last, imports included.",
        "The last column is the speed relative to the engine alone on the same prompts.",
        f"Ended with SIGKILL at 30% and SIGINT at 60%, and started again: {num_prompts} rows, {num_prompts} answers, "
        f"{num_prompts} jobs that ended, none twice.",
        f"Of both passes' {2 * num_prompts} answers {num_same} are the engine's own to the letter.",
    ]
    print_and_keep("batch_run", ["contender", "seconds", "output tokens/s", "prompts/s", "ratio"], rows, notes)


if __name__ == "__main__":
    main()
