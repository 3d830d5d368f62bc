"""Our engine beside the engines one would take instead on a CPU: the same prompts, in turn, in one run.

Every peer gets a virtual environment of its own, made on first use. One that cannot be installed or run here, or takes
longer than it is given, is named with the reason. A run that gave another number of tokens than asked for ends the
contender. Speeds are those of whole runs; the median of several rounds, and of each round's ratio to ours.

Measurements are kept in a journal as they come, and the table is made of all of them; so a long race can be run in
several calls, of some minutes each.

A peer's name may be followed by the dtype that it is to compute in.

    python -m benchmarks.cpu_peers [--rounds 3] [--peers openvino,vllm:bfloat16] [--minutes 8] [--fresh]
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Protocol, Self

import click
import torch

from benchmarks.cpu_bound import Bound, measure_bound
from benchmarks.peer_environment import ENVIRONMENTS, PEERS, PeerError, start
from benchmarks.peer_process import Measurement, Stopwatch
from benchmarks.race_journal import RaceJournal
from benchmarks.report import print_and_keep
from benchmarks.workload import Workload, uniform_workload
from engine import InferenceEngine, RequestOutput, SamplingParams
from engine.model.devices import resolve_dtype
from engine.model.locate import default_cache_dir, prepare_model_dir

MODEL = "smollm2-135m"
JOURNAL = ENVIRONMENTS / "cpu_peers.jsonl"
OURS = {
    "promptmill float32": {"dtype": "float32"},
    "promptmill bfloat16": {"dtype": "bfloat16"},
    "promptmill int8": {"quantize": "int8", "kv_cache_dtype": "int8"},
}
THEIRS = "openvino,vllm:float32,vllm:bfloat16,llama.cpp,transformers"


class Contender(Protocol):
    def run(self, workload: Workload) -> Measurement: ...


# A name of the load; its number of prompts, their lengths and those of the outputs.
LOADS = {
    "8 prompts U(32,256) → U(32,128)": (8, (32, 256), (32, 128)),
    "64 prompts U(32,256) → U(32,128)": (64, (32, 256), (32, 128)),
    "32 prompts U(256,1024) → U(128,256)": (32, (256, 1024), (128, 256)),
}


class Ours:
    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._num_runs = 0

    def run(self, workload: Workload) -> Measurement:
        self._num_runs += 1
        watch = Stopwatch(len(workload.prompts), time.perf_counter)
        errors: list[str] = []
        for i, (prompt, limit) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
            params = SamplingParams(max_tokens=limit, temperature=0.0, ignore_eos=True)
            self._engine.submit(f"{self._num_runs}-{i}", prompt, params, on_output=_take(watch, i, errors))
        while sum(watch.counts) < workload.num_output_tokens:
            if errors:
                raise PeerError(errors[0])
            time.sleep(0.002)
        return watch.measurement()


def _take(watch: Stopwatch, i: int, errors: list[str]) -> Callable[[RequestOutput], None]:
    def take(output: RequestOutput) -> None:
        watch.took(i, len(output.token_ids))
        if output.error is not None:
            errors.append(output.error)

    return take


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--peers", default=THEIRS, show_default=True, help="Which peers, by comma.")
@click.option("--loads", default=None, help="Which loads, by their place from 0 on, by comma; default: all.")
@click.option("--minutes", type=float, help="Begin no run after so many; call again to go on.")
@click.option("--fresh", is_flag=True, help="Forget what earlier calls measured.")
def main(rounds: int, peers: str, loads: str | None, minutes: float | None, fresh: bool) -> None:
    if fresh:
        JOURNAL.unlink(missing_ok=True)
    journal = RaceJournal(JOURNAL)
    titles = list(LOADS) if loads is None else [list(LOADS)[int(place)] for place in loads.split(",")]
    names = [*OURS, *(name for name in peers.split(",") if name and name not in journal.reasons)]
    until = float("inf") if minutes is None else time.monotonic() + minutes * 60
    with Paddock() as paddock:
        for number in range(rounds):
            for title in titles:
                missing = [name for name in names if (title, number, name) not in journal.runs]
                race(paddock.lead_out, missing, title, number, journal, until)
    report(journal, rounds)


class Paddock:
    """Contenders, each started when it is first asked for, and ended together."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._contenders: dict[str, Contender] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def lead_out(self, name: str) -> Contender:
        """Start it and let it run once to get warm. Raises `PeerError`."""
        if name not in self._contenders:
            self._contenders[name] = contender = self._ours(name) if name in OURS else self._peer(name)
            contender.run(uniform_workload(2, (32, 64), (8, 16), seed=1000))
        return self._contenders[name]

    def _ours(self, name: str) -> Contender:
        engine = InferenceEngine(MODEL, prefix_caching=False, **OURS[name])  # type: ignore[arg-type]
        return Ours(self._stack.enter_context(engine))

    def _peer(self, name: str) -> Contender:
        model_dir = str(prepare_model_dir(MODEL, default_cache_dir()))
        engine, _, dtype = name.partition(":")
        process = start(PEERS[engine], model_dir, dtype or str(our_dtype()).removeprefix("torch."))
        self._stack.callback(process.close)
        return process


def our_dtype() -> torch.dtype:
    return resolve_dtype("auto", torch.device("cpu"), None)


def workload_of(title: str, number: int) -> Workload:
    count, prompt_range, output_range = LOADS[title]
    return uniform_workload(count, prompt_range, output_range, seed=number)


def report(journal: RaceJournal, rounds: int) -> None:
    bound = measure_bound(our_dtype())
    rows = []
    for title in LOADS:
        if OURS.keys() & (runs := journal.of_load(title, rounds)).keys():
            rows += table(title, runs, [workload_of(title, number) for number in range(rounds)], bound)
    notes = [
        f"SmolLM2-135M-Instruct; int8 and peers without another dtype in {our_dtype()}; int8: linear layers, keys and "
        f"values; greedy; {rounds} rounds.",
        f"Bound: {bound}, a large matrix product in {our_dtype()} and reading memory, both measured; for each load "
        "the longer of what its matrix products and its weights take. What is kept or computed in less may pass it.",
    ]
    notes += [f"{name} has no figures: {reason}" for name, reason in journal.reasons.items()]
    ratios = [f"{name.removeprefix('promptmill ')} / its" for name in OURS]
    columns = ["load", "contender", "output tokens/s", *ratios, "share of bound", "TTFT s", "ITL ms"]
    print_and_keep("cpu_peers", columns, rows, notes)


def race(
    lead_out: Callable[[str], Contender],
    names: list[str],
    title: str,
    number: int,
    journal: RaceJournal,
    until: float = float("inf"),
) -> None:
    """One round of one load, the contenders in turn; one that fails is out, with its reason. until: monotonic time."""
    workload = workload_of(title, number)
    for name in names:
        if name in journal.reasons or time.monotonic() >= until:
            continue
        try:
            measurement = lead_out(name).run(workload)
            check(measurement, workload)
        except (PeerError, BrokenPipeError) as error:
            journal.add_reason(name, str(error))
            continue
        print(f"{name}: {sum(measurement['counts'])} tokens in {measurement['seconds']:.1f} s", file=sys.stderr)
        journal.add_run(title, number, name, measurement)


def check(measurement: Measurement, workload: Workload) -> None:
    counts = measurement["counts"]
    if counts != workload.max_tokens and counts != [workload.num_output_tokens]:
        raise PeerError(f"produced {sum(counts)} tokens instead of {workload.num_output_tokens}, or other ones")


def table(title: str, runs: dict[str, list[Measurement]], workloads: list[Workload], bound: Bound) -> list[list[str]]:
    seconds = {name: [run["seconds"] for run in measurements] for name, measurements in runs.items()}
    rows = []
    for name, measurements in runs.items():
        speed = statistics.median(w.num_output_tokens / s for w, s in zip(workloads, seconds[name], strict=True))
        ratios = [ratio(seconds[name], seconds.get(ours)) for ours in OURS]
        share = statistics.median(bound.seconds(w) / s for w, s in zip(workloads, seconds[name], strict=True))
        rows.append([title, name, f"{speed:.0f}", *ratios, f"{share:.0%}", *latencies(measurements)])
    return rows


def ratio(its: list[float], ours: list[float] | None) -> str:
    return "-" if ours is None else f"{statistics.median(a / b for a, b in zip(its, ours, strict=True)):.2f}"


def latencies(measurements: list[Measurement]) -> tuple[str, str]:
    """Medians over prompts and rounds of the time to the first token, and of the mean gap between a prompt's tokens."""
    if "firsts" not in measurements[0]:
        return "-", "-"
    firsts = [first for run in measurements for first in run["firsts"]]
    gaps = [
        (last - first) / (count - 1)
        for run in measurements
        for first, last, count in zip(run["firsts"], run["lasts"], run["counts"], strict=True)
        if count > 1
    ]
    return f"{statistics.median(firsts):.2f}", f"{statistics.median(gaps) * 1000:.1f}"


if __name__ == "__main__":
    main()
