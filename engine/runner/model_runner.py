"""Runs steps on a device: the model, its KV cache and the sampler behind numpy arrays.

Owns the loaded model, the cache's size, and the only host-device sync of a step. Knows nothing of sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention.base import AttentionBatch
from engine.config import EngineConfig
from engine.errors import DeviceLostError, DeviceMemoryError
from engine.messages import EngineInfo
from engine.model.loader import LoadedModel, load_model
from engine.runner.batch_inputs import BatchInputs
from engine.runner.memory import choose_num_blocks, largest_step
from engine.runner.slots import SlotRows
from engine.runner.transfer import HostToDevice
from engine.sampler import SamplingBatch, create_sampler
from engine.step_plan import BAD_LOGITS


class ModelRunner:
    """`Runner` on torch."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and allocate its cache. Raises `ModelLoadError` with the remedy."""
        self._model: LoadedModel = load_model(config)
        self._to_device = HostToDevice(self._model.device)
        self._sampler = create_sampler(self._model.device, self._model.cache_dir)
        self._sampling_rows: SlotRows | None = None
        self._sampling_tensors: list[Tensor] = []
        num_blocks = choose_num_blocks(config, self._model, lambda: self._run_largest_step(config))
        self._model.allocate_kv_cache(num_blocks)
        self.info = self._describe(num_blocks)

    @torch.inference_mode()
    def execute(self, inputs: BatchInputs) -> NDArray[np.int64]:
        """See `Runner.execute`."""
        with _device_errors():
            tokens = self._forward(inputs)
            return tokens.cpu().numpy()  # the step's only host-device sync

    def _forward(self, inputs: BatchInputs) -> Tensor:
        """Sampled tokens int64 `[num_sampled]` on the device."""
        logits_indices = inputs.logits_indices
        num_sampled = len(logits_indices)
        if not num_sampled:  # a model gives at least one row of logits; nobody reads this one
            logits_indices = np.array([inputs.num_tokens - 1], np.int64)
        (
            input_ids,
            position_ids,
            slot_mapping,
            query_start,
            context_lens,
            block_tables,
            logits_rows,
            sampled_positions,
        ) = self._to_device.send(
            inputs.input_ids,
            inputs.position_ids,
            inputs.slot_mapping,
            inputs.query_start,
            inputs.context_lens,
            inputs.block_tables,
            logits_indices,
            inputs.sampled_positions,
        )
        self._model.context.batch = AttentionBatch(
            query_start=query_start,
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            num_seqs=inputs.num_seqs,
            num_tokens=inputs.num_tokens,
            max_query_len=inputs.max_query_len,
            max_context_len=inputs.max_context_len,
        )
        logits = self._model.forward(input_ids, position_ids, logits_rows)  # [num_sampled, vocab]
        if not num_sampled:
            return logits_rows[:0]
        return self._sample(logits, inputs.sampling, sampled_positions)

    def _sample(self, logits: Tensor, rows: SlotRows, positions: Tensor) -> Tensor:
        """One token a row; `BAD_LOGITS` where a hidden state or the chosen logit was NaN or infinite.

        A bad hidden state spoils its whole row of logits, so that one column tells, without a pass over them all.
        """
        is_sound = logits[:, 0] < float("inf")
        tokens = self._sampler.sample(logits, self._sampling_batch(rows, positions))
        is_sound &= logits.gather(1, tokens[:, None])[:, 0].isfinite()
        return torch.where(is_sound, tokens, BAD_LOGITS)

    def _sampling_batch(self, rows: SlotRows, positions: Tensor) -> SamplingBatch:
        """The rows' parameters on the device; they stay there for as long as the same rows decode."""
        if rows is not self._sampling_rows:
            self._sampling_rows = rows
            self._sampling_tensors = self._to_device.send(
                rows.temperature, rows.top_p, rows.top_k, rows.min_p, rows.seed, rows.choice
            )
        temperature, top_p, top_k, min_p, seed, choice = self._sampling_tensors
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            choice=choice,
            position=positions,
        )

    @torch.inference_mode()
    def _run_largest_step(self, config: EngineConfig) -> None:
        """Prefill `max_num_tokens` tokens and sample `max_num_seqs`, all of it in the cache's first block."""
        self._forward(largest_step(config, self._model.max_model_len))
        torch.cuda.synchronize(self._model.device)

    def _describe(self, num_blocks: int) -> EngineInfo:
        model = self._model
        return EngineInfo(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            attention=model.backend_name,
            max_model_len=min(model.max_model_len, num_blocks * model.block_size),
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            block_size=model.block_size,
            num_kv_blocks=num_blocks,
            fingerprint=model.fingerprint,
            model_dir=str(model.model_dir),
        )


@contextmanager
def _device_errors() -> Iterator[None]:
    """Turn what torch raises for a device's memory and health into the engine's own errors."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(str(error)) from None
    except torch.AcceleratorError as error:
        raise DeviceLostError(str(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU allocator has no class of its own
            raise
        raise DeviceMemoryError(str(error)) from None
