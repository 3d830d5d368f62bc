"""Norms, rotation, page writing and activations in Triton against their definitions in torch, outputs poisoned."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.attention.base import PageSlots
from engine.model.norm_rule import NormRule
from engine.model.triton_rows import DTYPES, HeadNorms, TritonRows
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.kernel_device import KERNEL_DEVICE, poisoned_memory

speed_up_interpreter()
# NumPy warns where integers wrap and exponentials are infinite, as they are meant to.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
ROWS = TritonRows()
# A rounding of the dtype or two, of values up to 8.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(KERNEL_DEVICE, dtype)


def norm_twin(x: Tensor, weight: Tensor, rule: NormRule) -> Tensor:
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + rule.epsilon)
    if rule.rounds_first:
        y = y.to(x.dtype).float()
    return (y * (weight.float() + rule.adds_one)).to(x.dtype)


def assert_close(output: Tensor, expected: Tensor) -> None:
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, atol=TOLERANCES[output.dtype], rtol=TOLERANCES[output.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8, 48, 577])
@pytest.mark.parametrize("rule", [NormRule(1e-6, False, True), NormRule(1e-3, True, False)])
def test_a_norm_is_its_formula_and_a_row_does_not_depend_on_its_batch(
    dtype: torch.dtype, size: int, rule: NormRule
) -> None:
    x, weight = random(5, 3 * size, dtype=dtype), random(size, dtype=dtype)
    out = torch.full_like(x, float("nan"))
    ROWS.norm(x, out, weight, rule)
    assert_close(out, norm_twin(x.view(5, 3, size), weight, rule).view(5, -1))
    alone = x[3:4].clone()
    ROWS.norm(alone, alone, weight, rule)
    assert torch.equal(alone[0], out[3]), "in place and alone"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [48, 577])
def test_an_addition_and_a_norm_are_those_of_torch(dtype: torch.dtype, size: int) -> None:
    x, weight, rule = random(4, size, dtype=dtype), random(size, dtype=dtype), NormRule(1e-5, False, True)
    residual = random(4, size + 1, dtype=dtype)[:, 1:].contiguous()
    total, out = ROWS.add_norm(x, residual, weight, rule)
    assert torch.equal(total, residual + x)
    assert_close(out, norm_twin(total, weight, rule))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_gelu", [False, True])
@pytest.mark.parametrize("size", [7, 96, 1030])
def test_a_gated_activation_is_that_of_torch(dtype: torch.dtype, is_gelu: bool, size: int) -> None:
    gate_up = random(3, 2 * size, dtype=dtype) * 3
    gate, up = gate_up.chunk(2, dim=1)
    active = torch.nn.functional.gelu(gate, approximate="tanh") if is_gelu else torch.nn.functional.silu(gate)
    assert_close(ROWS.glu(gate_up, is_gelu=is_gelu), active * up)


SHAPES = [
    # num_heads, num_kv_heads, head_dim, rotary_dim
    (6, 2, 16, 16),
    (3, 1, 20, 12),
    (9, 3, 80, 80),
    (4, 4, 8, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_normed_rotated_and_written_and_nothing_else_is(
    dtype: torch.dtype, shape: tuple[int, int, int, int], has_norms: bool
) -> None:
    num_heads, num_kv_heads, head_dim, rotary_dim = shape
    num_rows, block_size = 4, 3
    merged = random(num_rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = random(num_rows, rotary_dim // 2, dtype=torch.float32).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = None
    if has_norms:
        weights = random(head_dim, dtype=dtype), random(head_dim + 1, dtype=dtype)[:head_dim]
        norms = HeadNorms(*weights, NormRule(1e-6, False, True))
    pages = torch.full((2, 3, block_size, num_kv_heads, head_dim), 77.0, dtype=dtype, device=KERNEL_DEVICE)
    slots = torch.tensor([7, -1, 2], device=KERNEL_DEVICE)  # the fourth row is padding, and so is the second
    q = ROWS.rotate_and_write(
        merged,
        (cos, sin) if rotary_dim else None,
        norms,
        PageSlots(pages[0], pages[1], slots),
        num_heads=num_heads,
    )
    heads = merged.view(num_rows, -1, head_dim)
    expected_q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    if norms is not None:
        expected_q, k = norm_twin(expected_q, norms.q_weight, norms.rule), norm_twin(k, norms.k_weight, norms.rule)
    assert_close(q, rotate(expected_q, cos, sin))
    written = torch.full_like(pages, 77.0).flatten(1, 2)
    written[0, slots[[0, 2]]], written[1, slots[[0, 2]]] = rotate(k, cos, sin)[[0, 2]], v[[0, 2]]
    assert_close(pages.flatten(1, 2), written)
    untouched = [slot for slot in range(9) if slot not in (7, 2)]
    assert (pages.flatten(1, 2)[:, untouched] == 77.0).all()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' rotation of the first dims, in float32."""
    rotary_dim = cos.shape[1]
    first, rest = x[..., :rotary_dim].float(), x[..., rotary_dim:]
    low, high = first.chunk(2, dim=-1)
    turned = first * cos.float()[:, None] + torch.cat([-high, low], dim=-1) * sin.float()[:, None]
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
