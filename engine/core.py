"""The engine's core: sequences of token ids in, tokens out, one `step()` at a time.

Owns the order of a step: schedule, build and run, record. Runs in the child process, or in-process for tests. Knows
nothing of text, requests, pipes or time.

    add ─▶ Scheduler ─ StepPlan ─▶ StepExecutor (BatchBuilder ─▶ Runner) ─ StepResult ─▶ StepRecorder ─▶ StepOutput
              └────────────── SequenceSlots, KVCacheManager ──────────────────┘
"""

from collections.abc import Callable, Iterable
from typing import Any

from engine.config import EngineConfig
from engine.errors import InvalidRequestError
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.pending import PendingGrammars
from engine.grammar.trial import GrammarTrials
from engine.kv_cache.manager import KVCacheManager
from engine.messages import AddSequence, Begun, EngineInfo, EngineStats, StepOutput
from engine.prompt_lookup.draft_planner import DraftPlanner, create_drafter
from engine.runner.base import Runner
from engine.runner.slots import SequenceSlots
from engine.runner.step_executor import StepExecutor
from engine.scheduler import Scheduler
from engine.sequence import SequenceLimits, create_sequence
from engine.step_plan import StepPlan
from engine.step_recorder import StepRecorder
from engine.token_budget import TokenBudget


class EngineCore:
    """One model on one device. Not thread-safe: one thread adds, aborts and steps."""

    def __init__(
        self, config: EngineConfig, *, runner: Runner | None = None, tries_grammars_apart: bool = True
    ) -> None:
        """Load the model and allocate its cache; `runner` replaces both in tests. Raises `ModelLoadError`.

        `tries_grammars_apart`: in a process that may be lost, because strangers wrote them.
        """
        self._runner = runner or _model_runner(config)
        self.info: EngineInfo = self._runner.info
        self._limits = SequenceLimits(
            vocab_size=self.info.vocab_size,
            max_len=self.info.max_model_len,
            eos_token_ids=self.info.eos_token_ids,
            described=f"KV cache of {self.info.num_kv_blocks} blocks of {self.info.block_size} tokens, max_model_len "
            f"{config.max_model_len or 'as the model has it'}",
        )
        slots = SequenceSlots(
            max_num_seqs=config.max_num_seqs, max_len=self.info.max_model_len, block_size=self.info.block_size
        )
        self._slots = slots
        self._kv = KVCacheManager(slots, self.info.num_kv_blocks, prefix_caching=config.prefix_caching)
        max_num_tokens = self.info.step_tokens or config.step_tokens(self.info.device)
        budget = TokenBudget(max_num_tokens, self.info.few_prefill_tokens)
        self._scheduler = Scheduler(slots, self._kv, budget, looks_ahead=self.info.runs_ahead)
        self._executor = StepExecutor(self._runner, slots)
        self._recorder = StepRecorder(slots, self._kv, self._scheduler)
        has_lookup = config.prompt_lookup == "on" or (config.prompt_lookup == "auto" and self.info.is_batch_invariant)
        self._drafts = DraftPlanner(slots, self._kv, max_num_tokens=max_num_tokens) if has_lookup else None
        self._grammars = PendingGrammars(_compiler(self.info, tries_apart=tries_grammars_apart))
        self._num_steps = 0
        self._num_generated_tokens = 0
        self.announce: Callable[[Begun], None] = lambda begun: None  # hears who begins, before it does

    def add(self, message: AddSequence) -> None:
        """Take a sequence in, with or without output so far.

        Raises `ContextLengthError` if it can never fit, `InvalidRequestError` if it is malformed; nothing changes then.
        """
        if message.sequence_id in self._scheduler or message.sequence_id in self._grammars:
            raise InvalidRequestError(f"sequence {message.sequence_id} runs already", param="sequence_id")
        sequence = create_sequence(message, self._limits)
        sequence.drafter = create_drafter(sequence.params) if self._drafts is not None else None
        if sequence.params.grammar is not None and sequence.params.max_tokens != 0:
            self.announce(Begun([sequence.sequence_id]))
            self._grammars.add(sequence)
        else:
            self._scheduler.add(sequence)

    def abort(self, sequence_ids: Iterable[int]) -> None:
        """Forget these sequences at once; unknown ids are passed over, and none of them is heard of again."""
        for sequence_id in sequence_ids:
            if not self._grammars.remove(sequence_id):
                self._scheduler.abort(sequence_id)

    def has_work(self) -> bool:
        return bool(len(self._grammars)) or self._has_runnable

    @property
    def _has_runnable(self) -> bool:
        return bool(self._scheduler.num_running or self._scheduler.num_waiting)

    def step(self) -> StepOutput:
        """Compute one step and return its tokens; empty if there is no work. Blocks until the device is done.

        Raises `DeviceLostError` if the device is beyond help; the sequences are then to be resumed in a new process.
        """
        forced, ready = self._begin_constrained() if len(self._grammars) else (None, [])
        plan = self._scheduler.schedule()
        admitted = self._scheduler.take_begun()
        if admitted or ready:
            self.announce(Begun(admitted, tuple(sequence_id for sequence_id in ready if sequence_id not in admitted)))
        output = StepOutput.nothing() if plan is None else self._compute(plan)
        if forced is not None:
            output = forced.then(output)
        self._num_steps += plan is not None
        self._num_generated_tokens += len(output.token_ids)
        return output

    def _compute(self, plan: StepPlan) -> StepOutput:
        if self._drafts is None:
            return self._recorder.record(plan, self._executor.run(plan))
        plan = self._drafts.draft(plan)
        plan, result, accepted = self._drafts.settle(plan, self._executor.run(plan))
        output = self._recorder.record(plan, result)
        return output if accepted is None else accepted.then(output)

    def _begin_constrained(self) -> tuple[StepOutput, list[int]]:
        """Let the sequences run whose grammars are ready: what these force upon them at once, and who may run."""
        begun, ready = StepOutput.nothing(), []
        for prepared in self._grammars.take_done(waits=not self._has_runnable):
            sequence = prepared.sequence
            if prepared.error is not None:
                begun.grammar_errors[sequence.sequence_id] = prepared.error
                continue
            forced = sequence.extend(prepared.forced)
            begun = begun.then(forced)
            if not forced.finish_codes.any():
                self._scheduler.add(sequence)
                ready.append(sequence.sequence_id)
        return begun, ready

    def get_stats(self) -> EngineStats:
        pool, drafts = self._kv.pool, self._drafts
        return EngineStats(
            num_waiting=self._scheduler.num_waiting,
            num_running=self._scheduler.num_running,
            num_preemptions=self._scheduler.num_preemptions,
            num_steps=self._num_steps,
            num_prompt_tokens=self._recorder.num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            num_kv_blocks=pool.num_blocks,
            num_kv_blocks_used=pool.num_used,
            num_kv_blocks_free=pool.num_available,
            num_kv_blocks_cached=pool.num_idle,
            num_cached_tokens=self._recorder.num_cached_tokens,
            num_draft_tokens=drafts.num_drafted if drafts else 0,
            num_accepted_draft_tokens=drafts.num_accepted if drafts else 0,
        )

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless all books agree: slots, blocks, references, index, sequences."""
        self._scheduler.check_integrity()


def _compiler(info: EngineInfo, *, tries_apart: bool) -> GrammarCompiler:
    vocabulary: dict[str, Any] = {"vocab_size": info.vocab_size, "eos_token_ids": info.eos_token_ids}
    if not tries_apart:
        return GrammarCompiler(info.model_dir, **vocabulary)
    return GrammarCompiler(info.model_dir, **vocabulary, try_apart=GrammarTrials(info.model_dir, **vocabulary).check)


def _model_runner(config: EngineConfig) -> Runner:
    # Here, because it imports torch and transformers (seconds), which a fake runner has no need of.
    from engine.runner.model_runner import ModelRunner

    return ModelRunner(config)
