"""Turns what is to be embedded into token ids, and says how its vectors are made, as one model's folder has it.

A text gets the prompt that the folder names as its default, and the end token where the tokenizer's configuration asks
for one: the last token's hidden state depends on it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from engine.errors import InvalidRequestError
from engine.field_types import require
from engine.messages import EngineInfo
from engine.pooling import Pooling
from engine.prompt_reader import Prompt, PromptReader
from engine.tokenizer import Tokenizer


class EmbeddingReader:
    """Of one model. Thread-safe."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: EngineInfo,
        *,
        pooling: Pooling | InvalidRequestError,
        prefix: str = "",
        end_id: int | None = None,
    ) -> None:
        """`pooling`: or why the model is not served for embeddings. `end_id`: of the token that ends every text."""
        self._tokenizer = tokenizer
        self._info = info
        self._prompts = PromptReader(tokenizer, info, num_reserved=0)
        self._pooling = pooling
        self._prefix = prefix
        self._end_id = end_id

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer, info: EngineInfo) -> Self:
        """Never raises: what a folder lacks, or asks for in vain, shows when something is to be embedded."""
        try:
            pooling: Pooling | InvalidRequestError = Pooling.from_folder(folder)
        except InvalidRequestError as refusal:
            pooling = refusal
        sentences = _read(folder / "config_sentence_transformers.json")
        prompts, default = sentences.get("prompts"), sentences.get("default_prompt_name")
        prefix = prompts.get(default) if isinstance(prompts, dict) and isinstance(default, str) else None
        end = tokenizer.special_tokens.get("eos_token")
        adds_end = _read(folder / "tokenizer_config.json").get("add_eos_token") is True and end is not None
        return cls(
            tokenizer,
            info,
            pooling=pooling,
            prefix=prefix if isinstance(prefix, str) else "",
            end_id=tokenizer.token_id(end) if adds_end and end is not None else None,
        )

    def pooling(self, dimensions: int | None) -> Pooling:
        """How the vectors of one request are made. Raises `InvalidRequestError`: `task`, `dimensions`."""
        if isinstance(self._pooling, InvalidRequestError):
            raise InvalidRequestError(str(self._pooling), param=self._pooling.param)
        size = self._info.hidden_size
        is_number = type(dimensions) is int and 1 <= dimensions <= size
        require(dimensions is None or is_number, "dimensions", f"must lie in [1, {size}], or be left out", dimensions)
        return replace(self._pooling, dimensions=dimensions)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Raises `InvalidRequestError` for text that is not Unicode."""
        encoded = self._tokenizer.encode_batch([self._prefix + text for text in texts])
        return [self._ended(token_ids) for token_ids in encoded]

    def read_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids are taken as they are. Raises `InvalidRequestError` naming the place of the prompt at fault."""
        require(isinstance(prompts, list | tuple), "prompts", "must be a list of prompts", prompts)
        encoded = iter(self.encode([prompt for prompt in prompts if isinstance(prompt, str) and prompt]))
        return self.check_all([next(encoded) if isinstance(p, str) and p else p for p in prompts])

    def check_all(self, prompts: Sequence[object]) -> list[list[int]]:
        """Token ids of every prompt, as lists of their own."""
        return [self._prompts.check_at(place, prompt) for place, prompt in enumerate(prompts)]

    def _ended(self, token_ids: list[int]) -> list[int]:
        if self._end_id is None or token_ids[-1:] == [self._end_id]:
            return token_ids
        return [*token_ids, self._end_id]


def _read(path: Path) -> dict[str, Any]:
    """What is no JSON object counts for nothing: the tokenizer has read its own file before."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
