"""Sequences that wait for their grammar: compiled, and their output so far replayed, beside the steps.

Knows nothing of what a grammar is, of what it may cost, or of who runs.
"""

from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from engine.errors import EngineError
from engine.field_types import shortened
from engine.grammar.compiler import CompiledGrammar, GrammarCompiler
from engine.grammar.matcher import GrammarMatcher
from engine.sequence import Sequence

_NUM_COMPILERS = 2  # so that one heavy grammar does not hold up the others
_WAIT_SECONDS = 0.05


@dataclass(slots=True, eq=False)
class PreparedSequence:
    """A sequence whose grammar is ready, or is not to be had."""

    sequence: Sequence
    forced: list[int]  # what must follow its tokens
    error: str | None = None


@dataclass(slots=True, eq=False)
class _Pending:
    sequence: Sequence
    prepared: Future[tuple[GrammarMatcher, list[int]]] = field(default_factory=Future)


class PendingGrammars:
    """Not thread-safe: one thread adds, removes and takes."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._compilers = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="grammar-compiler")
        self._beginner = ThreadPoolExecutor(1, thread_name_prefix="grammar-beginner")  # does not wait for a compiler
        self._pending: dict[int, _Pending] = {}  # by sequence id

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._pending

    def add(self, sequence: Sequence) -> None:
        pending = self._pending[sequence.sequence_id] = _Pending(sequence)
        assert sequence.params.grammar is not None
        compiled = self._compiler.prepare(sequence.params.grammar, self._compilers)
        # No thread waits for what another one compiles: the choices of one request would hold up all other grammars.
        compiled.add_done_callback(lambda compiled: self._beginner.submit(self._prepare, pending, compiled))

    def remove(self, sequence_id: int) -> bool:
        """Whether it was here."""
        pending = self._pending.pop(sequence_id, None)
        if pending is not None:
            pending.prepared.cancel()
        return pending is not None

    def take_done(self, *, waits: bool) -> list[PreparedSequence]:
        """Those that need to wait no longer, in order of arrival; `waits`: for a moment, if there is none yet."""
        if waits:
            wait([pending.prepared for pending in self._pending.values()], _WAIT_SECONDS, FIRST_COMPLETED)
        done = [result for pending in self._pending.values() if (result := self._result(pending)) is not None]
        for result in done:
            del self._pending[result.sequence.sequence_id]
        return done

    def _prepare(self, pending: _Pending, compiled: Future[CompiledGrammar]) -> None:
        if not pending.prepared.set_running_or_notify_cancel():
            return
        try:
            pending.prepared.set_result(self._begin(pending.sequence, compiled.result()))
        except BaseException as error:  # a panic in llguidance is no `Exception`, and costs this sequence alone
            pending.prepared.set_exception(error)

    def _begin(self, sequence: Sequence, grammar: CompiledGrammar) -> tuple[GrammarMatcher, list[int]]:
        matcher = GrammarMatcher(
            grammar.begin(),
            self._compiler.eos_token_ids,
            takes_forced=sequence.params.logprobs is None and sequence.params.prompt_logprobs is None,
            budget=grammar.budget,
        )
        return matcher, matcher.start(sequence.token_ids[sequence.num_prompt_tokens :].tolist())

    @staticmethod
    def _result(pending: _Pending) -> PreparedSequence | None:
        prepared = pending.prepared
        if not prepared.done():
            return None
        if (error := prepared.exception()) is not None:
            is_ours = isinstance(error, EngineError)
            reason = str(error) if is_ours else f"the grammar compiler failed: {shortened(str(error))}"
            return PreparedSequence(pending.sequence, [], reason)
        matcher, forced = prepared.result()
        pending.sequence.grammar = matcher
        return PreparedSequence(pending.sequence, forced, matcher.error)
