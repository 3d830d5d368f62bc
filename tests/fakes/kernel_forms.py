"""In which forms an engine on a CPU launches Triton's kernels: what a GPU would compile, each of them once.

A model is loaded under Triton's interpreter, which its trials need. From then on kernels are noted and not run: what
would write activations writes zeros. So a step takes next to no time, and its tokens mean nothing.
"""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from engine.model.loader import LoadedModel, load_model
from engine.runner.transfer import HostToDevice
from tests.fakes.triton_compiler import Launch


class KernelForms:
    """Of all launches since it was made; equal forms are one kernel's machine code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[tuple[Any, ...]] = set()
        self._is_loaded = False
        self._run = InterpretedFunction.run
        monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: self._note(*args, **kwargs))
        monkeypatch.setattr("engine.runner.model_runner.load_model", self._load_model)
        monkeypatch.setattr(HostToDevice, "_share", _aligned)

    def _load_model(self, *args: Any) -> LoadedModel:
        model = load_model(*args)
        self._is_loaded = True
        return model

    def _note(self, function: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = Launch.of(_compiled(function), args, kwargs)
        self.seen.add(launch.key())
        if not self._is_loaded:
            self._run(function, *args, grid=grid, warmup=warmup, **kwargs)
        elif launch.name == "mask_kernel":
            _mask(launch.bound)
        elif launch.name == "choose_kernel":
            launch.bound["tokens_ptr"].copy_(launch.bound["logits_ptr"].argmax(1))
        else:
            for name in ("out_ptr", "q_out_ptr", "sum_ptr", "places_ptr", "before_ptr"):
                if name in launch.bound:
                    launch.bound[name].zero_()


def _mask(arguments: dict[str, Any]) -> None:
    """So that a grammar is obeyed."""
    logits, bits = arguments["logits_ptr"], arguments["bits_ptr"].numpy()
    is_allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]]
    for row, allowed in zip(arguments["rows_ptr"].tolist(), is_allowed, strict=True):
        logits[row].masked_fill_(torch.from_numpy(allowed == 0), float("-inf"))


def _aligned(self: HostToDevice, arrays: tuple[Any, ...]) -> list[Tensor]:
    """As a GPU has them, where what is promised to the compiler of a pointer is always so."""
    return [torch.tensor(array) for array in arrays]


@cache
def _compiled(function: InterpretedFunction) -> Any:
    """The function as it would be compiled."""
    return JITFunction(function.fn, **function.kwargs)
