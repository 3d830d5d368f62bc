"""Models on Triton's kernels from end to end: what is fused, how many kernels a layer is, transformers' own logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.model.fused_modules import FusedAttention, FusedMLP
from engine.model.loader import LoadedModel, load_model
from engine.model.paged_modules import PagedAttentionModule, PagedLayer
from tests.fakes.fast_interpreter import speed_up_interpreter
from tests.fakes.packed_forward import BLOCK_SIZE, Part, batch_of
from tests.fakes.tiny_models import make_tiny_model

speed_up_interpreter()
pytestmark = [
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs Triton's interpreter"),
    # NumPy warns where exponentials are infinite, as they are meant to be.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

# Of the two layers of each: attentions, mlps, whole layers.
FUSED = {
    "gemma2": (2, 2, 0),
    "gpt2": (0, 0, 0),
    "llama": (2, 2, 2),
    "olmo2": (2, 2, 0),
    "phi3": (2, 2, 2),
    "qwen3": (2, 2, 2),
    "qwen3_moe": (2, 0, 2),
    "smollm3": (2, 2, 2),
}
TOKENS = torch.tensor([5, 99, 7, 31, 250, 8, 64, 12, 200, 77, 3])


def load(folder: Path, **overrides: Any) -> LoadedModel:
    options: dict[str, Any] = {
        "attention": "triton",
        "device": "cpu",
        "dtype": "float32",
        "block_size": BLOCK_SIZE,
    } | overrides
    return load_model(EngineConfig(model_path=str(folder), **options))


def forward(model: LoadedModel, tokens: torch.Tensor, parts: list[Part]) -> torch.Tensor:
    """Logits of one sequence's tokens, computed part by part."""
    model.allocate_kv_cache(-(-len(tokens) // BLOCK_SIZE))
    rows = []
    for part in parts:
        model.context.batch = batch_of([part], (torch.arange(8),))
        positions = torch.arange(part[1], part[2])
        rows.append(model.forward(tokens[part[1] : part[2]], positions, torch.arange(len(positions))))
    return torch.cat(rows)


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_an_architecture_is_fused_and_computes_what_transformers_does(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny_model(architecture, tmp_path)
    model = load(folder)
    assert tuple(count(model, kind) for kind in (PagedAttentionModule, FusedMLP, PagedLayer)) == FUSED[architecture]
    assert count(model, FusedAttention) == FUSED[architecture][0]
    twin = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = twin(TOKENS[None]).logits[0]
    output = forward(model, TOKENS, [(0, 0, 8), (0, 8, 10), (0, 10, 11)])
    # float32 sums in another order, through two layers
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=2e-4)


def test_a_cache_of_another_dtype_than_the_models_is_refused_as_int8_has_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"'triton' does not work here: .* cache's are torch\.float16"):
        load(make_tiny_model("llama", tmp_path), quantize="int8")


@pytest.mark.parametrize(("architecture", "num_kernels"), [("llama", 10), ("qwen3", 10)])
def test_a_decoder_layer_is_so_many_kernels(architecture: str, num_kernels: int, tmp_path: Path) -> None:
    model = load(make_tiny_model(architecture, tmp_path))
    model.allocate_kv_cache(4)
    layer = next(module for module in model.model.modules() if isinstance(module, PagedLayer))
    hidden = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    model.context.batch = batch_of([(0, 5, 6), (1, 9, 10)], (torch.arange(2), torch.arange(2, 4)))
    angles = torch.ones(1, 2, 8), torch.zeros(1, 2, 8)
    with torch.inference_mode(), counted_kernels() as launched:
        layer(hidden[None], position_embeddings=angles)
    assert len(launched) == num_kernels <= 12, launched


def test_a_layer_behind_another_is_given_its_first_norm_and_computes_it_itself_for_other_rows(tmp_path: Path) -> None:
    model = load(make_tiny_model("llama", tmp_path))
    model.allocate_kv_cache(4)
    assert model.context.kv_cache is not None
    model.context.kv_cache.zero_()  # of what is attended to, only the last token is written here
    first, second = (module for module in model.model.modules() if isinstance(module, PagedLayer))
    hidden = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    model.context.batch = batch_of([(0, 5, 6), (1, 9, 10)], (torch.arange(2), torch.arange(2, 4)))
    angles = torch.ones(1, 2, 8), torch.zeros(1, 2, 8)
    with torch.inference_mode():
        given = first(hidden[None], position_embeddings=angles)
        with counted_kernels() as launched:
            output = second(given, position_embeddings=angles)
        assert len(launched) == 9 and "norm_kernel" not in launched
        with counted_kernels() as launched:
            again = second(given, position_embeddings=angles)
        assert len(launched) == 10 and "norm_kernel" in launched and torch.equal(again, output)
        first(hidden[None] + 1, position_embeddings=angles)
        assert torch.equal(second(given, position_embeddings=angles), output), "what is given is for one tensor alone"


def count(model: LoadedModel, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.model.modules())


class _TorchKernels(TorchDispatchMode):
    """Notes torch's operators that compute something: no views, no allocations."""

    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_paused and not func.is_view and func.overloadpacket.__name__ not in _NO_KERNELS:
            self.launched.append(str(func))
        return func(*args, **(kwargs or {}))


_NO_KERNELS = {"empty", "empty_like", "new_empty", "detach", "_unsafe_view", "view", "_reshape_alias"}


@contextmanager
def counted_kernels() -> Iterator[list[str]]:
    """The kernels that are launched meanwhile, torch's and Triton's."""
    from triton.runtime.interpreter import InterpretedFunction

    launched: list[str] = []
    mode = _TorchKernels(launched)
    run = InterpretedFunction.run

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        mode.is_paused = True
        try:
            return run(self, *args, **kwargs)
        finally:
            mode.is_paused = False

    InterpretedFunction.run = note
    try:
        with mode:
            yield launched
    finally:
        InterpretedFunction.run = run
