"""Every architecture on the list against transformers' own eager forward; every other one is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.loader import LoadedModel, load_model
from engine.model.registry import ARCHITECTURES, find_architecture, max_position
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model

BLOCK_SIZE = 8
LENGTHS = [1, 5, 33, 70]
Part = tuple[int, int, int]  # sequence, first token, last token + 1


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    """The engine's model and transformers' own of the same weights."""
    import importlib

    architecture = ARCHITECTURES[request.param]
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    model_class = getattr(importlib.import_module(architecture.module_name), architecture.class_name)
    reference = model_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return load_model(EngineConfig(model_path=str(folder), dtype="float32", block_size=BLOCK_SIZE)), reference


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def run(model: LoadedModel, sequences: list[Tensor], steps: list[list[Part]]) -> list[Tensor]:
    """Logits `[length, vocab_size]` of every token of every sequence, computed in the given steps."""
    counts = [-(-len(tokens) // BLOCK_SIZE) for tokens in sequences]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).split(counts)
    model.allocate_kv_cache(sum(counts))
    logits = [torch.full((len(tokens), model.vocab_size), float("nan")) for tokens in sequences]
    for parts in steps:
        model.context.batch = batch_of(parts, order)
        tokens = torch.cat([sequences[i][first:last] for i, first, last in parts])
        positions = torch.cat([torch.arange(first, last) for _, first, last in parts])
        output = model.forward(tokens, positions, torch.arange(len(tokens)))
        for (i, first, last), rows in zip(parts, output.split([p[2] - p[1] for p in parts]), strict=True):
            logits[i][first:last] = rows
    return logits


def batch_of(parts: list[Part], blocks: tuple[Tensor, ...]) -> AttentionBatch:
    lengths = [last - first for _, first, last in parts]
    positions = [torch.arange(first, last) for _, first, last in parts]
    slots = [
        blocks[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for (i, _, _), p in zip(parts, positions, strict=True)
    ]
    tables = torch.nn.utils.rnn.pad_sequence([blocks[i] for i, _, _ in parts], batch_first=True)
    return AttentionBatch(
        query_start=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor([last for _, _, last in parts], dtype=torch.int32),
        block_tables=tables.to(torch.int32),
        slot_mapping=torch.cat(slots),
        num_seqs=len(parts),
        num_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_context_len=max(last for _, _, last in parts),
    )


def steps_of(size: int) -> list[list[Part]]:
    return [
        [(i, first, min(first + size, length)) for i, length in enumerate(LENGTHS) if first < length]
        for first in range(0, max(LENGTHS), size)
    ]


@pytest.mark.parametrize("size", [1000, 13, 1], ids=["prefilled whole", "in chunks", "decoded one by one"])
def test_packed_paged_logits_equal_transformers_eager_forward(tiny: tuple[LoadedModel, Any], size: int) -> None:
    model, reference = tiny
    sequences = prompts()
    outputs = run(model, sequences, steps_of(size))
    for tokens, output in zip(sequences, outputs, strict=True):
        with torch.inference_mode():
            expected = reference(tokens[None], use_cache=False).logits[0]
        # float32 through two layers: other sums of the same terms.
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(output.argmax(-1), expected.argmax(-1))


def test_greedy_tokens_equal_generate(tiny: tuple[LoadedModel, Any]) -> None:
    model, reference = tiny
    sequences = prompts()
    num_new = 6
    grown = [tokens.clone() for tokens in sequences]
    for _ in range(num_new):
        steps = [[(i, 0, len(tokens)) for i, tokens in enumerate(grown)]]
        grown = [
            torch.cat([tokens, rows[-1].argmax()[None]])
            for tokens, rows in zip(grown, run(model, grown, steps), strict=True)
        ]
    for tokens, output in zip(sequences, grown, strict=True):
        expected = reference.generate(
            tokens[None],
            attention_mask=torch.ones_like(tokens)[None],
            max_new_tokens=num_new,
            min_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )
        assert output.tolist() == expected[0].tolist()


def test_an_untested_architecture_is_refused_by_name_with_the_list_of_tested_ones() -> None:
    with pytest.raises(ModelLoadError, match=r"my-model: architecture 'falcon' is not supported.*llama.*qwen3"):
        find_architecture({"model_type": "falcon"}, source="my-model")


def test_a_config_without_architecture_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="architecture None is not supported"):
        find_architecture({}, source="my-model")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised .gptq."),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, "code of its own"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_a_config_that_would_change_the_arithmetic_is_refused(extra: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        find_architecture({"model_type": "llama"} | extra, source="my-model")


def test_longrope_is_pinned_by_stopping_where_its_frequencies_would_switch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
    }
    folder = make_tiny_model("phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=64)
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32"))
    assert model.max_model_len == 64
    with pytest.raises(ModelLoadError, match="max_model_len 65 passes the model's 64 positions"):
        load_model(EngineConfig(model_path=str(folder), dtype="float32", max_model_len=65))


def test_dynamic_rope_stays_within_the_positions_that_never_rescale_it(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = make_tiny_model("llama", tmp_path, rope_parameters=rope)
    model = load_model(EngineConfig(model_path=str(folder), dtype="float32"))
    assert model.max_model_len == max_position(model.model.config) == 2048
