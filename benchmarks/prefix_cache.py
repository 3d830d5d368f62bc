"""What the prefix cache gains where prompts share a prefix, and what it costs where nothing repeats.

- a shared prefix: 64 prompts with one prefix of 512 tokens and tails of their own, all at once: time to finish;
- nothing repeats: a prompt of the same length at a time, none of which shares anything: the cost of hashing, of looking
  up, and of blocks that are kept for nobody.

With the cache and without take turns, and every prompt is new. Run with `python -m benchmarks.prefix_cache`.
"""

import argparse
import random

from benchmarks.paired_engines import COLUMNS, PAIRED_NOTE, Work, paired_engines
from benchmarks.report import print_and_keep
from engine import SamplingParams

NUM_PROMPTS = 64
PREFIX_TOKENS = 512
TARGET_SPEEDUP = 3.0
MAX_COST = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--prefix-tokens", type=int, default=PREFIX_TOKENS)
    parser.add_argument("--tail-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="of all the prompts that share a prefix")
    parser.add_argument("--pairs", type=int, default=40, help="of prompts that share nothing")
    arguments = parser.parse_args()
    target_cost = f"at least {1 - MAX_COST:.2f}"
    plans = [
        ("nothing repeats", 1, arguments.pairs, target_cost),
        ("a shared prefix", arguments.num_prompts, arguments.rounds, f"at least {TARGET_SPEEDUP:.0f}"),
    ]
    rows: list[list[str]] = []
    with paired_engines(arguments.model, "prefix_caching", off=False, on=True, quantize=arguments.quantize) as engines:
        engines.race([make_work(arguments, f"warm-up {number}", 1) for number in range(2)], name="warm-up")
        for name, num_prompts, num_pairs, target in plans:
            works = [make_work(arguments, f"{name} {number}", num_prompts) for number in range(num_pairs)]
            rows.append([name, str(num_prompts), str(num_pairs), *engines.race(works, name=name), target])
            print(" | ".join(rows[-1]), flush=True)
    print_and_keep(
        "prefix_cache",
        ["prompts", "at once", "pairs", *COLUMNS, "target"],
        rows,
        [
            f"{PAIRED_NOTE} Tokens are those of prompts and outputs.",
            f"Prompts of {arguments.prefix_tokens} + {arguments.tail_tokens} tokens, {arguments.max_tokens} output "
            f"tokens each, {arguments.model}, quantize {arguments.quantize}. Both engines gave the same tokens.",
        ],
    )


def make_work(arguments: argparse.Namespace, name: str, num_prompts: int) -> Work:
    """Prompts that begin alike, and like no others."""
    rng = random.Random(name)

    def draw(count: int) -> list[int]:
        return [rng.randrange(1000, 40_000) for _ in range(count)]

    prefix = draw(arguments.prefix_tokens)
    prompts = [prefix + draw(arguments.tail_tokens) for _ in range(num_prompts)]
    params = SamplingParams(max_tokens=arguments.max_tokens, temperature=0.0, ignore_eos=True)
    return Work(prompts, params, num_counted=num_prompts * (len(prompts[0]) + arguments.max_tokens))


if __name__ == "__main__":
    main()
