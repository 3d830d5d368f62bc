"""Turns a prompt, text or token ids, into the token ids of one model, and refuses what that model can never take."""

from collections.abc import Sequence
from typing import TypeAlias, TypeGuard

from engine.errors import ContextLengthError, InvalidRequestError
from engine.field_types import shown
from engine.messages import EngineInfo
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

NO_OUTPUT_LAYER = "the model's checkpoint has no output layer: it embeds, and cannot generate; serve one that has it"

Prompt: TypeAlias = str | Sequence[int]
"""Text, or token ids."""


class PromptReader:
    """Raises `InvalidRequestError` (`ContextLengthError`) with param `prompt`. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo, *, num_reserved: int = 1) -> None:
        """`num_reserved`: places of the context that a prompt must leave."""
        self.tokenizer = tokenizer
        self.info = info
        self._num_reserved = num_reserved

    def read(self, prompt: Prompt) -> list[int]:
        """Text gets the special tokens that the model wants around a plain text."""
        return self.check(self.tokenizer.encode(prompt) if is_text(prompt) else prompt)

    def read_all(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """As `read`, tokenizing on several threads; the error names the place of the prompt at fault."""
        if not isinstance(prompts, list | tuple):
            raise InvalidRequestError(f"prompts must be a list of prompts; got {shown(prompts)}", param="prompts")
        encoded = iter(self.tokenizer.encode_batch([prompt for prompt in prompts if is_text(prompt)]))
        return [
            self.check_at(place, next(encoded) if is_text(prompt) else prompt) for place, prompt in enumerate(prompts)
        ]

    def check(self, prompt: object) -> list[int]:
        """Token ids as a list of their own."""
        if isinstance(prompt, str | list | tuple) and not prompt:
            raise InvalidRequestError("prompt is empty: it must hold at least one token", param="prompt")
        if not isinstance(prompt, list | tuple) or not all(type(token_id) is int for token_id in prompt):
            raise InvalidRequestError(
                f"prompt must be text or a list of token ids; got {shown(prompt)}", param="prompt"
            )
        self._check_vocabulary(prompt, "prompt", "prompt")
        if len(prompt) + self._num_reserved > self.info.max_model_len:
            needed = " and the answer needs at least one of them" if self._num_reserved else ""
            holder, remedy = (
                ("KV cache", "num_kv_blocks") if self.info.is_bound_by_cache else ("context", "max_model_len")
            )
            raise ContextLengthError(
                f"prompt has {len(prompt)} tokens, but the {holder} holds {self.info.max_model_len}{needed}: "
                f"shorten the prompt or raise {remedy}",
                param="prompt",
            )
        return list(prompt)

    def check_params(self, params: SamplingParams) -> None:
        """Raises `InvalidRequestError` where a parameter names a token that the model does not have, or where it has
        no output layer."""
        if not self.info.can_generate:
            raise InvalidRequestError(NO_OUTPUT_LAYER, param="task")
        self._check_vocabulary([token_id for token_id, _ in params.logit_bias], "logit_bias", "logit_bias")
        for name in ("stop_token_ids", "visible_token_ids"):
            self._check_vocabulary(getattr(params, name), name, name)

    def check_output(self, output_token_ids: object, num_choices: int) -> list[list[int]]:
        """For each choice the tokens it already has, as lists of their own. Raises with param `output_token_ids`."""
        param = "output_token_ids"
        if not isinstance(output_token_ids, list | tuple):
            raise InvalidRequestError(
                f"{param} must be a list with the token ids of each choice; got {shown(output_token_ids)}", param=param
            )
        if len(output_token_ids) > num_choices:
            raise InvalidRequestError(
                f"{param} holds {len(output_token_ids)} lists, but n is {num_choices}: at most one for each choice",
                param=param,
            )
        for index, token_ids in enumerate(output_token_ids):
            if not isinstance(token_ids, list | tuple) or not all(type(token_id) is int for token_id in token_ids):
                raise InvalidRequestError(
                    f"{param}[{index}] must be a list of token ids; got {shown(token_ids)}", param=param
                )
            self._check_vocabulary(token_ids, f"{param}[{index}]", param)
        return [list(token_ids) for token_ids in output_token_ids]

    def _check_vocabulary(self, token_ids: Sequence[int], name: str, param: str) -> None:
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= self.info.vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < self.info.vocab_size)
            raise InvalidRequestError(
                f"{name} holds token id {shown(wrong)}, but the vocabulary ends at {self.info.vocab_size - 1}",
                param=param,
            )

    def check_at(self, place: int, prompt: object) -> list[int]:
        """As `check`, of one prompt of several."""
        try:
            return self.check(prompt)
        except InvalidRequestError as error:
            raise type(error)(f"prompts[{place}]: {error}", param=error.param) from None


def is_text(prompt: object) -> TypeGuard[str]:
    """Whether it is to be tokenised."""
    return isinstance(prompt, str) and prompt != ""
