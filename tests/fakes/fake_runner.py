"""A runner without a model: its keys and values are hashes of whole prefixes, so that a wrong page gives a wrong token.

What a token's page holds depends on what the page before it holds, as in a model with layers. The next token depends on
the last page, the seed, the choice and the position, so that sharing, preemption or chunking done wrong shows in it.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engine.grammar.masks import RowMasks
from engine.messages import EngineInfo
from engine.runner.batch_inputs import BatchInputs
from engine.step_plan import BAD_LOGITS, SampledTokens

_PRIME = (1 << 61) - 1


class FakeRunner:
    """`poison_token` gives bad logits, `raising_token` raises, as soon as one is among the tokens of a step.

    `on_execute(inputs)` is called before each step and may raise.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_model_len: int = 128,
        vocab_size: int = 50,
        eos_token_ids: tuple[int, ...] = (),
        model_dir: str = "",
        few_prefill_tokens: int | None = None,
        poison_token: int | None = None,
        raising_token: int | None = None,
        on_execute: Callable[[BatchInputs], None] | None = None,
    ) -> None:
        self.info = EngineInfo(
            device="fake",
            dtype="int",
            attention="fake",
            max_model_len=min(max_model_len, num_blocks * block_size),
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            block_size=block_size,
            num_kv_blocks=num_blocks,
            fingerprint="fake",
            model_dir=model_dir,
            few_prefill_tokens=few_prefill_tokens,
        )
        self._pages = np.full(num_blocks * block_size, -1, np.int64)
        self._poison_token = poison_token
        self._raising_token = raising_token
        self._on_execute = on_execute

    def execute(self, inputs: BatchInputs) -> SampledTokens:
        return SampledTokens(self._admitted(inputs, self._forward(inputs)))

    def _forward(self, inputs: BatchInputs) -> NDArray[np.int64]:
        """Write the step's pages and draw a token for each sampled row, whatever its grammar admits."""
        if self._on_execute is not None:
            self._on_execute(inputs)
        if self._raising_token is not None and self._raising_token in inputs.input_ids:
            raise ValueError(f"token {self._raising_token} makes the model raise")
        for row in range(inputs.num_seqs):
            self._compute_row(inputs, row)
        return np.array([self._sample(inputs, i) for i in range(len(inputs.logits_indices))], np.int64)

    def _admitted(self, inputs: BatchInputs, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens that the rows' grammars admit, in place of those drawn. Mutates tokens."""
        if inputs.masks is not None:
            for masks in (inputs.masks.before_sampling(), inputs.masks.after_sampling(tokens.clip(0))):
                if masks is not None:
                    self._sample_admitted(tokens, masks)
        return tokens

    def _compute_row(self, inputs: BatchInputs, row: int) -> None:
        first, end = int(inputs.query_start[row]), int(inputs.query_start[row + 1])
        length = int(inputs.context_lens[row])
        assert inputs.position_ids[first:end].tolist() == list(range(length - (end - first), length))
        for token in range(first, end):
            position = int(inputs.position_ids[token])
            page = self._page(inputs, row, position)
            assert page == inputs.slot_mapping[token], "the slot mapping and the block table disagree"
            before = int(self._pages[self._page(inputs, row, position - 1)]) if position else 0
            self._pages[page] = prefix_hash(before, int(inputs.input_ids[token]), self._poison_token)

    def _page(self, inputs: BatchInputs, row: int, position: int) -> int:
        block_size = self.info.block_size
        return int(inputs.block_tables[row, position // block_size]) * block_size + position % block_size

    def _sample(self, inputs: BatchInputs, i: int) -> int:
        state = int(self._pages[inputs.slot_mapping[inputs.logits_indices[i]]])
        rows = inputs.sampling
        return sample(state, int(rows.seed[i]), int(rows.choice[i]), int(inputs.sampled_positions[i]), self.info)

    def _sample_admitted(self, tokens: NDArray[np.int64], masks: RowMasks) -> None:
        for row, bits in zip(masks.rows.tolist(), masks.bits, strict=True):
            admitted = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")[: self.info.vocab_size])
            if tokens[row] != BAD_LOGITS:
                tokens[row] = admitted[tokens[row] % len(admitted)]


def prefix_hash(before: int, token: int, poison_token: int | None = None) -> int:
    """What the page of a token holds; negative for ever after a poisonous one, as NaN would be."""
    if before < 0 or token == poison_token:
        return -1
    return (before * 1_000_003 + token + 1) % _PRIME


def sample(state: int, seed: int, choice: int, position: int, info: EngineInfo) -> int:
    if state < 0:
        return BAD_LOGITS
    return (state * 31 + seed * 17 + choice * 7 + position * 3) % _PRIME % info.vocab_size


def undisturbed_output(
    info: EngineInfo,
    prompt: list[int],
    *,
    max_tokens: int,
    seed: int = 0,
    choice: int = 0,
    stop_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """The output of a sequence that runs alone and in one go."""
    state = 0
    for token in prompt:
        state = prefix_hash(state, token)
    output: list[int] = []
    while len(output) < max_tokens and len(prompt) + len(output) < info.max_model_len:
        output.append(sample(state, seed, choice, len(prompt) + len(output), info))
        if output[-1] in stop_token_ids:
            break
        state = prefix_hash(state, output[-1])
    return output
