"""Chains of native calls: what the same calls one by one compute, to the bit, and that a failure ends them."""

import ctypes
import struct
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from torch import Tensor

from engine.attention.base import AttentionRules
from engine.config import EngineConfig
from engine.model import bfloat16_linear, devices
from engine.model.int8_linear import Int8Kernels, Int8Linear
from engine.model.loader import LoadedModel, load_model
from engine.model.locate import default_cache_dir
from engine.model.native_layer import NativeLayer
from engine.model.native_linear import NativeLinear, load_matmul
from engine.model.native_rows import NativeRows
from engine.model.norm_rule import NormRule
from engine.model.quantised_rows import QuantisedRows
from engine.model.workspace import Workspace
from tests.fakes.packed_forward import BLOCK_SIZE, prompts, run, steps_of
from tests.fakes.tiny_models import make_tiny_model

KERNELS = default_cache_dir() / "kernels"
KINDS = [
    ("float32", "none"),
    ("float32", "int8"),
    ("bfloat16", "none"),
    ("float16", "none"),
    ("native bfloat16", "int8"),
]


@pytest.fixture
def model(dtype: str, quantize: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """On a CPU that multiplies bfloat16 itself where the dtype says so."""
    monkeypatch.setattr(devices, "cpu_has_bfloat16", lambda: dtype.startswith("native"))
    folder = str(make_tiny_model(architecture, tmp_path))
    dtype = dtype.removeprefix("native ")
    return load_model(EngineConfig(model_path=folder, dtype=dtype, quantize=quantize, block_size=BLOCK_SIZE))


@pytest.fixture(scope="module")
def rows() -> NativeRows:
    return NativeRows(KERNELS)


class HalfQuery:
    """Stands in for attention; knows no pages, and is no native call."""

    def links(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, rules: AttentionRules, band: int | None = None
    ) -> None:
        return None

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, rules: AttentionRules) -> Tensor:
        return q * 0.5 + k.mean((1, 2), keepdim=True) - v.mean((1, 2), keepdim=True)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize(("dtype", "quantize"), KINDS)
def test_a_layer_in_chains_computes_to_the_bit_what_its_modules_do(model: LoadedModel) -> None:
    layer = next(module for module in model.model.modules() if isinstance(module, NativeLayer))
    layer.self_attn.attention = HalfQuery()  # type: ignore[assignment]
    hidden_size, head_dim = layer.input_layernorm.weight.shape[0], layer.self_attn._head_dim
    x = random(1, 23, hidden_size, dtype=model.dtypes.activations)
    before = x.clone()
    angles = random(1, 23, head_dim)
    position_embeddings = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    with torch.inference_mode():
        expected = layer._by_modules(x[0], position_embeddings)[None]
        for _ in range(2):  # as prepared, and as kept
            assert torch.equal(layer(x, position_embeddings), expected)
        assert torch.equal(x, before)
        part = tuple(angle[:, 5:6] for angle in position_embeddings)
        assert torch.equal(layer(x[:, 5:6], part), expected[:, 5:6])
        longer, repeated = x.repeat(1, 4, 1), tuple(angle.repeat(1, 4, 1) for angle in position_embeddings)
        assert torch.equal(layer(longer, repeated), expected.repeat(1, 4, 1))  # their tensors have moved
        assert torch.equal(layer(x, position_embeddings), expected)
        assert len(layer.rows.workspace.prepared) == 1
        for wanted in (torch.tensor([22, 3, 3]), torch.tensor([7])):
            with layer.wanting(wanted):
                assert torch.equal(layer(x, position_embeddings), expected[:, wanted])
                assert torch.equal(layer._by_modules(x[0], position_embeddings), expected[0, wanted])
        assert torch.equal(layer(x, position_embeddings), expected)


@pytest.mark.parametrize("architecture", ["mistral"])  # with a sliding window
@pytest.mark.parametrize(("dtype", "quantize"), KINDS)
def test_attention_within_a_chain_computes_to_the_bit_what_it_does_between_two(model: LoadedModel) -> None:
    workspace = next(module for module in model.model.modules() if isinstance(module, NativeLayer)).rows.workspace
    sequences, steps = prompts(model.vocab_size), steps_of(7)  # the last step has one token, and is padded to two
    model.decoder = None  # which has no chain of a layer
    workspace.prepared.clear()  # of what was tried at load
    within = run(model, sequences, steps)
    again = run(model, sequences, steps)  # the pages have moved
    assert all(chains.whole is not None for chains in workspace.prepared.values())
    few = run(model, sequences, steps, every=3)
    model.context.chained_backend = None
    workspace.prepared.clear()
    apart = run(model, sequences, steps)
    assert all(chains.whole is None for chains in workspace.prepared.values())
    assert all(map(torch.equal, within, apart)) and all(map(torch.equal, again, apart))
    for outputs in (few, run(model, sequences, steps, every=3)):
        for output, same in zip(outputs, within, strict=True):
            assert torch.equal(output.nan_to_num(), same.where(~output.isnan(), 0))


def test_a_workspace_holds_the_angles_that_it_was_given_last() -> None:
    first, second = ((random(1, 5, 8) + i, random(1, 5, 8) - i) for i in range(2))
    workspace = Workspace()
    workspace.reserve(5)
    places = [[part.data_ptr() for part in workspace.take_angles(given)] for given in (first, second, first)]
    assert places[0] == places[1] == places[2]
    for given in (second, first):
        assert all(map(torch.equal, workspace.take_angles(given), given))


Product: TypeAlias = Int8Linear | NativeLinear | bfloat16_linear.Bfloat16Linear


def products(dtype: torch.dtype) -> list[Product]:
    weight, bias = random(37, 45, dtype=dtype), random(37, dtype=dtype)
    made: list[Product] = [Int8Linear(weight, bias, Int8Kernels(KERNELS))]
    if dtype == torch.float32:
        made.append(NativeLinear(weight, bias, load_matmul(KERNELS)[1]))
    elif bfloat16_linear.is_best_here():
        made.append(bfloat16_linear.Bfloat16Linear(weight, bias, bfloat16_linear.load_matmul(KERNELS)[1]))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_product_adds_its_addend_last(rows: NativeRows, dtype: torch.dtype, is_in_place: bool) -> None:
    x, addend = random(70, 45, dtype=dtype), random(70, 37, dtype=dtype)
    for product in products(dtype):
        expected = product(x) + addend
        given = addend.clone()
        out = given if is_in_place else torch.empty_like(addend)
        rows.chain(70, product.link(x, out, given))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_writes_its_numbers_as_float32_too(rows: NativeRows, dtype: torch.dtype) -> None:
    x, weight, bias = random(70, 45, dtype=dtype), random(90, 45, dtype=dtype), random(90, dtype=dtype)
    made = [*(Int8Linear(weight, added, Int8Kernels(KERNELS)) for added in (None, bias)), *products(dtype)]
    for product in made:
        out = torch.empty(70, product.out_features)
        rows.chain(70, product.link(x, out))
        assert torch.equal(out, product(x).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [45, 576])
def test_rows_that_leave_in_8_bits_give_a_product_the_same_bits(
    rows: NativeRows, dtype: torch.dtype, size: int
) -> None:
    """As where it quantises them itself; some rows are no numbers, of one sign, or zeros."""
    product = Int8Linear(random(37, size), None, Int8Kernels(KERNELS))
    x, weight, gate_up = random(70, size, dtype=dtype), random(size, dtype=dtype), random(70, 2 * size, dtype=dtype)
    x[1, 44], x[2, 3], x[3], x[4], x[5] = float("nan"), float("-inf"), 0, x[4].abs(), -x[5].abs()
    gate_up[1, 44], gate_up[2, 3], gate_up[3, size:], gate_up[4, :size] = float("nan"), float("inf"), 0, 3e38
    rows.workspace.reserve(70)
    codes = product.input_rows(rows.workspace, "codes", 70, dtype)
    assert isinstance(codes, QuantisedRows)
    out = torch.empty(70, 37, dtype=dtype)
    normed = torch.empty_like(x)
    rule = NormRule(1e-5, False, True)
    rows.norm(x, normed, weight, rule)
    given = [(rows.norm_link(x, codes, weight, rule), normed)]
    given += [
        (rows.glu_link(gate_up, codes, is_gelu=is_gelu), rows.glu(gate_up, is_gelu=is_gelu))
        for is_gelu in (False, True)
    ]
    for link, plain in given:
        expected = product(plain)
        assert expected.isnan().any(1).tolist()[:3] == [False, True, True]
        rows.chain(70, link, product.link(codes, out))
        torch.testing.assert_close(out, expected, atol=0, rtol=0, equal_nan=True)


def test_a_chain_ends_at_the_call_that_has_no_memory(rows: NativeRows) -> None:
    x = random(3, 8)
    before = x.clone()
    norm = rows.norm_link(x, x, torch.ones(8), NormRule(1e-5, False, False))
    fails = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda arguments: 1)
    failing = struct.pack("@P2q", ctypes.cast(fails, ctypes.c_void_p).value, 0, -1)
    rows.chain(3)
    with pytest.raises(MemoryError, match="could not allocate"):
        rows.chain(3, failing, norm)
    assert torch.equal(x, before)
    with pytest.raises(MemoryError, match="could not allocate"):
        rows.chain(3, norm, failing)
    assert not torch.equal(x, before)
