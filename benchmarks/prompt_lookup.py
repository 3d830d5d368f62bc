"""What prompt lookup gains and what it costs: the same prompts with it and without, in turns.

- editing: a text to be written again with one word changed, one sequence at a time;
- nothing to find: random tokens as a prompt, sampled at temperature 1, one sequence and eight at a time;
- never right: six words thrown like dice. Any three of them stood there before, and nothing follows from that, so that
  every guess is made in vain. One sequence and eight at a time.

An engine that gives other tokens than the other ends the run, unless the CPU's arithmetic depends on the batch. Run
with `python -m benchmarks.prompt_lookup`.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.paired_engines import COLUMNS, PAIRED_NOTE, PairedEngines, Work, paired_engines
from benchmarks.report import print_and_keep
from benchmarks.workload import uniform_workload
from engine import InferenceEngine, SamplingParams

MAX_COST = 0.03
_TEXT = (
    "The harbour of the old town lies where the river meets the sea. Every morning before dawn the fishermen carry "
    "their nets down to the boats, and the women of the market hang lamps along the quay so that nobody slips on the "
    "wet stones. When the tide turns, the bell of the customs house rings three times, and the first boats leave. "
    "By noon the fish is sold, the boats are washed, and the square in front of the church is full of people who "
    "talk about the weather, the price of salt and the new road that will one day lead to the capital."
)
_WORDS = [("river", "canal"), ("bell", "clock"), ("church", "theatre"), ("salt", "bread"), ("lamps", "flags")]
_DICE = " one two three four five six"
_NUM_THROWS = 400
_EDIT_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Task:
    name: str
    num_at_once: int
    works: list[Work]
    target: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--pairs", type=int, default=40, help="of one sequence; half as many of eight")
    parser.add_argument("--max-tokens", type=int, default=16, help="of a slice, where nothing is gained")
    arguments = parser.parse_args()
    rows = []
    with paired_engines(
        arguments.model, "prompt_lookup", off="off", on="on", max_num_seqs=8, quantize=arguments.quantize
    ) as engines:
        for task in tasks(engines.engine, arguments.pairs, arguments.max_tokens):
            rows.append(measure(engines, task))
            print(" | ".join(rows[-1]), flush=True)
    print_and_keep(
        "prompt_lookup",
        ["task", "at once", "pairs", *COLUMNS, "accepted of drafted", "steps", "target"],
        rows,
        [
            f"{PAIRED_NOTE} Prompts lie in the prefix cache, so that decodes are timed. {arguments.model}, "
            f"quantize {arguments.quantize}.",
            f"Target where it does not help: to cost at most {MAX_COST:.0%}. Both engines gave the same tokens.",
        ],
    )


def measure(engines: PairedEngines, task: Task) -> list[str]:
    for prompts in {id(work.prompts): work.prompts for work in task.works}.values():  # warms up, fills the prefix cache
        for engine in (engines.off.engine, engines.on.engine):
            engine.generate_batch(prompts, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
    before = engines.engine.get_stats()
    cells = engines.race(task.works, name=task.name)
    after = engines.engine.get_stats()
    names = ("num_accepted_draft_tokens", "num_draft_tokens", "num_steps")
    accepted, drafted, steps = (after[name] - before[name] for name in names)
    share = f"{accepted} of {drafted}"
    return [task.name, str(task.num_at_once), str(len(task.works)), *cells, share, str(steps), task.target]


def tasks(engine: InferenceEngine, num_pairs: int, max_tokens: int) -> Iterator[Task]:
    edits = [[engine.tokenizer.encode(_instruction(old, new), add_special_tokens=False)] for old, new in _WORDS]
    greedy = SamplingParams(max_tokens=_EDIT_TOKENS, temperature=0.0, ignore_eos=True)
    yield Task("editing", 1, [Work(prompts, greedy, _EDIT_TOKENS) for prompts in edits], "at least 1.5")
    for num_at_once in (1, 8):
        prompts = uniform_workload(8, (100, 200), (1, 1), seed=5).prompts[:num_at_once]
        yield _sampled("nothing to find", prompts, num_pairs, max_tokens, temperature=1.0)
    for num_at_once in (1, 8):
        yield _sampled("never right", _throws(engine, num_at_once), num_pairs, max_tokens, temperature=2.0, top_k=6)


def _instruction(old: str, new: str) -> str:
    return (
        f'<|im_start|>user\nRewrite this text word for word, with "{old}" changed to "{new}":\n\n{_TEXT}<|im_end|>\n'
        f"<|im_start|>assistant\n{_TEXT[:40]}"
    )


def _throws(engine: InferenceEngine, num_prompts: int) -> list[list[int]]:
    words = engine.tokenizer.encode(_DICE, add_special_tokens=False)
    rng = random.Random(6)
    return [rng.choices(words, k=_NUM_THROWS) for _ in range(num_prompts)]


def _sampled(
    name: str,
    prompts: list[list[int]],
    num_pairs: int,
    max_tokens: int,
    *,
    temperature: float,
    top_k: int | None = None,
) -> Task:
    """The same prompts for every pair, and a seed of its own."""
    num_at_once = len(prompts)
    works = [
        Work(
            prompts,
            SamplingParams(max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed, ignore_eos=True),
            num_counted=num_at_once * max_tokens,
        )
        for seed in range(num_pairs if num_at_once == 1 else num_pairs // 2)
    ]
    return Task(name, num_at_once, works, f"at least {1 - MAX_COST:.2f}")


if __name__ == "__main__":
    main()
