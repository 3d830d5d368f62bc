"""How a model writes calls and thoughts, told from its chat template and its vocabulary.

Nothing in a model's folder says it outright; templates show it, as they write earlier calls back into the prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.tokenizer import Tokenizer
from worker.parsing.reasoning_parser import CLOSES, OPENS
from worker.parsing.tool_call_parser import HERMES, LLAMA, ToolCallFormat

ToolParserName = Literal["auto", "hermes", "llama", "none"]
ReasoningParserName = Literal["auto", "think", "none"]

_FORMATS = {HERMES.name: HERMES, LLAMA.name: LLAMA}
_NOT_JSON_IN_TAGS = ("<function=", "<arg_key>")  # what others than Hermes' kin write behind `<tool_call>`


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """`marker_tokens`: the markers that are tokens. These may be special and have no text: the engine shows them.
    `token_bytes`: what each token adds to the text that it gives, them included."""

    tool_calls: ToolCallFormat | None
    tool_parser: ToolParserName
    has_reasoning: bool
    marker_tokens: Mapping[str, int] = field(default_factory=dict)
    token_bytes: Mapping[int, bytes] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def select(
        cls,
        tokenizer: Tokenizer,
        templates: Sequence[str],
        *,
        tool_parser: ToolParserName = "auto",
        reasoning_parser: ReasoningParserName = "auto",
    ) -> "ModelFormat":
        """`templates`: the model's chat templates, those it has."""
        template = "\n".join(templates)
        tool_calls = _detect(tokenizer, template) if tool_parser == "auto" else _FORMATS.get(tool_parser)
        has_reasoning = reasoning_parser == "think" or (reasoning_parser == "auto" and _knows_thoughts(template))
        markers = [OPENS, CLOSES] if has_reasoning else []
        if tool_calls is not None:
            markers += [tool_calls.opens, *([tool_calls.closes] if tool_calls.closes else [])]
        ids = {marker: tokenizer.token_id(marker) for marker in markers}
        tokens = {marker: token_id for marker, token_id in ids.items() if token_id is not None}
        shown = tokenizer.token_bytes.showing(tuple(tokens.values()))
        return cls(tool_calls, tool_parser, has_reasoning, tokens, shown)


def _knows_thoughts(template: str) -> bool:
    """One that leaves earlier thoughts out may know the marker behind them alone (DeepSeek R1's first)."""
    return OPENS in template or CLOSES in template


def _detect(tokenizer: Tokenizer, template: str) -> ToolCallFormat | None:
    if HERMES.opens in template:
        is_json = HERMES.arguments_key in template and not any(tag in template for tag in _NOT_JSON_IN_TAGS)
        return HERMES if is_json else None
    knows_tag = tokenizer.token_id(LLAMA.opens) is not None
    writes_parameters = knows_tag and f'"{LLAMA.arguments_key}"' in template.replace("\\", "")
    return LLAMA if writes_parameters or LLAMA.opens in template else None
