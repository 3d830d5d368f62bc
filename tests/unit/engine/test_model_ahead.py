"""A model whose steps are computed ahead: the tokens and log-probabilities of one whose steps are not."""

from pathlib import Path
from typing import Any

import pytest
import triton

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.grammar_spec import GrammarSpec
from engine.messages import AddSequence
from engine.runner.batch_inputs import BatchInputs
from engine.runner.step_ahead import StepAhead
from engine.runner.step_sampler import DeviceTokens
from engine.sampling_params import SamplingParams
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.replayed_steps import replay_steps
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()

KINDS: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "logit_bias": ((5, 3.0),), "min_tokens": 2},
    {"grammar": GrammarSpec("regex", "(ab|cd|[x-z]){3,30}")},
    {"grammar": GrammarSpec("regex", "[0-9a-f]{4,40}"), "temperature": 1.1, "top_p": 0.9},
    {"logprobs": 0, "frequency_penalty": 0.7},
]


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("kinds", [[{}], KINDS], ids=["plain", "of all kinds"])
def test_a_model_gives_the_same_tokens_ahead_and_launches_each_step_before_the_one_before_it_is_read(
    kinds: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_tiny_model("llama", tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    replay_steps(monkeypatch)
    is_next_launched = _log_reads(monkeypatch)
    (tokens, logprobs), (tokens_ahead, logprobs_ahead) = [_run_model(folder, a, kinds) for a in ("torch", "triton")]
    assert tokens_ahead == tokens
    assert logprobs_ahead == pytest.approx(logprobs, abs=1e-4)  # float32, added up in another order
    assert "step_ahead_failed" not in caplog.text
    assert len(is_next_launched) >= 10 and all(is_next_launched)


def _log_reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step of runners that compute ahead: whether the next one was launched when its tokens were read."""
    is_next_launched: list[bool] = []
    ahead: list[StepAhead[Any]] = []
    launch, start_reading = StepAhead.launch, DeviceTokens.start_reading

    def note_launch(self: StepAhead[Any], inputs: BatchInputs, token_ids: Any) -> None:
        ahead[:] = [self]
        launch(self, inputs, token_ids)

    def log_read(tokens: DeviceTokens, inputs: BatchInputs) -> Any:
        reading = start_reading(tokens, inputs)

        def read() -> Any:
            is_next_launched.extend(one._guess is not None for one in ahead)
            return reading()

        return read

    monkeypatch.setattr(StepAhead, "launch", note_launch)
    monkeypatch.setattr(DeviceTokens, "start_reading", log_read)
    return is_next_launched


def _run_model(folder: Path, attention: str, kinds: list[dict[str, Any]]) -> tuple[dict[int, list[int]], list[float]]:
    """Tokens and log-probabilities of more prompts than there are slots, one of them longer than a step."""
    config = EngineConfig(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        attention=attention,
        block_size=4,
        max_num_seqs=3 if len(kinds) > 1 else 2,
        max_num_tokens=8,
        num_kv_blocks=32,
        max_model_len=128,
    )
    core = EngineCore(config)
    assert core.info.runs_ahead == (attention == "triton")
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}

    def step() -> None:
        output = core.step()
        assert not output.errors and not output.grammar_errors
        for sequence_id, token_id in zip(output.sequence_ids.tolist(), output.token_ids.tolist(), strict=True):
            tokens.setdefault(sequence_id, []).append(token_id)
        if output.logprobs is not None:
            ids = output.sequence_ids[output.logprobs.rows].tolist()
            for sequence_id, logprob in zip(ids, output.logprobs.logprobs.tolist(), strict=True):
                logprobs.setdefault(sequence_id, []).append(logprob)

    prompts = [[20, 21, 22], list(range(30, 49)), [99], [30, 31], [7, 8], [9]]
    for i, prompt in enumerate(prompts[: max(4, len(kinds))]):
        options = {"temperature": 0.9 * (i % 2)} | kinds[i % len(kinds)]
        params = SamplingParams(max_tokens=3 + i, seed=i, ignore_eos=True, **options)
        core.add(AddSequence(sequence_id=i, prompt_token_ids=prompt, params=params))
        if i == 0:  # the others join while it goes on
            step()
    while core.has_work():
        step()
    return tokens, [logprob for _, some in sorted(logprobs.items()) for logprob in some]
