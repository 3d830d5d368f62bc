"""Host and device exchange nothing within a forward, which is launched on the device that is asked for.

A CUDA graph cannot be captured of a forward that reads a value off the device, or brings one there. No device is needed
to see that one does: the operators that give the host a value are the same on a CPU, and what lies on the host stays
there where all else is moved to the device that has no memory.
"""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.attention.base import AttentionContext, AttentionRules
from engine.attention.torch_backend import TorchAttention
from engine.model.attention_hook import ATTENTION_NAME, attach_attention, attention_of, attention_set_to
from engine.model.devices import use_device
from engine.model.registry import ARCHITECTURES
from tests.fakes.tiny_models import make_tiny_model

# They give the host a value, or a shape that depends on values.
_WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
    "_unique2",
}


class Waits(TorchDispatchMode):
    """Notes operators that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in _WAITING or has_mask or (name == "repeat_interleave" and func._overloadname == "Tensor"):
            self.names.append(str(func))
        if name == "lift_fresh" and not args[0].is_meta and args[0].dim():
            self.names.append(f"{func}: a tensor made of Python values")
        return func(*args, **(kwargs or {}))


class Arrivals(TorchDispatchMode):
    """Notes operators that bring a tensor from the host to the device without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        is_there = torch.is_tensor(result) and result.is_meta
        is_copy = func.overloadpacket.__name__ in ("_to_copy", "copy_")
        # A number may lie on the host: a kernel takes it as an argument.
        if is_there and any(not tensor.is_meta and (is_copy or tensor.dim()) for tensor in tensors):
            self.names.append(str(func))
        return result


class _Stub:
    """Attention that costs nothing."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: AttentionRules) -> Any:
        return torch.zeros_like(query).transpose(1, 2)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_forward_waits_for_no_device_and_sends_it_nothing(architecture: str, tmp_path: Path) -> None:
    entry = ARCHITECTURES[architecture]
    model_class = getattr(importlib.import_module(entry.module_name), entry.class_name)
    folder = make_tiny_model(architecture, tmp_path)
    model = model_class.from_pretrained(str(folder), dtype=torch.float32, attn_implementation=ATTENTION_NAME).eval()
    attach_attention(model, AttentionContext(TorchAttention()), num_layers=model.config.num_hidden_layers)
    assert _noted(Waits(), model, "cpu") == []
    # In a dtype for which experts have one product.
    assert _noted(Arrivals(), model.to("meta", torch.bfloat16), "meta") == []


def _noted(mode: Waits | Arrivals, model: Any, device: str) -> list[str]:
    """Of a forward there."""
    stubs = {module: _Stub() for module in model.modules() if attention_of(module) is not None}
    inputs = torch.tensor([[5, 99, 7, 31]]), torch.tensor([[3, 4, 0, 9]]), torch.tensor([1, 3])
    tokens, positions, wanted = (values.to(device) for values in inputs)
    with torch.inference_mode(), attention_set_to(stubs), mode:  # type: ignore[arg-type]
        model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=wanted)
    return mode.names


def test_a_tensor_that_is_brought_to_the_device_is_noted() -> None:
    there = torch.empty(3, device="meta")
    with Arrivals() as arrivals:
        there + torch.tensor(2.0)  # a kernel's argument
        torch.tensor(2.0).to("meta")
        there[1:2].copy_(torch.ones(1))
    assert arrivals.names == ["aten._to_copy.default", "aten.copy_.default"]


def test_triton_launches_on_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    use_device(torch.device("cuda", 1))
    use_device(torch.device("cpu"))
    assert used == [torch.device("cuda", 1)]
