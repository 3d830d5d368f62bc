"""llguidance as the judge of the grammars of calls: which texts they take, and random sentences of theirs."""

import json
import random
from pathlib import Path
from typing import Any

import jsonschema

from engine.grammar.compiler import GrammarCompiler
from engine.tokenizer import Tokenizer
from producer.contract import FinishReason, JobRequest, join_deltas
from tests.fakes.chat_templates import LLAMA
from tests.fakes.tiny_tokenizers import END_TOKEN, byte_level_tokenizer
from worker.parsing.call_grammar import call_grammar
from worker.parsing.model_format import ModelFormat, ToolParserName
from worker.parsing.output_plan import OutputPlan
from worker.parsing.parsed_text import ParsedText

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>")


class Judge:
    """Walks texts through the grammar of a job."""

    def __init__(self, folder: Path, template: str, *, markers: str, prompt_end: str = "", **fields: Any) -> None:
        raw = byte_level_tokenizer()
        if markers != "spelt":
            (raw.add_special_tokens if markers == "special" else raw.add_tokens)(list(MARKERS))
        raw.save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer(raw)
        request = JobRequest.model_validate({"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, **fields})
        tool_parser: ToolParserName = "llama" if template == LLAMA else "auto"  # the tag may be missing here
        model_format = ModelFormat.select(self.tokenizer, [template], tool_parser=tool_parser)
        plan = OutputPlan.of_chat(request, prompt_end, model_format)
        assert plan is not None
        self.plan = plan
        spec = call_grammar(request, self.plan, model_format)
        assert spec is not None
        end_id = self.tokenizer.token_id(END_TOKEN)
        assert end_id is not None
        compiler = GrammarCompiler(str(folder), vocab_size=raw.get_vocab_size(), eos_token_ids=(end_id,))
        self.matcher = compiler.compile(spec)

    def accepts(self, *pieces: str) -> bool:
        """Whether the pieces joined are a sentence. A marker that lies in two is spelt out, though it be a token."""
        matcher = self.matcher.deep_copy()
        for token_id in [i for piece in pieces for i in self.tokenizer.encode(piece, add_special_tokens=False)]:
            if matcher.validate_tokens([token_id]) != 1:
                return False
            assert matcher.consume_token(token_id)
        return bool(matcher.is_accepting())

    def walk(self, choices: random.Random, start: str = "") -> tuple[str, bool]:
        """A random sentence of the grammar that begins with `start`; whether it came to an end."""
        shown = self.tokenizer.token_bytes.showing(self.plan.visible_token_ids)
        matcher, data = self.matcher.deep_copy(), start.encode()
        assert matcher.consume_tokens(self.tokenizer.encode(start, add_special_tokens=False))
        for _ in range(400):
            if matcher.is_stopped() or (matcher.is_accepting() and choices.random() < 0.5):
                return data.decode(errors="replace"), True
            end_ids = [self.tokenizer.token_id(END_TOKEN)] if matcher.is_accepting() else []
            allowed = [at for at, is_allowed in enumerate(matcher.compute_logit_bias()) if is_allowed]
            token_id = choices.choice([at for at in allowed if at not in end_ids])
            assert matcher.consume_token(token_id)
            data += shown[token_id]
        return data.decode(errors="replace"), False

    def read(self, text: str, finish_reason: FinishReason = "stop") -> ParsedText:
        """What the parser makes of it. Raises `jsonschema.ValidationError` for a call whose arguments are not valid."""
        parsed = self.plan.build_parser("job", 0).read(text, finish_reason)
        schemas = {"get_weather": SCHEMA, "now": {"maxProperties": 0}}
        for call in join_deltas(parsed.tool_calls) or ():
            jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])
        return parsed
