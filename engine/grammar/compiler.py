"""Compiles grammars, once each, whoever waits for them: specs to matchers at their beginning.

Owns llguidance's view of the vocabulary, which is made with the first grammar, what is kept of grammars, and
llguidance's own limits, which bound some of its work and not all: what comes from strangers is tried apart first
(`engine.grammar.trial`). Knows nothing of sequences.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import InvalidRequestError
from engine.field_types import shortened
from engine.grammar.budget import GrammarBudget
from engine.grammar.matcher import readable
from engine.grammar_spec import JSON_STYLE, GrammarSpec

if TYPE_CHECKING:  # imported with the first grammar: most workers never see one, and it takes half a second
    from llguidance import LLMatcher, LLTokenizer

_MAX_CACHED = 256  # grammars, and reasons why there is none
_MAX_CACHED_BYTES = 256 << 20  # of the compiled ones, as their trials took them; most take none that can be measured
_MAX_LEXER_STATES = 50_000  # at 1 to 2 kB each
# Of a mask, or of what is forced at once, which has some 6,000 lexemes then: more than MAX_FORCED_TOKENS. Masks of
# schemas with 2,000 alternatives in a row, which is llguidance's own limit, come to less than half of it.
_MAX_STEP_ITEMS = 10_000
# Tokens that any string takes that still has room for 16 characters: their mask is known at once. llguidance's own such
# slices are of 10 and 30 characters, and 99.7% of SmolLM2's tokens have at most 16: with 16 to 29 left under a
# `maxLength`, a mask takes 25 µs in place of 280.
_STRING_SLICE = r'[^"\\\x00-\x1F\x7F]{1,16}'


@dataclass(slots=True)
class CompiledGrammar:
    """`refusal`: why there is no matcher."""

    matcher: "LLMatcher | None" = None
    refusal: str | None = None
    num_bytes: int = 0
    budget: GrammarBudget = field(default_factory=GrammarBudget)  # of all that follow it

    def begin(self) -> "LLMatcher":
        """A matcher of one's own at the grammar's beginning. Raises `InvalidRequestError` with the reason."""
        refusal = self.budget.reason if self.budget.is_overdrawn else self.refusal
        if refusal is not None:
            raise InvalidRequestError(refusal, param="grammar")
        assert self.matcher is not None
        return self.matcher.deep_copy()


class GrammarCompiler:
    """For one model's vocabulary. Thread-safe."""

    def __init__(
        self,
        model_dir: str,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        try_apart: Callable[[GrammarSpec], int] = lambda spec: 0,
    ) -> None:
        """`try_apart` is asked before a grammar is compiled: the bytes it takes, or `InvalidRequestError`."""
        self._tokenizer_path = Path(model_dir) / "tokenizer.json"
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._try_apart = try_apart
        self._tokenizer: LLTokenizer | None = None
        self._tokenizer_lock = threading.Lock()
        self._grammars: OrderedDict[GrammarSpec, Future[CompiledGrammar]] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> "LLMatcher":
        """As `prepare`, on the calling thread, and begun."""
        return self.prepare(spec).result().begin()

    def prepare(self, spec: GrammarSpec, threads: Executor | None = None) -> Future[CompiledGrammar]:
        """Have a grammar compiled, on one of these threads or here, unless it is or somebody does: all share one.

        The future has an error where nobody knows whether the grammar is to be had; the next who asks has it tried
        again.
        """
        with self._lock:
            if (grammar := self._grammars.get(spec)) is not None:
                self._grammars.move_to_end(spec)
                return grammar
            grammar = self._grammars[spec] = Future()
        if threads is None:
            self._compile(spec, grammar)
        else:
            threads.submit(self._compile, spec, grammar)
        return grammar

    def _compile(self, spec: GrammarSpec, grammar: Future[CompiledGrammar]) -> None:
        try:
            num_bytes = self._try_apart(spec)
            compiled = CompiledGrammar(self._build(spec), num_bytes=num_bytes)
        except InvalidRequestError as error:
            compiled = CompiledGrammar(refusal=str(error))
        except BaseException as error:  # a panic in the compiler is no `Exception`; whoever waits is told
            with self._lock:
                del self._grammars[spec]
            grammar.set_exception(error)
            return
        grammar.set_result(compiled)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        with self._lock:
            sizes = {spec: g.result().num_bytes for spec, g in self._grammars.items() if g.done()}
            num_bytes = sum(sizes.values())
            while len(sizes) > _MAX_CACHED or num_bytes > _MAX_CACHED_BYTES:
                oldest = next(iter(sizes))
                num_bytes -= sizes.pop(oldest)
                del self._grammars[oldest]

    def _build(self, spec: GrammarSpec) -> "LLMatcher":
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_lexer_states=_MAX_LEXER_STATES, step_max_items=_MAX_STEP_ITEMS, verbose_errors=False
        )
        try:
            matcher = LLMatcher(self._vocabulary(), _source_of(spec), log_level=0, limits=limits)
            reason = matcher.get_error() if matcher.is_error() else None
        except ValueError as error:
            reason = str(error)
        if reason is not None:
            why = shortened(readable(reason))
            raise InvalidRequestError(f"the grammar ({spec.kind}) does not compile: {why}", param="grammar")
        # What is forced at the beginning, and the first mask: once, and not for every copy (20 ms for 2,000 optional
        # properties). Also, the lexer's states are counted from the first mask on, and they bound what a regex forces.
        matcher.compute_bitmask()
        return matcher

    def _vocabulary(self) -> "LLTokenizer":
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._read_vocabulary()
            return self._tokenizer

    def _read_vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        if not self.eos_token_ids:
            raise InvalidRequestError("the model has no end-of-sequence token, which a grammar needs", param="grammar")
        try:
            return LLTokenizer(
                self._tokenizer_path.read_text(encoding="utf-8"),
                n_vocab=self.vocab_size,
                eos_token=list(self.eos_token_ids),
                slices=[*LLTokenizer.general_slices(), _STRING_SLICE],
            )
        except (OSError, ValueError) as error:
            raise InvalidRequestError(
                f"grammars cannot be served with this model's tokenizer: {error}", param="grammar"
            ) from error


def _source_of(spec: GrammarSpec) -> str:
    """In llguidance's own format. Raises `ValueError`."""
    from llguidance import LLMatcher

    match spec.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(spec.source, defaults=JSON_STYLE)  # type: ignore[arg-type]
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, defaults=JSON_STYLE)  # type: ignore[arg-type]
        case "regex":
            return LLMatcher.grammar_from_regex(spec.source)
        case "choice":
            choices = [json.dumps(text) for text in json.loads(spec.source)]
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(choices)}")
        case "lark":
            return LLMatcher.grammar_from_lark(spec.source)
