"""What a step costs beside the model: scheduling, batch building, transfer to torch and bookkeeping, per sequence.

The model is replaced by one that answers at once, so that all time measured is ours. Two loads:

- decode: every sequence decodes, the state that a busy engine is in most of the time;
- churn: prompts of U(32, 256) tokens that ask for U(32, 128), a new one for each that ends, so that prefill chunks,
  admissions and ends are in the figure.

Each with nothing waiting and with 100,000 sequences waiting, in several rounds one after the other, of which the median
and the range are reported. Run with `python -m benchmarks.scheduler_overhead`.
"""

import argparse
import gc
import statistics
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.report import print_and_keep
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence, EngineInfo, FinishCode
from engine.runner.batch_inputs import BatchInputs
from engine.runner.transfer import HostToDevice
from engine.sampling_params import SamplingParams
from engine.step_plan import SampledTokens

MAX_MODEL_LEN = 4096
BLOCK_SIZE = 16
TARGET_MICROSECONDS = 5.0


class InstantRunner:
    """Makes a step's tensors, as a model would need them, and answers with the same token everywhere."""

    def __init__(self, num_blocks: int, *, max_model_len: int = MAX_MODEL_LEN) -> None:
        self.info = EngineInfo(
            device="cpu",
            dtype="none",
            attention="none",
            max_model_len=max_model_len,
            vocab_size=50_000,
            eos_token_ids=(2,),
            block_size=BLOCK_SIZE,
            num_kv_blocks=num_blocks,
            fingerprint="none",
            model_dir="",
        )
        self._to_device = HostToDevice(torch.device("cpu"))

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        self._to_device.send(
            inputs.input_ids,
            inputs.position_ids,
            inputs.slot_mapping,
            inputs.query_start,
            inputs.context_lens,
            inputs.block_tables,
            inputs.logits_indices,
            inputs.sampled_positions,
        )
        return SampledTokens(np.full(len(inputs.logits_indices), 7, np.int64))


@dataclass(slots=True)
class Load:
    """A core kept at a number of running sequences."""

    core: EngineCore
    decode_only: bool
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    num_added: int = 0
    add_seconds: list[float] = field(default_factory=list)  # CPU time of taking each sequence in

    def add(self, count: int) -> None:
        for _ in range(count):
            num_prompt = 64 if self.decode_only else int(self.rng.integers(32, 257))
            num_output = None if self.decode_only else int(self.rng.integers(32, 129))
            prompt = self.rng.integers(100, 40_000, num_prompt).tolist()
            params = SamplingParams(max_tokens=num_output, temperature=0.0)
            message = AddSequence(sequence_id=self.num_added, prompt_token_ids=prompt, params=params)
            started = time.thread_time()
            self.core.add(message)
            self.add_seconds.append(time.thread_time() - started)
            self.num_added += 1

    def step(self) -> float:
        """CPU seconds of one step; each sequence that ends is replaced."""
        started = time.thread_time()
        output = self.core.step()
        seconds = time.thread_time() - started
        self.add(int(np.count_nonzero(output.finish_codes != FinishCode.NONE)))
        return seconds


@dataclass(frozen=True, slots=True)
class Figures:
    step_microseconds: list[float]  # per running sequence, of each round
    add_microseconds: float  # the median of taking a sequence in

    def __str__(self) -> str:
        rounds = self.step_microseconds
        return f"{statistics.median(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, nargs="*", default=[16, 64, 256, 1024])
    parser.add_argument("--num-waiting", type=int, default=100_000)
    parser.add_argument("--num-steps", type=int, default=200, help="of a round")
    parser.add_argument("--num-rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    add_microseconds: list[float] = []
    for num_seqs in arguments.num_seqs:
        figures = [
            measure(num_seqs, num_waiting, arguments.num_steps, arguments.num_rounds, decode_only=decode_only)
            for decode_only in (True, False)
            for num_waiting in (0, arguments.num_waiting)
        ]
        rows.append([str(num_seqs), *map(str, figures)])
        add_microseconds.append(figures[-1].add_microseconds)
    waiting = f"{arguments.num_waiting:,} waiting"
    print_and_keep(
        "scheduler_overhead",
        ["running", "decode", f"decode, {waiting}", "churn", f"churn, {waiting}"],
        rows,
        [
            "CPU microseconds per running sequence and step: the median of the rounds, and the least to the most. A "
            "round is its median step for decode, its mean step for churn, in which steps differ. A step runs on one "
            "thread.",
            f"Target: at most {TARGET_MICROSECONDS:.0f}.",
            f"Beside the steps, each sequence of the last column took {statistics.median(add_microseconds):.0f} "
            "microseconds to be checked and put into the queue.",
        ],
    )


def measure(num_seqs: int, num_waiting: int, num_steps: int, num_rounds: int, *, decode_only: bool) -> Figures:
    num_blocks = num_seqs * (MAX_MODEL_LEN // BLOCK_SIZE)
    config = EngineConfig(model_path="none", max_num_seqs=num_seqs, max_num_tokens=8192, block_size=BLOCK_SIZE)
    load = Load(EngineCore(config, runner=InstantRunner(num_blocks)), decode_only=decode_only)
    load.add(num_seqs + num_waiting)
    for _ in range(100):
        load.step()
    typical = statistics.median if decode_only else statistics.mean
    gc.collect()
    gc.freeze()
    rounds = [typical([load.step() for _ in range(num_steps)]) / num_seqs * 1e6 for _ in range(num_rounds)]
    gc.unfreeze()
    return Figures(rounds, statistics.median(load.add_seconds) * 1e6)


if __name__ == "__main__":
    main()
