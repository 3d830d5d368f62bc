"""Linear layers with one order of additions: their product, and that a row's bits do not depend on the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from engine.attention.torch_backend import TorchAttention
from engine.config import EngineConfig
from engine.errors import ModelLoadError
from engine.model.loader import LoadedModel, load_model
from engine.model.triton_linear import TritonLinear, invariant_packer
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.kernel_device import KERNEL_DEVICE
from tests.fakes.packed_forward import BLOCK_SIZE, run
from tests.fakes.tiny_models import VOCAB_SIZE, make_tiny_model

speed_up_interpreter()
pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    # NumPy warns where exponentials are infinite, as they are meant to be.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
LENGTHS = [1, 4, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 50, 70), (20, 16, 32)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_is_the_product_and_a_row_the_same_alone(
    dtype: torch.dtype, shape: tuple[int, int, int], has_bias: bool
) -> None:
    num_rows, out_features, in_features = shape
    generator = torch.Generator().manual_seed(num_rows)
    x, weight = (torch.randn(size, in_features, generator=generator) for size in (num_rows, out_features))
    x, weight = x.to(KERNEL_DEVICE, dtype), (weight * in_features**-0.5).to(KERNEL_DEVICE, dtype)
    bias = torch.randn(out_features, generator=generator).to(KERNEL_DEVICE, dtype) if has_bias else None
    layer = TritonLinear(weight, bias)
    layer._num_programs = 3  # fewer than there are tiles
    output = layer(x[None])[0]
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # Sums of about 1 in float32, rounded once to the dtype.
    torch.testing.assert_close(
        output.double(), expected, atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps
    )
    for row in {0, num_rows // 2, num_rows - 1}:
        assert torch.equal(layer(x[row : row + 1])[0], output[row])


def test_a_product_whose_rows_depend_on_their_batch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TritonLinear.forward
    monkeypatch.setattr(TritonLinear, "forward", lambda self, x: right(self, x) + len(x) * 1e-3)
    with pytest.raises(ModelLoadError, match="rows of a matrix product depend"):
        invariant_packer(torch.float32, KERNEL_DEVICE)


def load(folder: Path, **overrides: Any) -> LoadedModel:
    options: dict[str, Any] = {
        "attention": "triton",
        "device": "cpu",
        "dtype": "bfloat16",
        "block_size": BLOCK_SIZE,
    } | overrides
    return load_model(EngineConfig(model_path=str(folder), deterministic=True, **options))


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_a_deterministic_models_logits_do_not_depend_on_chunks_or_batch_mates(tmp_path: Path) -> None:
    model = load(make_tiny_model("qwen3", tmp_path, num_hidden_layers=1))
    assert model.is_batch_invariant
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    together = run(model, sequences, [[(i, 0, length) for i, length in enumerate(LENGTHS)]])
    chunked = run(model, sequences, [[(0, 0, 1), (2, 0, 5)], [(1, 0, 3), (2, 5, 9)], [(1, 3, 4), (2, 9, 10)]])
    alone = run(model, sequences, [[(2, 0, 10)], [(1, 0, 4)], [(0, 0, 1)]])
    for i, logits in enumerate(together):
        assert torch.equal(chunked[i], logits), f"sequence {i} in chunks"
        assert torch.equal(alone[i], logits), f"sequence {i} alone"


def test_an_engine_that_cannot_keep_it_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ModelLoadError, match="deterministic cannot be kept: a mixture of experts"):
            load(make_tiny_model("qwen3_moe", tmp_path), attention="torch", dtype=dtype)
    monkeypatch.setattr(TorchAttention, "is_row_invariant", False)
    with pytest.raises(ModelLoadError, match=r"cannot be kept: attention 'torch' or .*float32.*; set it to false"):
        load(make_tiny_model("llama", tmp_path), attention="torch", dtype="float32")


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter")
def test_the_fingerprint_tells_a_deterministic_engine_from_another(tmp_path: Path) -> None:
    folder = make_tiny_model("llama", tmp_path)
    config = EngineConfig(model_path=str(folder), attention="triton", device="cpu", dtype="bfloat16")
    usual = load_model(config)
    assert not usual.is_batch_invariant and usual.fingerprint != load(folder).fingerprint
