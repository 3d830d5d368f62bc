"""Where a test runs Triton's kernels: on the GPU if there is one, else on the CPU under Triton's interpreter."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from engine.attention.base import AttentionBackend, AttentionBatch, AttentionRules

KERNEL_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Have torch fill what it allocates with NaN: an output that a kernel does not write shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operators of other ways to be deterministic, which are not used here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class OnKernelDevice:
    """An attention backend whose inputs come from the CPU, and whose outputs and pages go back there."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend
        self.name, self.build = backend.name, backend.build
        self.is_row_invariant = backend.is_row_invariant

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache_layer: Tensor, batch: AttentionBatch, rules: AttentionRules
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        moved: dict[str, Any] = {
            field.name: value.to(KERNEL_DEVICE)
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        pages = kv_cache_layer.to(KERNEL_DEVICE)
        rules = replace(rules, sinks=None if rules.sinks is None else rules.sinks.to(KERNEL_DEVICE))
        q, k, v = (x.to(KERNEL_DEVICE) for x in (q, k, v))
        output = self._backend.forward(q, k, v, pages, replace(batch, **moved), rules)
        if pages is not kv_cache_layer:
            kv_cache_layer.copy_(pages)
        return output.cpu()
