"""The sampler on a GPU through engine/kernels/triton: no sort, and nothing that the host waits for.

The same tokens as `engine.sampler.Sampler` draws for the same logits. Log-probabilities are torch's.
"""

from functools import partial

import torch
import triton
from torch import Tensor

from engine.kernels.triton.filters import gather_kernel, threshold_kernel
from engine.kernels.triton.logits import mask_kernel, penalize_kernel
from engine.kernels.triton.row_profile import profile_kernel
from engine.kernels.triton.sampling import choose_kernel, draw_kernel, max_kernel, settle_kernel
from engine.logit_editor import LogitEditor
from engine.sampler import Sampler, SamplingBatch
from engine.step_plan import BAD_LOGITS

_BLOCK = 2048
_CHUNK = 8192  # tokens of the vocabulary that one program looks at
_NUM_ENTRIES = 256
_NUM_ROWS = 128  # that one program settles
_ROOM = 16_384  # tokens of a row among which its threshold is sought, where they suffice
_STEPS, _POINTS = 8, 16  # at which a row is profiled; to which a range is narrowed at once
_FILTER_BLOCK = 1024  # for any number of rows: the order in which a row's mass is added up goes with it


class TritonLogitEditor(LogitEditor):
    """`LogitEditor` with its penalties in one kernel."""

    def _penalize(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See `LogitEditor._penalize`."""
        places, before = torch.empty_like(self.token_ids), torch.empty_like(self.counts)
        num_entries = len(self.token_ids)
        penalize_kernel[(triton.cdiv(num_entries, _NUM_ENTRIES),)](
            logits,
            self.penalized_rows,
            self.repetition,
            self.frequency,
            self.presence,
            self.owners,
            self.token_ids,
            self.counts,
            places,
            before,
            logits.stride(0),
            num_entries,
            BLOCK=_NUM_ENTRIES,
            enable_fp_fusion=False,
        )
        return places, before


class TritonSampler(Sampler):
    """`Sampler` on CUDA, which draws from logits of any float dtype; on a CPU under Triton's interpreter."""

    editor = TritonLogitEditor

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """See `Sampler.sample`."""
        assert logits.is_floating_point() and logits.stride(1) == 1, "logits are rows of floats"
        num_rows, vocab_size = logits.shape
        num_chunks = triton.cdiv(vocab_size, _CHUNK)
        new = partial(torch.empty, device=logits.device)
        largest, largest_ids = new((num_rows, num_chunks)), new((num_rows, num_chunks), dtype=torch.int32)
        tokens = new(num_rows, dtype=torch.int64)
        grid = num_rows, num_chunks
        max_kernel[grid](logits, largest, largest_ids, logits.stride(0), vocab_size, CHUNK=_CHUNK, BLOCK=_BLOCK)
        thresholds = _thresholds(logits, largest, batch) if batch.may_draw and batch.may_cut else None
        scores = new(grid) if batch.may_draw else None
        parameters = batch.temperature, batch.min_p, batch.seed, batch.choice, batch.position
        shape = logits.stride(0), vocab_size, num_chunks
        constants = {"NUM_CHUNKS": triton.next_power_of_2(num_chunks), "CHUNK": _CHUNK, "BLOCK": _BLOCK}
        if scores is not None:
            draw_kernel[grid](logits, largest, thresholds, *parameters, scores, *shape, **constants)
        choose_kernel[(num_rows,)](
            logits, largest, largest_ids, thresholds, *parameters, scores, tokens, *shape, **constants, num_warps=16
        )
        return tokens

    def settle(self, logits: Tensor, tokens: Tensor) -> None:
        """See `VocabularyPasses.settle`. In torch it is seven kernels, each for a few hundred numbers."""
        num_rows = len(tokens)
        grid = (triton.cdiv(num_rows, _NUM_ROWS),)
        settle_kernel[grid](logits, tokens, logits.stride(0), num_rows, BAD_LOGITS=BAD_LOGITS, BLOCK=_NUM_ROWS)

    def mask(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """See `VocabularyPasses.mask`."""
        assert bits.shape[1] * 32 >= logits.shape[1] and bits.stride(1) == 1, "a bit for every logit"
        mask_kernel[(len(rows), triton.cdiv(logits.shape[1], _BLOCK))](
            logits, rows, bits, logits.stride(0), bits.stride(0), logits.shape[1], BLOCK=_BLOCK
        )


def _thresholds(logits: Tensor, largest: Tensor, batch: SamplingBatch) -> Tensor:
    """The least order that top-k and top-p keep in each row, int32; largest: logits of chunks."""
    num_rows, num_chunks = grid = largest.shape
    new = partial(torch.empty, device=logits.device)
    counts, masses = new((*grid, _STEPS)), new((*grid, _STEPS), dtype=torch.float64)
    room, thresholds = new((num_rows, _ROOM)), new(num_rows, dtype=torch.int32)
    shape = logits.stride(0), logits.shape[1], num_chunks
    constants = {"NUM_CHUNKS": triton.next_power_of_2(num_chunks), "STEPS": _STEPS, "BLOCK": _FILTER_BLOCK}
    filters = batch.temperature, batch.top_p, batch.top_k
    profile_kernel[grid](
        logits, largest, *filters, batch.min_p, counts, masses, *shape, **constants, CHUNK=_CHUNK, num_warps=8
    )
    gather_kernel[grid](logits, largest, *filters, counts, masses, room, *shape, **constants, CHUNK=_CHUNK, ROOM=_ROOM)
    threshold_kernel[(num_rows,)](
        logits,
        largest,
        *filters,
        batch.min_p,
        counts,
        masses,
        room,
        thresholds,
        *shape,
        **constants,
        ROOM=_ROOM,
        POINTS=_POINTS,
        num_warps=16,
    )
    return thresholds
