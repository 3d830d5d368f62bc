"""Has a grammar tried where it does no harm, before it is compiled where sequences run.

Owns the process that tries them (`engine.grammar.trial_process`), which is started with the first grammar and again if
it is lost. Knows nothing of what a grammar is.
"""

import os
import subprocess
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock

from engine.errors import EngineError, InvalidRequestError
from engine.grammar.trial_process import Verdict
from engine.grammar_spec import GrammarSpec
from engine.python_process import start_python

NUM_LANES = 2  # so that one heavy grammar does not hold up the others
MAX_WAIT_SECONDS = 60.0  # a trial's own limit is of CPU time; the machine may be busy
_MAX_START_SECONDS = 120.0


class GrammarTrials:
    """For one model's vocabulary. Thread-safe; more threads than lanes wait for each other."""

    def __init__(self, model_dir: str, *, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._arguments = [model_dir, str(vocab_size), ",".join(map(str, eos_token_ids))]
        self._lanes: SimpleQueue[int] = SimpleQueue()
        for lane in range(NUM_LANES):
            self._lanes.put(lane)
        self._lock = Lock()
        self._process: _TrialProcess | None = None

    def check(self, spec: GrammarSpec) -> int:
        """The bytes that compiling it takes.

        Raises `InvalidRequestError` with the reason if it is not to be had, `EngineError` if it could not be tried.
        """
        lane = self._lanes.get()
        try:
            reason, num_bytes = self._try(spec, lane)
        finally:
            self._lanes.put(lane)
        if reason is not None:
            raise InvalidRequestError(reason, param="grammar")
        return num_bytes

    def _try(self, spec: GrammarSpec, lane: int) -> Verdict:
        process = self._running()
        try:
            return process.ask(lane, spec)
        except (EOFError, OSError) as error:  # TimeoutError is an OSError
            with self._lock:
                if self._process is process:
                    self._process = None  # it ends once no other lane waits for it
            reason = str(error) or "the process that tries grammars ended"
            raise EngineError(f"the grammar ({spec.kind}) could not be tried, {reason}: send it again") from error

    def _running(self) -> "_TrialProcess":
        with self._lock:
            if self._process is None:
                self._process = _TrialProcess(self._arguments)
            return self._process


@dataclass(slots=True)
class _Lane:
    pipe: "Connection[GrammarSpec, Verdict]"
    is_new: bool = field(default=True)  # the process may still be reading the vocabulary


class _TrialProcess:
    def __init__(self, arguments: list[str]) -> None:
        ends = [Pipe() for _ in range(NUM_LANES)]
        fds = [theirs.fileno() for _, theirs in ends]
        process = start_python(
            "engine.grammar.trial_process",
            [*arguments, *fds],
            fds=fds,
            # It forks, and must have one thread alone.
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what the compiler says as it dies would look like ours
        )
        for _, theirs in ends:
            theirs.close()
        self._lanes = [_Lane(ours) for ours, _ in ends]
        weakref.finalize(self, _end, process, [ours for ours, _ in ends])

    def ask(self, lane: int, spec: GrammarSpec) -> Verdict:
        """Raises EOFError or OSError where no answer comes."""
        pipe = self._lanes[lane].pipe
        pipe.send(spec)
        seconds = MAX_WAIT_SECONDS + (_MAX_START_SECONDS if self._lanes[lane].is_new else 0.0)
        if not pipe.poll(seconds):
            raise TimeoutError(f"nothing was heard of it for {seconds:.0f} s")
        verdict = pipe.recv()
        self._lanes[lane].is_new = False
        return verdict


def _end(process: "subprocess.Popen[bytes]", pipes: "list[Connection[GrammarSpec, Verdict]]") -> None:
    for pipe in pipes:
        pipe.close()  # the other lanes' processes end by themselves
    with suppress(OSError):
        process.kill()
    process.wait()
