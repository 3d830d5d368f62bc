"""What a grammar costs: tokens a second with one and without, 32 sequences at a time.

Two grammars: `records`, an array of objects as an extraction would ask for, whose keys are forced; and `free string`,
one JSON string without an end, in which nothing is forced and every token needs its mask. Free text asks for as many
tokens as the grammar's answers had, on the same prompts, in the same round. Prefix caching is off: whichever run comes
second would find its prompts computed.

    python -m benchmarks.structured_output
"""

import argparse
import json
import statistics
import time

from benchmarks.report import print_and_keep
from benchmarks.workload import uniform_workload
from engine import EngineConfig, GrammarSpec, InferenceEngine, SamplingParams

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    arguments = parser.parse_args()
    config = EngineConfig(
        model_path=arguments.model, max_num_seqs=CONCURRENT, prompt_lookup="off", prefix_caching=False
    )
    rates: dict[tuple[str, str], list[float]] = {}
    with InferenceEngine(config=config) as engine:
        for round_ in range(arguments.rounds + 1):  # the first one warms up
            for name, spec in GRAMMARS.items():
                prompts = uniform_workload(arguments.num_prompts, (32, 64), (1, 1), seed=round_).prompts
                constrained = [params(arguments.max_tokens, seed, spec) for seed in range(len(prompts))]
                rate, lengths = measure(engine, prompts, constrained)
                free, _ = measure(engine, prompts, [params(n, seed, None) for seed, n in enumerate(lengths)])
                if round_:
                    rates.setdefault((name, "grammar"), []).append(rate)
                    rates.setdefault((name, "free"), []).append(free)
    print_and_keep(
        "structured_output", ["grammar", "free text, tok/s", "with it, tok/s", "slower by"], rows(rates), notes()
    )


def params(max_tokens: int, seed: int, spec: GrammarSpec | None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.7, seed=seed, ignore_eos=True, grammar=spec)


def measure(engine: InferenceEngine, prompts: list[list[int]], every: list[SamplingParams]) -> tuple[float, list[int]]:
    """Output tokens a second, and the length of each output."""
    start = time.perf_counter()
    outputs = engine.generate_batch(prompts, every)
    seconds = time.perf_counter() - start
    if failed := [output.error for output in outputs if output.error]:
        raise SystemExit(f"a request failed: {failed[0]}")
    lengths = [len(output.token_ids) for output in outputs]
    return sum(lengths) / seconds, lengths


def rows(rates: dict[tuple[str, str], list[float]]) -> list[list[str]]:
    table = []
    for name in GRAMMARS:
        free, grammar = (statistics.median(rates[name, kind]) for kind in ("free", "grammar"))
        table.append([name, f"{free:.0f}", f"{grammar:.0f}", f"{100 * (free / grammar - 1):+.1f}%"])
    return table


def notes() -> list[str]:
    return [f"{CONCURRENT} sequences in a step; medians over rounds. Target: at most {TARGET_PERCENT:.0f}% slower."]


if __name__ == "__main__":
    main()
