"""What prompt lookup gains and what it costs: tokens a second with it and without, on the same prompts.

- editing: a text to be written again with one word changed, one sequence at a time;
- nothing to find: random tokens as a prompt, sampled at temperature 1, one sequence and eight at a time.

The two engines take turns within a round; one that gives other tokens than the other ends the run, unless the CPU's
arithmetic depends on the batch. Run with `python -m benchmarks.prompt_lookup`.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.report import print_and_keep
from benchmarks.workload import uniform_workload
from engine import EngineConfig, InferenceEngine, SamplingParams

_TEXT = (
    "The harbour of the old town lies where the river meets the sea. Every morning before dawn the fishermen carry "
    "their nets down to the boats, and the women of the market hang lamps along the quay so that nobody slips on the "
    "wet stones. When the tide turns, the bell of the customs house rings three times, and the first boats leave. "
    "By noon the fish is sold, the boats are washed, and the square in front of the church is full of people who "
    "talk about the weather, the price of salt and the new road that will one day lead to the capital."
)
_WORDS = [("river", "canal"), ("bell", "clock"), ("church", "theatre"), ("salt", "bread"), ("lamps", "flags")]


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    prompts: list[list[int]]
    num_at_once: int
    temperature: float
    target: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=150)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        engines = {
            switch: stack.enter_context(
                InferenceEngine(config=EngineConfig(model_path=arguments.model, max_num_seqs=8, prompt_lookup=switch))
            )
            for switch in ("off", "on")
        }
        rows = [measure_task(engines, task, arguments.rounds, arguments.max_tokens) for task in tasks(engines["off"])]
    print_and_keep(
        "prompt_lookup",
        ["task", "at once", "off, tok/s", "on, tok/s", "ratio", "accepted of drafted", "target"],
        rows,
        ["Medians over rounds, the engines in turns. Drafts are a share of the output's tokens per task."],
    )


def tasks(engine: InferenceEngine) -> list[Task]:
    edits = [engine.tokenizer.encode(_instruction(old, new), add_special_tokens=False) for old, new in _WORDS]
    random_prompts = uniform_workload(8, (100, 200), (1, 1), seed=5).prompts
    return [
        Task("editing", edits, 1, 0.0, "at least 1.5"),
        Task("nothing to find", random_prompts[:5], 1, 1.0, "at least 0.97"),
        Task("nothing to find", random_prompts, 8, 1.0, "at least 0.97"),
    ]


def _instruction(old: str, new: str) -> str:
    return (
        f'<|im_start|>user\nRewrite this text word for word, with "{old}" changed to "{new}":\n\n{_TEXT}<|im_end|>\n'
        f"<|im_start|>assistant\n{_TEXT[:40]}"
    )


def measure_task(engines: dict[str, InferenceEngine], task: Task, rounds: int, max_tokens: int) -> list[str]:
    rates: dict[str, list[float]] = {"off": [], "on": []}
    before = engines["on"].get_stats()
    is_exact = engines["on"].info.is_batch_invariant
    for round_ in range(rounds + 1):  # the first one warms up
        order = ("off", "on") if round_ % 2 else ("on", "off")
        outputs = {}
        for switch in order:
            rate, outputs[switch] = measure(engines[switch], task, max_tokens, seed=round_)
            if round_:
                rates[switch].append(rate)
        if is_exact and outputs["on"] != outputs["off"]:
            raise SystemExit(f"{task.name}: prompt lookup changed the tokens")
    after = engines["on"].get_stats()
    accepted, drafted = (after[name] - before[name] for name in ("num_accepted_draft_tokens", "num_draft_tokens"))
    off, on = statistics.median(rates["off"]), statistics.median(rates["on"])
    share = f"{accepted} of {drafted}"
    return [task.name, str(task.num_at_once), f"{off:.0f}", f"{on:.0f}", f"{on / off:.2f}", share, task.target]


def measure(engine: InferenceEngine, task: Task, max_tokens: int, *, seed: int) -> tuple[float, list[list[int]]]:
    """Output tokens a second, and the outputs."""
    tokens: list[list[int]] = []
    start = time.perf_counter()
    for first in range(0, len(task.prompts), task.num_at_once):
        prompts = task.prompts[first : first + task.num_at_once]
        params = SamplingParams(max_tokens=max_tokens, temperature=task.temperature, seed=seed, ignore_eos=True)
        tokens += [output.token_ids for output in engine.generate_batch(prompts, params)]
    return sum(map(len, tokens)) / (time.perf_counter() - start), tokens


if __name__ == "__main__":
    main()
