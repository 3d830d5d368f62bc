"""Packed linear layers: torch's results, each row the same to the bit in every batch."""

import pytest
import torch
from torch import nn

from engine.model.packed_linear import DTYPES, PackedLinear, pack_linears


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(48, 37), (64, 100), (576, 192), (1536, 576)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_layer_computes_what_torchs_does_and_a_row_does_not_depend_on_its_batch(
    dtype: torch.dtype, in_features: int, out_features: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(in_features)
    weight = (torch.randn(out_features, in_features, generator=generator) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype) if has_bias else None
    x = torch.randn(1, 130, in_features, generator=generator).to(dtype)
    layer = PackedLinear(weight, bias)
    output = layer(x)
    expected = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Outputs of up to 4, sums of up to 1,536 terms: as many roundings as the root of that, of numbers of that size.
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=128 * torch.finfo(dtype).eps)
    for num_rows in (2, 3, 7, 16, 17, 64, 129):
        assert torch.equal(layer(x[:, :num_rows]), output[:, :num_rows]), num_rows


def test_every_linear_layer_of_a_model_is_replaced_and_float16_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Sequential(nn.Linear(16, 4)))
    x = torch.randn(3, 8)
    expected = model(x)
    assert not pack_linears(model, dtype=torch.float16)
    assert pack_linears(model, dtype=torch.float32)
    assert not any(isinstance(layer, nn.Linear) for layer in model.modules())
    torch.testing.assert_close(model(x), expected)
