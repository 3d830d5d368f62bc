"""What looking for a guess costs a step that finds none: CPU microseconds a step, prompt lookup on against off.

The model is replaced by one that answers at once with random tokens, so that nothing is found and nothing computed:
what is left is our own. The two take turns, step by step. Run with `python -m benchmarks.draft_search`.
"""

import argparse
import gc
import random
import statistics
import time

import numpy as np

from benchmarks.report import print_and_keep
from benchmarks.scheduler_overhead import BLOCK_SIZE, InstantRunner
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.prompt_lookup.drafter import Drafter
from engine.runner.batch_inputs import BatchInputs
from engine.sampling_params import SamplingParams
from engine.step_plan import SampledTokens

MAX_MODEL_LEN = 10_000
VOCAB_SIZE = 40_000


class RandomRunner(InstantRunner):
    """Answers with tokens that never were there in this order."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, max_model_len=MAX_MODEL_LEN)
        self._rng = np.random.default_rng(1)

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        num_sampled = len(super().execute(inputs).token_ids)
        return SampledTokens(self._rng.integers(100, VOCAB_SIZE, num_sampled))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, nargs="*", default=[100, 1000, 8000])
    parser.add_argument("--num-steps", type=int, default=400)
    arguments = parser.parse_args()
    rows = []
    for num_tokens in arguments.prompt_tokens:
        for num_seqs in arguments.num_seqs:
            figures = measure_steps(num_seqs, num_tokens, arguments.num_steps)
            first = measure_first(num_tokens)
            rows.append([str(num_tokens), str(num_seqs), *(f"{figure:.1f}" for figure in (*figures, first))])
    print_and_keep(
        "draft_search",
        ["prompt tokens", "sequences", "off, µs a step", "on, µs a step", "more, µs a step", "once, µs a prompt"],
        rows,
        ["Medians of CPU time of steps without a model. With more than eight sequences nothing is looked for."],
    )


def measure_steps(num_seqs: int, num_tokens: int, num_steps: int) -> tuple[float, float, float]:
    """Microseconds a step without and with, and the median difference."""
    cores = {switch: make_core(switch, num_seqs, num_tokens) for switch in ("off", "on")}
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    gc.collect()
    for number in range(num_steps):
        for switch in ("off", "on") if number % 2 else ("on", "off"):
            started = time.thread_time()
            cores[switch].step()
            seconds[switch].append(time.thread_time() - started)
    assert not cores["on"].get_stats().num_draft_tokens, "something was found"
    more = [on - off for off, on in zip(seconds["off"], seconds["on"], strict=True)]
    return (
        1e6 * statistics.median(seconds["off"]),
        1e6 * statistics.median(seconds["on"]),
        1e6 * statistics.median(more),
    )


def make_core(switch: str, num_seqs: int, num_tokens: int) -> EngineCore:
    """All of whose sequences decode."""
    config = EngineConfig(model_path="none", max_num_seqs=num_seqs, prefix_caching=False, prompt_lookup=switch)
    core = EngineCore(config, runner=RandomRunner(num_seqs * (MAX_MODEL_LEN // BLOCK_SIZE)))
    rng = random.Random(3)
    for sequence_id in range(num_seqs):
        prompt = [rng.randrange(100, VOCAB_SIZE) for _ in range(num_tokens)]
        params = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
        core.add(AddSequence(sequence_id=sequence_id, prompt_token_ids=prompt, params=params))
    for _ in range(num_seqs * num_tokens // config.step_tokens("cpu") + 3):
        core.step()
    return core


def measure_first(num_tokens: int) -> float:
    """Microseconds that a sequence's first search takes, which reads its prompt."""
    token_ids = np.random.default_rng(2).integers(100, VOCAB_SIZE, num_tokens, dtype=np.int32)
    seconds = []
    for _ in range(21):
        drafter = Drafter()
        started = time.thread_time()
        drafter.draft(token_ids, 1)
        seconds.append(time.thread_time() - started)
    return 1e6 * statistics.median(seconds)


if __name__ == "__main__":
    main()
