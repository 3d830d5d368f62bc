"""Packed linear layers: torch's results, each row the same to the bit in every batch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.model import bfloat16_linear
from engine.model.bfloat16_linear import Bfloat16Linear
from engine.model.locate import default_cache_dir
from engine.model.native_linear import NativeLinear, load_matmul
from engine.model.onednn_linear import OneDnnLinear
from engine.model.packed_linear import LinearPacker, choose_packer, pack_linears

KERNELS = default_cache_dir() / "kernels"
KINDS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor | None], nn.Module]]] = {
    "native-float32": (torch.float32, partial(NativeLinear, matmul=load_matmul(KERNELS)[1])),
    "onednn-float32": (torch.float32, OneDnnLinear),
    "onednn-bfloat16": (torch.bfloat16, OneDnnLinear),
}
HAS_PAIRS = bfloat16_linear.is_best_here()
if HAS_PAIRS:
    KINDS["native-bfloat16"] = torch.bfloat16, partial(Bfloat16Linear, matmul=bfloat16_linear.load_matmul(KERNELS)[1])
NATIVE = [kind for kind in KINDS if kind.startswith("native")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("in_features", "out_features"), [(47, 37), (64, 100), (576, 192), (1536, 576)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_layer_computes_what_torchs_does_and_a_row_does_not_depend_on_its_batch(
    kind: str, in_features: int, out_features: int, has_bias: bool
) -> None:
    dtype, make = KINDS[kind]
    if kind == "onednn-bfloat16" and choose_packer(dtype, KERNELS) is None:
        pytest.skip("oneDNN does not pack bfloat16 for this CPU")
    generator = torch.Generator().manual_seed(in_features)
    weight = (torch.randn(out_features, in_features, generator=generator) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    x = torch.randn(1, 130, in_features, generator=generator).to(dtype)
    layer = make(weight, bias)
    output = layer(x)
    expected = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Outputs of up to 4, sums of up to 1,536 terms: as many roundings as the root of that, of numbers of that size.
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=128 * torch.finfo(dtype).eps)
    for num_rows in (2, 3, 7, 8, 16, 17, 64, 129):
        assert torch.equal(layer(x[:, :num_rows]), output[:, :num_rows]), num_rows


@pytest.mark.parametrize("kind", NATIVE)
@pytest.mark.parametrize("num_rows", [0, 121, 512, 2600])
@pytest.mark.parametrize("out_features", [1, 90, 1000])
def test_the_native_product_leaves_no_row_or_column_out_however_they_are_shared_out(
    kind: str, num_rows: int, out_features: int
) -> None:
    dtype, make = KINDS[kind]
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(out_features, 24, generator=generator) * 24**-0.5).to(dtype)
    x = torch.randn(num_rows, 24, generator=generator).to(dtype)
    layer, expected = make(weight, None), nn.functional.linear(x.double(), weight.double())
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("num_rows", [1, 2, 7, 13, 250])
@pytest.mark.parametrize("out_features", [37, 192])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_a_16_bit_formats_numbers_is_kept_in_half_of_the_bytes_and_gives_the_same_bits(
    num_rows: int, out_features: int, dtype: torch.dtype
) -> None:
    make = KINDS["native-float32"][1]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out_features, 200, generator=generator).to(dtype).float()
    weight[3, 5:7] = torch.tensor([2.0**-24, 65504.0]).to(dtype).float()  # float16's least and largest
    bias, x = torch.randn(out_features, generator=generator), torch.randn(num_rows, 200, generator=generator)
    narrow, wide = (
        make(weight, bias),
        make(torch.cat([weight, torch.full((1, 200), 1 / 3)]), torch.cat([bias, bias[:1]])),
    )
    assert (narrow._panels.dtype, wide._panels.dtype) == (dtype, torch.float32)
    assert torch.equal(narrow(x), wide(x)[:, :out_features])


@pytest.mark.parametrize("kind", NATIVE)
def test_the_native_product_is_the_same_to_the_bit_for_any_number_of_threads(kind: str) -> None:
    dtype, make = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(250, 576, generator=generator).to(dtype)
    layer = make(torch.randn(1000, 576, generator=generator).to(dtype), None)
    outputs = []
    for count in (1, 2, 3, 16):
        torch.set_num_threads(count)
        outputs.append(layer(x))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_every_linear_layer_of_a_model_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 4)))
    x = torch.randn(3, 8)
    expected = model(x)
    packer = choose_packer(torch.float32, KERNELS)
    assert packer is not None
    pack_linears(model, packer)
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())
    torch.testing.assert_close(model(x), expected)


def test_float32_is_our_own_kernels_and_float16_is_left_alone() -> None:
    assert (packer := choose_packer(torch.float32, KERNELS)) is not None and packer.build.startswith("matmul-")
    if HAS_PAIRS:
        assert (packer := choose_packer(torch.bfloat16, KERNELS)) is not None and packer.build.startswith(
            "matmul_bf16-"
        )
    assert choose_packer(torch.float16, KERNELS) is None


def test_without_a_compiler_float32_falls_back_to_onednn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    packer: LinearPacker | None = choose_packer(torch.float32, tmp_path)
    assert packer is not None and packer.build == "oneDNN packed"
