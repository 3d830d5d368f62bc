"""What the prefix cache gains where prompts share a prefix, and what it costs where nothing repeats.

- shared: 64 prompts with one prefix of 512 tokens and tails of their own, caching on against off: time to finish;
- distinct: 16 prompts of the same lengths that share nothing, on against off: the cost of hashing and looking up.

On and off take turns on engines that are both warm, so that what else the machine does falls on both. Every round has
new prompts, and its own ratio. Run with `python -m benchmarks.prefix_cache`.
"""

import argparse
import random
import statistics
import time

from benchmarks.report import print_and_keep
from engine import InferenceEngine, SamplingParams

NUM_PROMPTS = 64
NUM_WARM_UP = 4
PREFIX_TOKENS = 512
TARGET_SPEEDUP = 3.0
TARGET_COST = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--num-distinct", type=int, default=16)
    parser.add_argument("--prefix-tokens", type=int, default=PREFIX_TOKENS)
    parser.add_argument("--tail-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.0, ignore_eos=True)
    rows: list[list[str]] = []
    with InferenceEngine(arguments.model) as on, InferenceEngine(arguments.model, prefix_caching=False) as off:
        for engine in (on, off):
            engine.generate_batch(make_prompts(arguments, "warm-up", NUM_WARM_UP, is_shared=False), params)
        for is_shared in (True, False):
            num_prompts = arguments.num_prompts if is_shared else arguments.num_distinct
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for round_number in range(arguments.rounds):
                prompts = make_prompts(arguments, f"round {round_number}", num_prompts, is_shared=is_shared)
                outputs = {}
                for caches in (True, False) if round_number % 2 else (False, True):
                    started = time.perf_counter()
                    outputs[caches] = (on if caches else off).generate_batch(prompts, params)
                    seconds[caches].append(time.perf_counter() - started)
                answers = [[output.token_ids for output in outputs[caches]] for caches in (True, False)]
                assert answers[0] == answers[1], "the prefix cache changed an output"
            ratios = [off_time / on_time for off_time, on_time in zip(seconds[False], seconds[True], strict=True)]
            rows.append(
                [
                    "a shared prefix" if is_shared else "nothing repeats",
                    str(num_prompts),
                    f"{statistics.median(seconds[True]):.2f}",
                    f"{statistics.median(seconds[False]):.2f}",
                    f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                ]
            )
    print_and_keep(
        "prefix_cache",
        ["prompts with", "number", "caching on, s", "caching off, s", "off / on, by round"],
        rows,
        [
            f"Prompts of {arguments.prefix_tokens} + {arguments.tail_tokens} tokens, "
            f"{arguments.max_tokens} output tokens each, {arguments.model}; medians of {arguments.rounds} rounds.",
            f"Targets: at least {TARGET_SPEEDUP:.0f} where a prefix is shared, at least {1 - TARGET_COST:.2f} where "
            "nothing repeats. Both engines gave the same tokens.",
        ],
    )


def make_prompts(arguments: argparse.Namespace, name: str, num_prompts: int, *, is_shared: bool) -> list[list[int]]:
    rng = random.Random(f"{name} {is_shared}")

    def draw(count: int) -> list[int]:
        return [rng.randrange(1000, 40_000) for _ in range(count)]

    prefix = draw(arguments.prefix_tokens)
    return [
        (prefix if is_shared else draw(arguments.prefix_tokens)) + draw(arguments.tail_tokens)
        for _ in range(num_prompts)
    ]


if __name__ == "__main__":
    main()
