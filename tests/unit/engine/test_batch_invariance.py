"""A row of logits is the same to the bit, however its sequence was cut and whatever was computed beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model import devices
from engine.model.loader import LoadedModel, load_model
from engine.model.registry import ARCHITECTURES
from tests.fakes.packed_forward import BLOCK_SIZE, LENGTHS, decodes, prompts, run, steps_of
from tests.fakes.tiny_models import MIXTURES_OF_EXPERTS, VOCAB_SIZE, make_tiny_model

ARITHMETICS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "native bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int8 of float16": {"dtype": "float16", "quantize": "int8"},
    "int8 of native bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
    "keys of int8": {"dtype": "float32", "kv_cache_dtype": "int8"},
    "keys of int8 and int8 of native bfloat16": {"dtype": "bfloat16", "quantize": "int8", "kv_cache_dtype": "int8"},
}
NUM_DEMO_LAYERS = 3  # of 30 that are all of one shape: an order of sums follows from shapes


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(params=ARITHMETICS)
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of the engine, on a CPU that multiplies bfloat16 itself or not."""
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: "native" in request.param)
    return ARITHMETICS[request.param]


def test_logits_do_not_depend_on_chunks_or_batch_mates(tiny: tuple[str, Path], options: dict[str, Any]) -> None:
    architecture, folder = tiny
    has_experts = architecture in MIXTURES_OF_EXPERTS
    if has_experts and options["dtype"] == "float16":
        pytest.skip("in float16 experts are not computed in float32, and int8 layers take no other dtype of it")
    model = load_model(EngineConfig(model_path=str(folder), block_size=BLOCK_SIZE, **options))
    if has_experts:  # whose grouped product goes through a library that chooses its order by the rows
        assert not model.is_batch_invariant
        return
    assert model.is_batch_invariant or model.dtypes.activations == torch.bfloat16, "oneDNN may not pack bfloat16 here"
    assert_invariant(model, VOCAB_SIZE)


@pytest.mark.model
@pytest.mark.parametrize(
    "options",
    [
        "float32",
        "bfloat16",
        "float16",
        "native bfloat16",
        "int8",
        "keys of int8",
        "keys of int8 and int8 of native bfloat16",
    ],
    indirect=True,
)
def test_the_demo_models_logits_do_not_depend_on_chunks_batch_mates_or_threads(options: dict[str, Any]) -> None:
    model = load_model(EngineConfig(model_path="smollm2-135m", block_size=BLOCK_SIZE, **options))
    del model.model.get_decoder().layers[NUM_DEMO_LAYERS:]  # type: ignore[operator]
    torch.set_num_threads(1)
    expected = run(model, prompts(40_000), steps_of(1000))
    for num_threads, size in ((1, 13), (2, 1000), (3, 13), (16, 1000), (16, 13)):
        torch.set_num_threads(num_threads)
        for output, same in zip(run(model, prompts(40_000), steps_of(size)), expected, strict=True):
            assert torch.equal(output, same), f"on {num_threads} threads in chunks of {size}"


def assert_invariant(model: LoadedModel, vocab_size: int) -> None:
    sequences = prompts(vocab_size)
    together = run(model, sequences, steps_of(1000))
    for way, steps in (("in chunks", steps_of(13)), ("decoded", decodes())):
        for output, same in zip(run(model, sequences, steps), together, strict=True):
            assert torch.equal(output, same), way
    for output, same in zip(run(model, sequences, steps_of(13), every=5), together, strict=True):
        has_logits = ~output.isnan().any(1)
        assert torch.equal(output[has_logits], same[has_logits]), "few logits wanted"
    for i, same in enumerate(together):
        assert torch.equal(run(model, [sequences[i]], [[(0, 0, LENGTHS[i])]])[0], same), f"sequence {i} alone"
