"""What a step costs beside the model: scheduling, batch building, transfer to torch and bookkeeping, per sequence.

The model is replaced by one that answers at once, so that all time measured is ours. Two loads:

- decode: every sequence decodes, the state that a busy engine is in most of the time;
- churn: prompts of U(32, 256) tokens that ask for U(32, 128), a new one for each that ends, so that prefill chunks,
  admissions and ends are in the figure.

Each with nothing waiting and with 100,000 sequences waiting. Run with `python -m benchmarks.scheduler_overhead`.
"""

import argparse
import gc
import random
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.report import print_and_keep
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence, EngineInfo, FinishCode, StepOutput
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
    """A core kept at `num_seqs` running sequences."""

    core: EngineCore
    rng: random.Random
    num_added: int = 0
    decode_only: bool = True

    def add(self, count: int) -> None:
        for _ in range(count):
            num_prompt = 64 if self.decode_only else self.rng.randint(32, 256)
            num_output = None if self.decode_only else self.rng.randint(32, 128)
            prompt = [self.rng.randrange(100, 40_000) for _ in range(num_prompt)]
            params = SamplingParams(max_tokens=num_output, temperature=0.0)
            self.core.add(AddSequence(sequence_id=self.num_added, prompt_token_ids=prompt, params=params))
            self.num_added += 1

    def refill(self, output: StepOutput) -> None:
        self.add(int(np.count_nonzero(output.finish_codes != FinishCode.NONE)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, nargs="*", default=[16, 64, 256, 1024])
    parser.add_argument("--num-waiting", type=int, default=100_000)
    parser.add_argument("--num-steps", type=int, default=400)
    arguments = parser.parse_args()
    rows: list[list[str]] = []
    for num_seqs in arguments.num_seqs:
        figures = [
            measure(num_seqs, num_waiting, arguments.num_steps, decode_only=decode_only)
            for decode_only in (True, False)
            for num_waiting in (0, arguments.num_waiting)
        ]
        rows.append([str(num_seqs), *(f"{figure:.2f}" for figure in figures)])
    waiting = f"{arguments.num_waiting:,} waiting"
    print_and_keep(
        "scheduler_overhead",
        ["running", "decode", f"decode, {waiting}", "churn", f"churn, {waiting}"],
        rows,
        [
            "CPU microseconds per running sequence and step: the median step for decode, the mean for churn, in which "
            "steps differ. A step runs on one thread.",
            f"Target: at most {TARGET_MICROSECONDS:.0f}.",
        ],
    )


def measure(num_seqs: int, num_waiting: int, num_steps: int, *, decode_only: bool) -> float:
    """Microseconds per running sequence and step."""
    num_blocks = num_seqs * (MAX_MODEL_LEN // BLOCK_SIZE)
    config = EngineConfig(model_path="none", max_num_seqs=num_seqs, max_num_tokens=8192, block_size=BLOCK_SIZE)
    load = Load(EngineCore(config, runner=InstantRunner(num_blocks)), random.Random(7), decode_only=decode_only)
    load.add(num_seqs + num_waiting)
    for _ in range(100):
        load.refill(load.core.step())
    seconds: list[float] = []
    gc.collect()
    gc.freeze()
    for _ in range(num_steps):
        started = time.thread_time()
        output = load.core.step()
        seconds.append(time.thread_time() - started)
        load.refill(output)
    gc.unfreeze()
    typical = statistics.median(seconds) if decode_only else statistics.mean(seconds)
    return typical / num_seqs * 1e6


if __name__ == "__main__":
    main()
