"""The sampler's passes over the vocabulary through engine/kernels/sampling.c: passes pointers, on a CPU.

The twin is `engine.torch_sampling`.
"""

import struct
from pathlib import Path

import torch
from torch import Tensor

from engine.kernels.build import build_library, load_library

# `sampling_args` of sampling.c: eleven pointers, a 64-bit and four 32-bit integers.
_ARGUMENTS = struct.Struct("@11Pq4i")


class NativeSampling:
    """Compiled when it is made. Raises `KernelBuildError` where that fails."""

    def __init__(self, kernels_dir: Path) -> None:
        library = load_library(build_library("sampling", kernels_dir))
        self._mask = library.promptmill_mask
        self._argmax = library.promptmill_argmax
        self._settle = library.promptmill_settle
        self._draw = library.promptmill_draw
        self._candidates = library.promptmill_candidates

    def mask(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """See `VocabularyPasses.mask`."""
        assert bits.shape[1] * 32 >= logits.shape[1], "a bit for every logit"
        self._mask(_pack(logits, rows, bits=bits.contiguous()))

    def argmax(self, logits: Tensor) -> Tensor:
        """See `VocabularyPasses.argmax`."""
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self._argmax(_pack(logits, None, tokens=tokens))
        return tokens

    def settle(self, logits: Tensor, tokens: Tensor) -> None:
        """See `VocabularyPasses.settle`."""
        assert tokens.is_contiguous() and tokens.dtype == torch.int64, "one after the other"
        self._settle(_pack(logits, None, tokens=tokens))

    def draw(self, logits: Tensor, rows: Tensor, temperature: Tensor, keys: Tensor) -> Tensor:
        """See `VocabularyPasses.draw`."""
        tokens = torch.empty(len(rows), dtype=torch.int64)
        self._draw(_pack(logits, rows, temperature=temperature.contiguous(), keys=keys.contiguous(), tokens=tokens))
        return tokens

    def candidates(
        self, logits: Tensor, rows: Tensor, temperature: Tensor, min_p: Tensor, num_candidates: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `VocabularyPasses.candidates`."""
        values, token_ids, mass, _ = self._find(logits, rows, temperature, min_p, num_candidates)
        return values, token_ids, mass

    def likeliest(self, logits: Tensor, rows: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """See `VocabularyPasses.likeliest`."""
        ones, zeros = torch.ones(len(rows)), torch.zeros(len(rows))
        _, token_ids, _, log_sum = self._find(logits, rows, ones, zeros, num_tokens)
        return token_ids.to(torch.int64), log_sum

    def _find(
        self, logits: Tensor, rows: Tensor, temperature: Tensor, min_p: Tensor, num_candidates: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = torch.empty((len(rows), num_candidates))
        token_ids = torch.empty((len(rows), num_candidates), dtype=torch.int32)
        mass, log_sum = torch.empty((2, len(rows)), dtype=torch.float64)
        arguments = _pack(
            logits,
            rows,
            temperature=temperature.contiguous(),
            min_p=min_p.contiguous(),
            values=values,
            token_ids=token_ids,
            mass=mass,
            log_sum=log_sum,
        )
        if self._candidates(arguments) != 0:
            raise MemoryError("the sampling kernel could not allocate its scratch memory")
        return values, token_ids, mass, log_sum


def _pack(
    logits: Tensor,
    rows: Tensor | None,
    *,
    temperature: Tensor | None = None,
    keys: Tensor | None = None,
    min_p: Tensor | None = None,
    tokens: Tensor | None = None,
    values: Tensor | None = None,
    token_ids: Tensor | None = None,
    mass: Tensor | None = None,
    log_sum: Tensor | None = None,
    bits: Tensor | None = None,
) -> bytes:
    """The arguments as the kernel reads them; the caller keeps the tensors alive. rows: None for all in order."""
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, "logits are float32 rows"
    tensors = (logits, rows, temperature, keys, min_p, tokens, values, token_ids, mass, log_sum, bits)
    return _ARGUMENTS.pack(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        logits.stride(0),
        len(logits if rows is None else rows),
        logits.shape[1],
        0 if values is None else values.shape[1],
        torch.get_num_threads(),
    )
