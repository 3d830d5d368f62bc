"""The sampler on a GPU through engine/kernels/triton: no sort, and nothing that the host waits for.

The same tokens as `engine.sampler.Sampler` draws for the same logits. Log-probabilities are torch's.
"""

from functools import partial

import torch
import triton
from torch import Tensor

from engine.kernels.triton.logits import mask_kernel, penalize_kernel
from engine.kernels.triton.sampling import choose_kernel, draw_kernel, filter_kernel, max_kernel
from engine.logit_editor import LogitEditor
from engine.sampler import Sampler, SamplingBatch

_BLOCK = 2048
_CHUNK = 8192  # tokens of the vocabulary that one program looks at
_NUM_ENTRIES = 256
_FILTER_BLOCK = 8192  # for any number of rows: the order in which a row's mass is added up goes with it


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
        )
        return places, before


class TritonSampler(Sampler):
    """`Sampler` for float32 logits on CUDA; on a CPU under Triton's interpreter."""

    editor = TritonLogitEditor

    def sample(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """See `Sampler.sample`."""
        assert logits.dtype == torch.float32 and logits.stride(1) == 1, "logits are float32 rows"
        num_rows, vocab_size = logits.shape
        num_chunks, stride = triton.cdiv(vocab_size, _CHUNK), logits.stride(0)
        new = partial(torch.empty, device=logits.device)
        largest, row_max = new((num_rows, num_chunks)), new(num_rows)
        scores, ids = (new((num_rows, num_chunks), dtype=dtype) for dtype in (torch.float64, torch.int32))
        thresholds = new(num_rows, dtype=torch.int32)
        greedy, tokens = (new(num_rows, dtype=torch.int64) for _ in range(2))
        padded_chunks = triton.next_power_of_2(num_chunks)
        max_kernel[(num_rows, num_chunks)](logits, largest, ids, stride, vocab_size, CHUNK=_CHUNK, BLOCK=_BLOCK)
        filter_kernel[(num_rows,)](
            logits,
            largest,
            ids,
            batch.temperature,
            batch.top_p,
            batch.top_k,
            batch.min_p,
            row_max,
            thresholds,
            greedy,
            stride,
            vocab_size,
            num_chunks,
            NUM_CHUNKS=padded_chunks,
            BLOCK=_FILTER_BLOCK,
            num_warps=16,
        )
        draw_kernel[(num_rows, num_chunks)](
            logits,
            row_max,
            thresholds,
            batch.temperature,
            batch.min_p,
            batch.seed,
            batch.choice,
            batch.position,
            scores,
            ids,
            stride,
            vocab_size,
            CHUNK=_CHUNK,
            BLOCK=_BLOCK,
        )
        choose_kernel[(num_rows,)](
            scores, ids, batch.temperature, greedy, tokens, vocab_size, num_chunks, NUM_CHUNKS=padded_chunks
        )
        return tokens

    def mask(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        """See `VocabularyPasses.mask`."""
        assert bits.shape[1] * 32 >= logits.shape[1] and bits.stride(1) == 1, "a bit for every logit"
        mask_kernel[(len(rows), triton.cdiv(logits.shape[1], _BLOCK))](
            logits, rows, bits, logits.stride(0), bits.stride(0), logits.shape[1], BLOCK=_BLOCK
        )
