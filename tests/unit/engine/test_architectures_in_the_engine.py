"""Every architecture on the list under everything the engine does to a sequence, against transformers' `generate`.

One run a model: prefills are cut into chunks, the pool is too small for all, so that sequences are preempted and
computed again, prompts share a prefix, some come with tokens of an earlier run, and some are choices of one prompt.
"""

import random
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import AddSequence
from engine.model import devices
from engine.model.loader import LoadedModel, load_model
from engine.model.registry import ARCHITECTURES
from engine.sampling_params import SamplingParams
from tests.fakes.core_driver import run_to_end
from tests.fakes.expert_routers import Routers
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run
from tests.fakes.tiny_models import MIXTURES_OF_EXPERTS, VOCAB_SIZE, make_tiny_model

NUM_NEW = 12
HALVES = ["bfloat16", "float16"]
WIDENED = sorted(ARCHITECTURES.keys() - set(MIXTURES_OF_EXPERTS))
# Rounded keys and values are off by up to half a step, 2^-9 and 2^-12 of them.
KV_ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
RESUMED = 4  # every second sequence comes with so many of its tokens


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """An architecture, a model of it, and transformers' own in float32."""
    folder = make_tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, reference(request.param, folder)


def reference(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    entry = ARCHITECTURES[architecture]
    model_class = getattr(import_module(entry.module_name), entry.class_name)
    model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NUM_NEW, do_sample=False, pad_token_id=0
    )
    new: list[int] = output[0, len(prompt) :].tolist()
    return new


def test_tokens_are_generates_chunked_preempted_hit_resumed_and_forked(tiny: tuple[str, Path, Any]) -> None:
    _, folder, model = tiny
    assert_tokens_are_generates(folder, model, "float32")


@pytest.mark.parametrize("tiny", ["gemma2", "gpt2", "llama"], indirect=True)
def test_tokens_of_weights_in_float16_are_generates_with_these_in_float32(tiny: tuple[str, Path, Any]) -> None:
    """No two of their logits lie as near to each other as its rounding of keys and values reaches; bfloat16's does."""
    _, folder, model = tiny
    assert_tokens_are_generates(folder, of_numbers_of(torch.float16, model), "float16")


def of_numbers_of(dtype: torch.dtype, model: Any) -> Any:
    """A copy in float32 with rounded weights."""
    rounded = deepcopy(model)
    for weight in rounded.parameters():
        weight.data = weight.data.to(dtype).float()
    return rounded


def assert_tokens_are_generates(folder: Path, model: Any, dtype: str) -> None:
    rng = random.Random(2)
    prefix = [rng.randrange(250) for _ in range(40)]
    own = [[rng.randrange(250) for _ in range(length)] for length in (1, 23, 61)]
    shared = [prefix + [rng.randrange(250) for _ in range(length)] for length in (2, 9, 30)]
    choice = [rng.randrange(250) for _ in range(35)]
    expected = [generate(model, prompt) for prompt in [*own, *shared, choice]]
    everything = [*own, *shared, choice, choice]
    expected.append(expected[-1])  # greedy: both choices say the same

    core = EngineCore(
        EngineConfig(
            model_path=str(folder),
            device="cpu",
            dtype=dtype,
            max_num_seqs=6,
            max_num_tokens=24,
            block_size=8,
            num_kv_blocks=13,
        )
    )
    params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
    outputs = [tokens[:RESUMED] if i % 2 else [] for i, tokens in enumerate(expected)]
    for i, prompt in enumerate(everything):
        core.add(
            AddSequence(
                sequence_id=i,
                prompt_token_ids=prompt,
                params=params,
                output_token_ids=outputs[i],
                group_id=len(own + shared) if i >= len(own + shared) else None,
            )
        )
    assert [had + new for had, new in zip(outputs, run_to_end(core, len(everything)), strict=True)] == expected
    stats = core.get_stats()
    assert stats.num_preemptions and stats.num_cached_tokens > len(prefix) and not stats.num_kv_blocks_used


@pytest.mark.parametrize("tiny", WIDENED, indirect=True)
@pytest.mark.parametrize("dtype", KV_ROUNDING, ids=str)
def test_logits_of_weights_in_two_bytes_are_transformers_float32_of_them_but_for_keys_and_values(
    tiny: tuple[str, Path, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: False)
    _, folder, exact = tiny
    rounded = of_numbers_of(dtype, exact)
    name = str(dtype).removeprefix("torch.")
    model = load_model(EngineConfig(model_path=str(folder), dtype=name, device="cpu", block_size=BLOCK_SIZE))
    two_bytes = model.dtypes
    assert (two_bytes.activations, two_bytes.kv_cache) == (torch.float32, dtype)
    for tokens in prompts(VOCAB_SIZE):
        expected = forward(rounded, tokens)
        model.dtypes = replace(two_bytes, kv_cache=torch.float32)
        assert errors(packed(model, tokens), expected).max() < 1e-5
        model.dtypes = two_bytes
        # Layers of such large weights magnify it by up to 8.
        assert errors(packed(model, tokens), expected).max() < 12 * KV_ROUNDING[dtype]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_logits_are_those_of_float32_within_its_rounding(
    tiny: tuple[str, Path, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of them, with the experts that float32 chooses; the choice is held to the same, and a matter of its own
    below."""
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: True)
    architecture, folder, exact = tiny
    model = load_model(EngineConfig(model_path=str(folder), dtype=dtype, block_size=BLOCK_SIZE))
    theirs = reference(architecture, folder, getattr(torch, dtype))
    chosen, our_routers, their_routers = Routers(exact), Routers(model.model), Routers(theirs)
    ours: dict[str, list[torch.Tensor]] = defaultdict(list)
    transformers: dict[str, list[torch.Tensor]] = defaultdict(list)
    for tokens in prompts(VOCAB_SIZE):
        expected = forward(exact, tokens)
        with our_routers.following(chosen), their_routers.following(chosen):
            ours["logits"].append(errors(packed(model, tokens), expected))
            transformers["logits"].append(errors(forward(theirs, tokens), expected))
        for name, logits in chosen.logits.items():
            ours[name].append(errors(our_routers.logits[name][: len(tokens)], logits))
            transformers[name].append(errors(their_routers.logits[name], logits))
    # No further from float32 than transformers' own forward in this dtype, up to chance: a factor of two.
    for name, parts in transformers.items():
        assert torch.cat(ours[name]).median() <= 2 * torch.cat(parts).median(), name
        assert torch.cat(ours[name]).max() <= 2 * torch.cat(parts).max(), name


@pytest.mark.parametrize("tiny", MIXTURES_OF_EXPERTS, indirect=True)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_leaves_float32_only_behind_a_choice_of_experts_that_the_rounding_turns(
    tiny: tuple[str, Path, Any], dtype: str
) -> None:
    """As one does in gpt_oss and float16: for the last prompt's token 16 the first router gives its second and third
    expert 1.0022 and 1.0035, nearer to each other than a step of float16 and the rounding of what the router is given;
    transformers' float16 finds both at 1.0039, ours 1.0029 and 1.0010, so that another expert computes."""
    architecture, folder, exact = tiny
    model = load_model(EngineConfig(model_path=str(folder), dtype=dtype, block_size=BLOCK_SIZE))
    theirs = reference(architecture, folder, getattr(torch, dtype))
    chosen, routers, their_routers = Routers(exact), Routers(model.model), Routers(theirs)
    ours: list[torch.Tensor] = []
    transformers: list[torch.Tensor] = []
    for tokens in prompts(VOCAB_SIZE):
        expected, output = forward(exact, tokens), packed(model, tokens)
        with their_routers.following(chosen):
            transformers.append(errors(forward(theirs, tokens), expected))
        first_turned = len(tokens)  # all before it has seen the experts of float32 at work, and nothing else
        for name in chosen.names:
            turned = chosen.differ_from(routers, name).nonzero().flatten()
            turned = turned[turned < first_turned]
            worst = (their_routers.logits[name] - chosen.logits[name]).abs().max()
            assert bool((chosen.margins(name)[turned] <= 2 * worst).all()), "two logits, each rounded"
            first_turned = min([first_turned, *turned.tolist()])
        ours.append(errors(output, expected)[:first_turned])
    assert torch.cat(ours).max() <= 2 * torch.cat(transformers).max()


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits `[num_tokens, vocab_size]`."""
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens[None], use_cache=False).logits[0]
    return logits


def packed(model: LoadedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The same of ours, in one step."""
    return run(model, [tokens], [[(0, 0, len(tokens))]])[0]


def errors(logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row, relative to the spread of the logits."""
    return (logits.float() - expected).square().mean(-1).sqrt() / expected.std()
