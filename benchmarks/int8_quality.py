"""What do 8 bits cost in quality, and bfloat16? Perplexity, and how often the likeliest next token is the same.

Real text that every Python brings along: the language reference (`pydoc_data.topics`) and the standard library's own
source. Windows of it are scored by the engine in float32, in bfloat16, and with linear layers, with keys and values, or
with both in 8 bits.

    python -m benchmarks.int8_quality [--num-windows 24] [--window 512]
"""

import argparse
import inspect
import math
import pydoc
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data import topics
from typing import Any

from benchmarks.report import print_and_keep
from engine import InferenceEngine, SamplingParams
from engine.tokenizer import Tokenizer

MODEL = "smollm2-135m"
ENGINES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8 layers": {"quantize": "int8"},
    "int8 keys and values": {"kv_cache_dtype": "int8"},
    "int8 both": {"quantize": "int8", "kv_cache_dtype": "int8"},
}
MODULES = (argparse, inspect, pydoc, statistics, textwrap)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of every token but each window's first."""

    logprobs: list[float]  # the model's own, of the text's tokens
    likeliest: list[int]  # token ids

    @property
    def perplexity(self) -> float:
        return math.exp(-statistics.fmean(self.logprobs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-windows", type=int, default=24, help="Of each text.")
    parser.add_argument("--window", type=int, default=512, help="Tokens.")
    arguments = parser.parse_args()
    scores: dict[str, dict[str, Scores]] = {}
    for numbers, fields in ENGINES.items():
        with InferenceEngine(MODEL, **fields) as engine:
            prompts = {
                name: windows(engine.info.model_dir, text, arguments.num_windows, arguments.window)
                for name, text in texts().items()
            }
            scores[numbers] = {name: score(engine, some) for name, some in prompts.items()}
            dtype = engine.info.dtype
    rows = [
        row(name, numbers, scores[numbers][name], {other: scores[other][name] for other in ("float32", "bfloat16")})
        for name in texts()
        for numbers in ENGINES
    ]
    columns = ["text", "computed in", "perplexity"]
    columns += [f"{what} {other}" for other in ("float32", "bfloat16") for what in ("ratio to", "same token as")]
    notes = [
        f"SmolLM2-135M-Instruct, {arguments.num_windows} windows of {arguments.window} tokens of each text, scored as "
        f"prompts. int8 layers: all linear ones, the output layer included. What is not in 8 bits is in {dtype} there.",
        "Same token: how often the likeliest next token is that of the other.",
    ]
    print_and_keep("int8_quality", columns, rows, notes)


def texts() -> dict[str, str]:
    return {
        "Python's language reference": "\n".join(topics.topics[name] for name in sorted(topics.topics)),
        "the standard library's source": "\n".join(inspect.getsource(module) for module in MODULES),
    }


def windows(model_dir: str, text: str, num_windows: int, window: int) -> list[list[int]]:
    """Spread evenly over the text."""
    ids = Tokenizer.from_folder(model_dir).encode(text)
    if len(ids) < num_windows * window:
        raise SystemExit(f"a text has {len(ids)} tokens, too few for {num_windows} windows of {window}")
    step = len(ids) // num_windows
    return [ids[start : start + window] for start in range(0, num_windows * step, step)]


def score(engine: InferenceEngine, prompts: Sequence[list[int]]) -> Scores:
    params = SamplingParams(max_tokens=0, prompt_logprobs=1, temperature=0.0)
    entries = [
        entry
        for output in engine.generate_batch(list(prompts), params)
        for entry in output.prompt_logprobs or []
        if entry is not None
    ]
    if len(entries) != sum(len(prompt) - 1 for prompt in prompts):
        raise SystemExit(f"{len(entries)} tokens were scored, not all")
    return Scores([entry.logprob for entry in entries], [entry.top[0][0] for entry in entries])


def row(name: str, numbers: str, scores: Scores, others: dict[str, Scores]) -> list[str]:
    cells = [name, numbers, f"{scores.perplexity:.2f}"]
    for other in others.values():
        same = statistics.fmean(a == b for a, b in zip(scores.likeliest, other.likeliest, strict=True))
        cells += [f"{scores.perplexity / other.perplexity:.3f}", f"{same:.1%}"]
    return cells


if __name__ == "__main__":
    main()
