"""What a grammar costs: the same prompts with one and without, 32 sequences at a time, in turns.

Two grammars: `records`, an array of objects as an extraction would ask for, whose keys are forced; and `free string`,
one JSON string without an end, in which nothing is forced. Neither ends before `--max-tokens`, so free text gives as
many tokens.

    python -m benchmarks.structured_output
"""

import argparse
import json
import statistics
from dataclasses import replace

from benchmarks.paired_engines import PAIRED_NOTE, TimedEngine, Work, describe, timed_engine
from benchmarks.report import print_and_keep
from benchmarks.workload import uniform_workload
from engine import GrammarSpec, SamplingParams

CONCURRENT = 32
TARGET_PERCENT = 5.0

_RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["person", "place", "event"]},
        "year": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "is_certain": {"type": "boolean"},
    },
    "required": ["name", "kind", "year", "is_certain"],
    "additionalProperties": False,
}
GRAMMARS = {
    "records": GrammarSpec("json_schema", json.dumps({"type": "array", "items": _RECORD, "minItems": 50})),
    "free string": GrammarSpec("json_schema", json.dumps({"type": "string", "minLength": 4000})),
}
FILTERS = {"none": 1.0, "top_p 0.9": 0.9}
COLUMNS = ["grammar", "filter", "pairs", "free text, tok/s", "with it, tok/s"]
COLUMNS += ["with / without, seconds", "with / without, CPU seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=32, help="of a sequence in a slice")
    arguments = parser.parse_args()
    fields = {"max_num_seqs": CONCURRENT, "prompt_lookup": "off", "quantize": arguments.quantize}
    rows = []
    with timed_engine(arguments.model, **fields) as engine:
        for name, spec in GRAMMARS.items():
            for filter_, top_p in FILTERS.items():
                works = [slices(arguments.max_tokens, seed, spec, top_p) for seed in range(arguments.pairs)]
                rows.append([name, filter_, str(len(works)), *race(engine, works)])
                print(" | ".join(rows[-1]), flush=True)
    print_and_keep("structured_output", COLUMNS, rows, notes(arguments))


def slices(max_tokens: int, seed: int, spec: GrammarSpec, top_p: float) -> tuple[Work, Work]:
    """Of free text and of the grammar's."""
    prompts = uniform_workload(CONCURRENT, (32, 64), (1, 1), seed=0).prompts
    free, constrained = (
        Work(prompts, sampling(max_tokens, seed, grammar, top_p), CONCURRENT * max_tokens) for grammar in (None, spec)
    )
    return free, constrained


def race(engine: TimedEngine, works: list[tuple[Work, Work]]) -> list[str]:
    """The cells of a table's row, from `free text, tok/s` on."""
    free, constrained = works[0]
    for work in (free, constrained):  # compiles the grammar, fills the prefix cache
        engine.measure(replace(work, params=replace(work.params, max_tokens=2)))
    pairs = []
    for number, (free, constrained) in enumerate(works):
        if number % 2:
            taken = engine.measure(free), engine.measure(constrained)
        else:
            second = engine.measure(constrained)
            taken = engine.measure(free), second
        if any(sum(map(len, slice_.token_ids)) != free.num_counted for slice_ in taken):
            raise SystemExit("an output ended early")
        pairs.append(taken)
    num_tokens = free.num_counted
    speeds = [statistics.median(num_tokens / pair[side].seconds for pair in pairs) for side in (0, 1)]
    return [
        *(f"{speed:.0f}" for speed in speeds),
        describe([with_it.seconds / without.seconds for without, with_it in pairs]),
        describe([with_it.cpu_seconds / without.cpu_seconds for without, with_it in pairs]),
    ]


def sampling(max_tokens: int, seed: int, spec: GrammarSpec | None, top_p: float) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.7, top_p=top_p, seed=seed, ignore_eos=True, grammar=spec)


def notes(arguments: argparse.Namespace) -> list[str]:
    return [
        f"{PAIRED_NOTE} Prompts lie in the prefix cache, so that decodes are timed. {arguments.model}, "
        f"quantize {arguments.quantize}.",
        f"{CONCURRENT} sequences in a step, temperature 0.7. Target: at most {1 + TARGET_PERCENT / 100:.2f}.",
    ]


if __name__ == "__main__":
    main()
