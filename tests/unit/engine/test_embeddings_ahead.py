"""Embeddings on a GPU's path, in Triton's interpreter: beside decodes computed ahead, and graphs that replay."""

from pathlib import Path

import numpy as np
import pytest
import triton
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.sampling_params import SamplingParams
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.replayed_steps import replay_steps
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()

TEXTS = [[20, 21, 22], list(range(30, 44)), [99]]


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_vectors_and_tokens_are_those_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("llama", tmp_path, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    replay_steps(monkeypatch)
    (tokens, vectors), (tokens_ahead, vectors_ahead) = [run(folder, attention) for attention in ("torch", "triton")]
    assert tokens_ahead == tokens and len(vectors) == 2 * len(TEXTS)
    for sequence_id, vector in vectors.items():
        np.testing.assert_allclose(vectors_ahead[sequence_id], vector, rtol=0, atol=1e-5 * np.abs(vector).max())


def run(folder: Path, attention: str) -> tuple[dict[int, list[int]], dict[int, NDArray[np.float32]]]:
    """Two decodes, and beside them each text's last hidden state and its mean, as they find room."""
    config = EngineConfig(
        model_path=str(folder),
        device="cpu",
        dtype="float32",
        attention=attention,
        block_size=4,
        max_num_seqs=4,
        max_num_tokens=8,
        num_kv_blocks=48,
        max_model_len=192,
    )
    core = EngineCore(config)
    tokens: dict[int, list[int]] = {100: [], 101: []}
    vectors: dict[int, NDArray[np.float32]] = {}

    def step() -> None:
        output = core.step()
        assert not output.errors
        core.check_integrity()
        vectors.update(output.embeddings)
        for sequence_id, token_id in zip(output.sequence_ids.tolist(), output.token_ids.tolist(), strict=True):
            tokens[sequence_id].append(token_id)

    for sequence_id in tokens:
        params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
        core.add(AddSequence(sequence_id=sequence_id, prompt_token_ids=[sequence_id, 7], params=params))
        step()
    params = SamplingParams(max_tokens=0)
    for i, text in enumerate(TEXTS):
        core.add(AddSequence(sequence_id=2 * i, prompt_token_ids=text, params=params, pooling="last"))
        core.add(AddSequence(sequence_id=2 * i + 1, prompt_token_ids=text, params=params, pooling="mean"))
        step()
    while core.has_work():
        step()
    return tokens, vectors
