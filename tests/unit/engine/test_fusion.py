"""Fused modules: which architectures get them, what they compute, and that one which computes otherwise stays out."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from engine.config import EngineConfig
from engine.model import fusion
from engine.model.fused_modules import FusedAttention, FusedMLP, FusedNorm
from engine.model.loader import LoadedModel, load_model
from engine.model.locate import default_cache_dir
from engine.model.native_layer import NativeLayer
from engine.model.native_rows import DTYPES, NativeRows
from engine.model.norm_rule import NormRule
from tests.fakes.tiny_models import make_tiny_model

# Of the two layers of each: attentions, mlps, whole layers; a mixture of experts has no mlp to fuse, and a layer with
# more norms or other additions than most keeps transformers' own order.
FUSED = {
    "gemma": (2, 2, 2),
    "gemma2": (2, 2, 0),
    "gemma3_text": (2, 2, 0),
    "gpt2": (0, 0, 0),
    "gpt_neox": (0, 0, 0),
    "gpt_oss": (0, 0, 0),
    "granite": (2, 2, 0),
    "llama": (2, 2, 2),
    "mistral": (2, 2, 2),
    "mixtral": (2, 0, 0),
    "olmo2": (2, 2, 0),
    "phi3": (2, 2, 2),
    "qwen2": (2, 2, 2),
    "qwen3": (2, 2, 2),
    "qwen3_moe": (2, 0, 0),
    "smollm3": (2, 2, 2),
    "starcoder2": (2, 0, 0),
}


@pytest.fixture(scope="module")
def rows() -> NativeRows:
    return NativeRows(default_cache_dir() / "kernels")


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_an_architectures_modules_are_fused(architecture: str, tmp_path: Path) -> None:
    model = load_model(EngineConfig(model_path=str(make_tiny_model(architecture, tmp_path)), dtype="float32"))
    assert (count(model, FusedAttention), count(model, FusedMLP), count(model, NativeLayer)) == FUSED[architecture]


def test_a_module_that_computes_something_else_keeps_its_own_and_the_fingerprint_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model_path=str(make_tiny_model("llama", tmp_path)), dtype="float32")
    usual = load_model(config)
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * 1.01)
    model = load_model(config)
    assert (count(model, FusedAttention), count(model, FusedMLP), count(model, NativeLayer)) == (2, 0, 0)
    assert model.fingerprint != usual.fingerprint


def test_a_layer_that_adds_something_else_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **rest: forward(self, x, **rest) * 1.01)
    model = load_model(EngineConfig(model_path=str(make_tiny_model("llama", tmp_path)), dtype="float32"))
    assert (count(model, FusedAttention), count(model, FusedMLP), count(model, NativeLayer)) == (2, 2, 0)


def test_a_replaced_module_is_gone_before_the_next_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals: list[weakref.ref[nn.Module]] = []
    alive: list[list[bool]] = []

    class WatchedMLP(FusedMLP):
        def __init__(self, rows: Any, original: nn.Module, **options: Any) -> None:
            alive.append([ref() is not None for ref in originals])
            originals.append(weakref.ref(original))
            super().__init__(rows, original, **options)

    monkeypatch.setattr(fusion, "FusedMLP", WatchedMLP)
    load_model(EngineConfig(model_path=str(make_tiny_model("llama", tmp_path)), dtype="float32"))
    assert alive == [[], [False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 48, 576, 1001])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_norm_is_its_formula_and_a_row_does_not_depend_on_its_batch(
    rows: NativeRows, dtype: torch.dtype, size: int, num_threads: int
) -> None:
    x, weight = random((130, 2 * size), dtype), random((size,), dtype)
    out, alone = torch.empty_like(x), torch.empty_like(x)
    torch.set_num_threads(num_threads)
    rows.norm(x, out, weight, NormRule(1e-5, True, False))
    grouped = x.double().view(130, 2, size)
    expected = grouped * (grouped.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * (1 + weight.double())
    # One rounding of the result, and the float32 sum's own.
    torch.testing.assert_close(out.double(), expected.view(130, -1), rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    rows.norm(x[7:8], alone[7:8], weight, NormRule(1e-5, True, False))
    assert torch.equal(alone[7], out[7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (48, 48), (80, 32), (10, 6)])
def test_a_rotation_is_its_formula_and_leaves_the_rest_of_a_head_alone(
    rows: NativeRows, dtype: torch.dtype, head_dim: int, rotary_dim: int
) -> None:
    x = random((33, 3 * head_dim), dtype)
    angles = random((33, rotary_dim), torch.float32)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    merged = torch.cat([x, x[:, :5]], dim=1)  # rows that are longer than what is rotated
    rows.chain(len(merged), rows.rope_link(merged[:, : 3 * head_dim], cos, sin, head_dim=head_dim))
    heads = x.view(33, 3, head_dim)
    turned, rest = heads[..., :rotary_dim], heads[..., rotary_dim:]
    half = rotary_dim // 2
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
    expected = torch.cat([turned * cos[:, None] + swapped * sin[:, None], rest], dim=-1)
    # The same roundings in the same places; float32 may fuse a product and a sum.
    torch.testing.assert_close(merged[:, : 3 * head_dim], expected.view(33, -1), rtol=0, atol=1e-6)
    assert torch.equal(merged[:, 3 * head_dim :], x[:, :5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("size", [5, 16, 100])
def test_a_gated_activation_is_torchs_and_keeps_what_is_not_a_number(
    rows: NativeRows, dtype: torch.dtype, is_gelu: bool, size: int
) -> None:
    x = random((21, 2 * size), dtype) * 8
    x[3, 0] = 200.0
    x[4, 0] = -200.0
    x[5, 1] = float("nan")
    gate, up = x[:, :size].float(), x[:, size:].float()
    active = nn.functional.gelu(gate, approximate="tanh") if is_gelu else nn.functional.silu(gate)
    # A few units of the last place of exp and tanh, then at most two roundings of the dtype.
    eps = max(1e-6, 1.5 * torch.finfo(dtype).eps)
    output = rows.glu(x.contiguous(), is_gelu=is_gelu).float()
    torch.testing.assert_close(output, active * up, rtol=4 * eps, atol=1e-5, equal_nan=True)


def test_a_fused_norm_takes_its_epsilon_from_either_name(rows: NativeRows) -> None:
    class Norm(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            setattr(self, name, 0.5)

    x = random((2, 8), torch.float32)
    norms = [FusedNorm(rows, Norm(name), adds_one=False, rounds_first=True) for name in ("variance_epsilon", "eps")]
    with torch.inference_mode():
        assert torch.equal(norms[0](x), norms[1](x))


def count(model: LoadedModel, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.model.modules())


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
