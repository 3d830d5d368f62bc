"""Tries grammars in a process that may be lost: each is compiled and followed for a while in a fork, within limits.

What a grammar costs cannot be seen from its size. llguidance's limits count only some of the work, so a schema of
100 bytes may compile for minutes, fill the memory, or end the process: rules nest as deep as their author likes, and
the compiler recurses. Here that costs a fork. Owns these limits; knows nothing of sequences or of who asks.
"""

import os
import random
import resource
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NoReturn

import numpy as np

from engine.errors import InvalidRequestError
from engine.field_types import shortened
from engine.grammar.budget import GrammarBudget
from engine.grammar.compiler import GrammarCompiler
from engine.grammar.masks import MaskFiller
from engine.grammar.matcher import GrammarMatcher
from engine.grammar_spec import GrammarSpec

MAX_CPU_SECONDS = 2  # the largest schemas that people write take half a second
MAX_MEMORY_BYTES = 256 << 20
_NUM_WALKS = 8
_MAX_WALK_TOKENS = 32
_MAX_WALK_SECONDS = 0.3  # for all of them; wide schemas take 50 ms
_MAX_WALK_DEBT_SECONDS = 0.05  # beyond what their tokens pay for; nearly all grammars have none
_NUM_FIRST = 8  # tokens of a vocabulary that are single characters as a rule, and one of them a quote
_MAX_STACK_BYTES = 1 << 20  # an eighth of what a thread has that compiles it in earnest
_NICENESS = 10  # steps come first

# What ends a fork, and what is to be done about it.
_ENDS: dict[int, str] = {
    signal.SIGXCPU: f"takes longer than {MAX_CPU_SECONDS} s to compile: make it smaller",
    signal.SIGABRT: f"takes more than {MAX_MEMORY_BYTES >> 20} MiB to compile: make it smaller",
    signal.SIGSEGV: "is nested too deeply, or too long a sequence, to compile: make it flatter",
}

Verdict = tuple[str | None, int]  # why the grammar is not to be had, and the bytes that its compilation took at most


def main() -> None:
    """A process of its own: the folder of the model, the size of its vocabulary, its ends of sequence, and pipes.

    Every pipe is served by a process of its own, so that one grammar does not wait for another.
    """
    folder, vocab_size, ends, *fds = sys.argv[1:]
    eos_token_ids = tuple(map(int, filter(None, ends.split(","))))
    compiler = GrammarCompiler(folder, vocab_size=int(vocab_size), eos_token_ids=eos_token_ids)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(InvalidRequestError):  # of which each trial is told
        compiler.compile(GrammarSpec("json_object"))  # the vocabulary, once for all forks
    pipes = [Connection(int(fd)) for fd in fds]
    while len(pipes) > 1 and os.fork():
        pipes.pop().close()
    for other in pipes[:-1]:
        other.close()
    _serve(pipes[-1], compiler)


def _serve(pipe: "Connection[Verdict, GrammarSpec]", compiler: GrammarCompiler) -> NoReturn:
    try:
        while True:
            pipe.send(try_apart(compiler, pipe.recv()))
    except (EOFError, OSError):  # nobody asks any more
        os._exit(0)


def try_apart(compiler: GrammarCompiler, spec: GrammarSpec) -> Verdict:
    """Try one grammar in a fork, and wait for its end. The process must have one thread alone."""
    reader, writer = os.pipe()
    own_bytes = _bytes_of("VmRSS")
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _limit()
        os.write(writer, _try(compiler, spec).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as words:
        reason = words.read().decode()
    _, status, usage = os.wait4(pid, 0)
    if (code := os.waitstatus_to_exitcode(status)) != 0:
        what = _ENDS.get(-code, f"does not compile: its compiler ended with exit code {code}")
        reason = f"the grammar ({spec.kind}) {what}"
    return reason or None, max(0, usage.ru_maxrss * 1024 - own_bytes)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_STACK, (_MAX_STACK_BYTES, _MAX_STACK_BYTES))
    if own_bytes := _bytes_of("VmSize"):
        most = own_bytes + MAX_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _bytes_of(name: str) -> int:
    """Of this process, as Linux tells it; 0 elsewhere."""
    try:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))
    except (OSError, StopIteration):
        return 0


def _try(compiler: GrammarCompiler, spec: GrammarSpec) -> str:
    """Why the grammar is not to be had; empty: it is."""
    try:
        return _walk(compiler, spec)
    except InvalidRequestError as error:
        return str(error)
    except BaseException as error:  # a panic in the compiler is no `Exception`
        return f"the grammar ({spec.kind}) does not compile: its compiler failed: {shortened(str(error))}"


def _walk(compiler: GrammarCompiler, spec: GrammarSpec) -> str:
    """Write some beginnings of sentences. Why it may not be followed where steps are run; empty: it may.

    Half of the tokens are any that the grammar admits, the others among the first of these, or strings would not end.
    """
    rng, masks, budget = random.Random(0), MaskFiller(compiler.vocab_size), GrammarBudget()
    began = time.thread_time()
    for _ in range(_NUM_WALKS):
        matcher = GrammarMatcher(compiler.compile(spec), compiler.eos_token_ids, budget=budget)
        matcher.start(())
        for _ in range(_MAX_WALK_TOKENS):
            bits = masks.fill([matcher])[0]
            if matcher.is_too_costly:
                return str(matcher.error)
            if budget.debt_seconds > _MAX_WALK_DEBT_SECONDS:
                return budget.reason
            if matcher.has_ended or time.thread_time() - began > _MAX_WALK_SECONDS:
                break
            admitted = np.unpackbits(bits.view(np.uint8), bitorder="little").nonzero()[0]
            admitted = admitted[~np.isin(admitted, compiler.eos_token_ids)]
            if not len(admitted):
                break
            num_choices = len(admitted) if rng.random() < 0.5 else min(len(admitted), _NUM_FIRST)
            matcher.accept(int(admitted[rng.randrange(num_choices)]))
    return ""
