"""Steps computed ahead of their plan give the tokens of sequences that run alone, over pages where mistakes show."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.runner.batch_inputs import BatchInputs
from engine.runner.model_runner import ModelRunner
from engine.runner.step_ahead import StepAhead
from engine.runner.transfer import HostToDevice
from engine.sampling_params import SamplingParams
from engine.step_plan import SampledTokens
from tests.fakes.core_driver import CoreDriver
from tests.fakes.fake_runner import FakeRunner, undisturbed_output
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()


class FakeRunnerAhead(FakeRunner):
    """A fake whose steps go through `StepAhead`, as on a device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.info = replace(self.info, runs_ahead=True)
        self.ahead = StepAhead(self._forward, HostToDevice(torch.device("cpu")))
        self.num_computed = self.num_taken = self.num_completed = 0

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        taken = self.ahead.take(inputs)
        self.num_taken += taken is not None
        if taken is None:
            tokens = torch.from_numpy(super().execute(inputs).token_ids)
        elif taken.rest is None:
            tokens = taken.token_ids
        else:
            self.num_completed += 1
            tokens = torch.cat((taken.token_ids, torch.from_numpy(super().execute(taken.rest).token_ids)))
        self.ahead.launch(inputs, tokens)
        self.ahead.expect(tokens.numpy())
        return SampledTokens(tokens.numpy())

    def _forward(self, inputs: BatchInputs, token_ids: Tensor) -> Tensor:
        self.num_computed += 1
        return torch.from_numpy(super().execute(replace(inputs, input_ids=token_ids.numpy())).token_ids)

    def _compute_row(self, inputs: BatchInputs, row: int) -> None:
        if inputs.slot_mapping[inputs.query_start[row]] >= 0:  # a place that there is not yet is written by no kernel
            super()._compute_row(inputs, row)


def test_every_decode_but_the_first_one_is_computed_ahead() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(4):
        driver.add([seed, 2, 3], max_tokens=20, seed=seed)
    driver.run()
    for seed in range(4):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [seed, 2, 3], max_tokens=20, seed=seed)
    # One step gives the first tokens, the first decode precedes the first guess, and nobody asks for the last guess.
    assert (runner.num_taken, runner.num_computed) == (18, 19)


def test_a_guess_serves_those_that_go_on_when_others_end() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(4):
        driver.add([seed, 2, 3], max_tokens=6 + 3 * seed, seed=seed)
    driver.run()
    for seed in range(4):
        expected = undisturbed_output(runner.info, [seed, 2, 3], max_tokens=6 + 3 * seed, seed=seed)
        assert driver.outputs[seed] == expected
    assert runner.num_taken == runner.num_computed - 1 == 13


def test_a_prompt_that_comes_meanwhile_costs_no_guess() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(3):
        driver.add([seed, 2, 3], max_tokens=20, seed=seed)
        for _ in range(4):
            driver.step()
    driver.run()
    for seed in range(3):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [seed, 2, 3], max_tokens=20, seed=seed)
    assert runner.num_completed == 2 and runner.num_taken == runner.num_computed - 1


def test_a_newcomer_of_one_token_spoils_no_guess() -> None:
    runner = FakeRunnerAhead(num_blocks=64)
    driver = CoreDriver(runner, prompt_lookup="off")
    for seed in range(2):
        driver.add([7] * 5, max_tokens=20, seed=seed)  # all of the second one but its last token is cached
        for _ in range(4):
            driver.step()
    driver.run()
    for seed in range(2):
        assert driver.outputs[seed] == undisturbed_output(runner.info, [7] * 5, max_tokens=20, seed=seed)
    assert runner.num_completed == 1 and runner.num_taken == runner.num_computed - 1


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("num_blocks", [12, 24, 200])
@pytest.mark.parametrize("seed", range(4))
def test_comings_endings_aborts_and_preemptions_change_no_token(block_size: int, num_blocks: int, seed: int) -> None:
    rng = random.Random(seed)
    runner = FakeRunnerAhead(num_blocks=num_blocks * 4 // block_size, block_size=block_size, max_model_len=40)
    driver = CoreDriver(runner, max_num_seqs=5, max_num_tokens=12, prompt_lookup=rng.choice(["on", "off"]))
    expected: dict[int, list[int]] = {}
    while len(expected) < 30 or driver.core.has_work():
        if len(expected) < 30 and rng.random() < 0.3:
            prompt = [rng.randrange(3) for _ in range(rng.randint(1, 14))]
            options: dict[str, Any] = {"max_tokens": rng.randint(1, 25), "seed": rng.randrange(9)}
            options["stop_token_ids"] = tuple(rng.sample(range(50), 2))
            sequence_id = driver.add(prompt, logprobs=None, **options)
            expected[sequence_id] = undisturbed_output(runner.info, prompt, **options)
        if expected and rng.random() < 0.05:
            victim = rng.choice(list(expected))
            driver.core.abort([victim])
            expected[victim] = list(driver.outputs[victim])
        driver.step()
    assert driver.outputs == expected
    assert runner.num_taken > runner.num_completed > 0
    driver.core.check_integrity()


def test_a_sequence_that_goes_bad_or_raises_ahead_of_its_turn_fails_alone() -> None:
    for options in ({"poison_token": 49}, {"raising_token": 49}):
        runner = FakeRunnerAhead(num_blocks=64, **options)
        driver = CoreDriver(runner, prompt_lookup="off")
        for seed in range(6):
            driver.add([seed, 2, 3], max_tokens=60, seed=seed)
        driver.run()
        for seed in range(6):
            whole = undisturbed_output(runner.info, [seed, 2, 3], max_tokens=60, seed=seed)
            if 49 in whole[:-1]:
                assert seed in driver.errors and driver.outputs[seed] == whole[: whole.index(49) + 1]
            else:
                assert driver.outputs[seed] == whole
        assert driver.errors, "the fake has a sequence that meets the token"


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_model_gives_the_same_tokens_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("llama", tmp_path)
    outputs = []
    for attention in ("torch", "triton"):
        monkeypatch.setattr(ModelRunner, "_runs_ahead", lambda self: self._model.uses_triton)
        config = EngineConfig(
            model_path=str(folder),
            device="cpu",
            dtype="float32",
            attention=attention,
            block_size=4,
            max_num_seqs=3,
            max_num_tokens=12,
            num_kv_blocks=24,
        )
        core = EngineCore(config)
        assert core.info.runs_ahead == (attention == "triton")
        for i, prompt in enumerate([[20, 21, 22], [99], [30, 31]]):
            params = SamplingParams(max_tokens=5 + 2 * i, temperature=0.9 * (i % 2), seed=i, ignore_eos=True)
            core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
        tokens: list[tuple[int, int]] = []
        while core.has_work():
            step = core.step()
            assert not step.errors
            tokens += zip(step.sequence_ids.tolist(), step.token_ids.tolist(), strict=True)
        outputs.append(np.array(tokens).tolist())
    assert outputs[0] == outputs[1]
