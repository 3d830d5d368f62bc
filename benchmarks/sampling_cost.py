"""What does each sampling feature cost a row of a step, beside the model?

Rows of random logits of SmolLM2's vocabulary; every row asks for the feature, with a history of 512 prompt and 256
output tokens. Timed is all that a step does for it: the host's bookkeeping, the edits, the draw, the log-probabilities.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.report import print_and_keep
from engine.logit_editor import LogitEditor, undo
from engine.messages import AddSequence
from engine.model.locate import default_cache_dir
from engine.runner.slots import SequenceSlots
from engine.sampler import Sampler, SamplingBatch, create_sampler
from engine.sampling_params import SamplingParams
from engine.sequence import SequenceLimits, create_sequence

VOCAB_SIZE = 49_152
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 512, 256
MAX_LEN = 4096
LIMITS = SequenceLimits(vocab_size=VOCAB_SIZE, max_len=MAX_LEN, eos_token_ids=(2,), described="")

FEATURES = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(),
    "top-k 50, top-p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "top-p 0.95, flat (temperature 2)": SamplingParams(top_p=0.95, temperature=2.0),
    "frequency and presence penalty": SamplingParams(frequency_penalty=0.5, presence_penalty=0.5),
    "repetition penalty": SamplingParams(repetition_penalty=1.1),
    "logit_bias of 100": SamplingParams(logit_bias=tuple((token_id, 1.0) for token_id in range(0, 1000, 10))),
    "min_tokens": SamplingParams(min_tokens=1000),
    "logprobs": SamplingParams(logprobs=0),
    "top_logprobs 20": SamplingParams(logprobs=20),
    "repetition penalty, top_logprobs 5": SamplingParams(repetition_penalty=1.1, logprobs=5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    samplers = {"native": create_sampler(device, default_cache_dir())} if device.type == "cpu" else {}
    samplers["torch"] = Sampler()
    logits = torch.randn(arguments.num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).to(device) * 3
    steps = {
        (name, passes): step(params, sampler, logits)
        for name, params in FEATURES.items()
        for passes, sampler in samplers.items()
    }
    seconds = time_in_turn(steps, arguments.rounds, device)
    rows = [
        [
            name,
            *(f"{seconds[name, passes] * 1e3:.2f}" for passes in samplers),
            *(f"{extra(seconds, name, passes) / arguments.num_rows * 1e6:+.1f}" for passes in samplers),
        ]
        for name in FEATURES
    ]
    columns = ["feature", *(f"{p} ms" for p in samplers), *(f"{p} µs a row over the plain draw" for p in samplers)]
    print_and_keep(
        "sampling_cost",
        columns,
        rows,
        [
            f"medians of {arguments.rounds} rounds, the features in turn; {arguments.num_rows} rows of {VOCAB_SIZE:,} "
            f"logits, {NUM_PROMPT_TOKENS} prompt and {NUM_OUTPUT_TOKENS} output tokens each; "
            f"{torch.get_num_threads()} threads",
            "the plain draw is `sampled`; every row asks for the feature, and one that does not ask pays nothing",
        ],
    )


def extra(seconds: dict[tuple[str, str], float], name: str, passes: str) -> float:
    return seconds[name, passes] - seconds["sampled", passes]


def step(params: SamplingParams, sampler: Sampler, logits: torch.Tensor) -> Callable[[], None]:
    """What the runner does with the logits of a step in which every row has these parameters."""
    device, num_rows = logits.device, len(logits)
    slots = fill_slots(params, num_rows)
    rows = slots.rows(np.arange(num_rows))
    positions = slots.num_tokens.copy()
    batch = SamplingBatch(
        temperature=torch.from_numpy(rows.temperature),
        top_p=torch.from_numpy(rows.top_p),
        top_k=torch.from_numpy(rows.top_k),
        min_p=torch.from_numpy(rows.min_p),
        seed=torch.from_numpy(rows.seed),
        choice=torch.from_numpy(rows.choice),
        position=torch.from_numpy(positions),
        may_draw=bool((rows.temperature > 0).any()),
        may_cut=bool(((rows.temperature > 0) & ((rows.top_p < 1) | (rows.top_k > 0))).any()),
    ).to(device)
    constant = ["bias_rows", "bias_ids", "biases", "penalized_rows", "repetition", "frequency", "presence"]
    fixed = [torch.from_numpy(getattr(rows.edits, name)).to(device) for name in constant] if rows.edits else []
    wanted_rows = torch.from_numpy(rows.logprob_rows).to(device) if rows.logprob_rows is not None else None

    def run() -> None:
        saved = []
        wanted = None if wanted_rows is None else sampler.logprobs(logits, wanted_rows, rows.num_top)
        if rows.edits is not None:
            edits = slots.edits.edits(rows.edits, positions)
            arrays = (edits.owners, edits.token_ids, edits.counts, edits.end_rows, edits.end_ids)
            saved = LogitEditor(*fixed, *(torch.from_numpy(array).to(device) for array in arrays)).apply(logits)
        token_ids = sampler.sample(logits, batch)
        undo(logits, saved)
        if wanted is not None:
            wanted.of(logits, token_ids)

    return run


def fill_slots(params: SamplingParams, num_rows: int) -> SequenceSlots:
    slots = SequenceSlots(max_num_seqs=num_rows, max_len=MAX_LEN, block_size=16)
    generator = np.random.default_rng(0)
    for number in range(num_rows):
        tokens = generator.integers(0, VOCAB_SIZE, NUM_PROMPT_TOKENS + NUM_OUTPUT_TOKENS).tolist()
        message = AddSequence(
            sequence_id=number,
            prompt_token_ids=tokens[:NUM_PROMPT_TOKENS],
            output_token_ids=tokens[NUM_PROMPT_TOKENS:],
            params=params,
        )
        slots.acquire(create_sequence(message, LIMITS))
    return slots


def time_in_turn(
    steps: dict[tuple[str, str], Callable[[], None]], rounds: int, device: torch.device
) -> dict[tuple[str, str], float]:
    """Median seconds of one step."""
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for i in range(rounds + 1):
        for key, run in steps.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i:
                samples[key].append(time.perf_counter() - start)
    return {key: statistics.median(values) for key, values in samples.items()}


if __name__ == "__main__":
    main()
