"""A core without a model: it answers each prompt with the prompt, over and over, and fails as its folder's script says.
Of what is to be embedded it computes one prompt a step, and beside it one that takes several steps.

`model_path` is a folder with `tokenizer.json` and, maybe, `fake_core.json` (a `Script`). What must outlive the process,
the number of starts, deaths and embeddings so far, is counted in files of that folder.
"""

import json
import os
import signal
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.errors import DeviceMemoryError, InvalidRequestError, ModelLoadError
from engine.finish_rule import FinishRule
from engine.messages import AddSequence, Begun, EngineInfo, EngineStats, StepOutput
from tests.fakes.fake_embeddings import HIDDEN_SIZE, hidden_state
from tests.fakes.tiny_tokenizers import write_tokenizer

CORE_PATH = "tests.fakes.fake_core:FakeCore"
VOCAB_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class Script:
    """What goes wrong. A token id stands for: as soon as a step holds a sequence whose prompt begins with it."""

    refused_start: int | None = None  # this start (from 1) and later ones raise ModelLoadError
    short_start: int | None = None  # this start alone raises DeviceMemoryError
    crashed_start: int | None = None  # this start and later ones end the process with code 3
    hung_start: int | None = None  # this start and later ones never come back
    fingerprint_by_start: bool = False
    killed_by: int | None = None  # the process is killed
    killed_at: int = 0  # output tokens of that sequence before it happens, or steps where it is to be embedded
    max_deaths: int = 1_000_000  # by `killed_by`
    hung_by: int | None = None  # a step never comes back, once
    stopped_by: int | None = None  # the process stops in the middle of a message, once
    broken_by: int | None = None  # a step raises
    refused: int | None = None  # add raises
    step_seconds: float = 0.0
    max_model_len: int = 100_000
    tokens_per_step: int = 1


def write_fake_model(folder: Path, **script: Any) -> str:
    """The `model_path` of a fake core that behaves as the fields of `Script` say."""
    (write_tokenizer(folder) / "fake_core.json").write_text(json.dumps(asdict(Script(**script))))
    return str(folder)


class FakeCore:
    """The interface of `engine.core.EngineCore`. Choice c of a prompt begins its echo c tokens later."""

    def __init__(self, config: EngineConfig) -> None:
        self._folder = Path(config.model_path)
        self._script = Script(**json.loads((self._folder / "fake_core.json").read_text()))
        self._sequences: dict[int, AddSequence] = {}
        self._new: list[int] = []
        self._begun: set[int] = set()
        self._num_steps_of: Counter[int] = Counter()  # that is to be embedded and kills, by sequence
        self.announce: Callable[[Begun], None] = lambda begun: None
        self._num_steps = 0
        start = self._count("starts")
        self._fail_to_start(start)
        self.info = EngineInfo(
            model_dir=config.model_path,
            device="cpu",
            dtype="float32",
            attention="none",
            max_model_len=self._script.max_model_len,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(1,),
            block_size=16,
            num_kv_blocks=1000,
            fingerprint=f"fake {start if self._script.fingerprint_by_start else ''}",
            hidden_size=HIDDEN_SIZE,
        )

    def add(self, message: AddSequence) -> None:
        if message.prompt_token_ids[0] == self._script.refused:
            raise InvalidRequestError("this prompt is refused", param="prompt")
        self._sequences[message.sequence_id] = message
        self._new.append(message.sequence_id)

    def abort(self, sequence_ids: list[int]) -> None:
        for sequence_id in sequence_ids:
            self._sequences.pop(sequence_id, None)

    def has_work(self) -> bool:
        return bool(self._sequences)

    def step(self) -> StepOutput:
        time.sleep(self._script.step_seconds)
        held = self._next_held()
        self._announce_new(held)
        self._misbehave(held)
        self._num_steps += 1
        to_embed = [message for message in held if message.pooling is not None and not self._goes_on(message)]
        embeddings = {message.sequence_id: self._embed(message) for message in to_embed}
        entries = [entry for message in held if message.pooling is None for entry in self._echo(message)]
        new, self._new = self._new, []
        return StepOutput(
            np.array([entry[0] for entry in entries], np.int64),
            np.array([entry[1] for entry in entries], np.int32),
            np.array([entry[2] for entry in entries], np.int8),
            cached_tokens=dict.fromkeys(new, 1),
            embeddings=embeddings,
        )

    def _next_held(self) -> list[AddSequence]:
        """The sequences of the next step."""
        everything = list(self._sequences.values())
        to_embed = [message for message in everything if message.pooling is not None]
        rest = [message for message in to_embed if not self._goes_on(message)]
        long = [message for message in to_embed if self._goes_on(message)]
        self._num_steps_of.update(message.sequence_id for message in long)
        return [message for message in everything if message.pooling is None] + long + rest[:1]

    def _goes_on(self, message: AddSequence) -> bool:
        """Whether it is not computed within its next step; then others are beside it."""
        is_long = message.pooling is not None and message.prompt_token_ids[0] == self._script.killed_by
        return is_long and self._num_steps_of[message.sequence_id] < self._script.killed_at

    def _embed(self, message: AddSequence) -> NDArray[np.float32]:
        self._count("embeddings")
        del self._sequences[message.sequence_id]
        return hidden_state(message.prompt_token_ids)

    def _announce_new(self, held: list[AddSequence]) -> None:
        begun = [message.sequence_id for message in held if message.sequence_id not in self._begun]
        self._begun.update(begun)
        if begun:
            self.announce(Begun(begun))

    def get_stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=0,
            num_running=len(self._sequences),
            num_preemptions=0,
            num_steps=self._num_steps,
            num_prompt_tokens=0,
            num_generated_tokens=0,
            num_kv_blocks=1000,
            num_kv_blocks_used=len(self._sequences),
            num_kv_blocks_free=1000 - len(self._sequences),
        )

    def _echo(self, message: AddSequence) -> list[tuple[int, int, int]]:
        entries: list[tuple[int, int, int]] = []
        output = message.output_token_ids
        rule = FinishRule.of(
            message.params,
            len(message.prompt_token_ids),
            max_len=self.info.max_model_len,
            eos_token_ids=self.info.eos_token_ids,
        )
        for _ in range(self._script.tokens_per_step):
            token_id = message.prompt_token_ids[(len(output) + message.choice_index) % len(message.prompt_token_ids)]
            output.append(token_id)
            code = rule.code(token_id, len(message.prompt_token_ids) + len(output))
            entries.append((message.sequence_id, token_id, code))
            if code:
                del self._sequences[message.sequence_id]
                break
        return entries

    def _misbehave(self, held: list[AddSequence]) -> None:
        for message in held:
            trigger = message.prompt_token_ids[0]
            num_done = len(message.output_token_ids) + self._num_steps_of[message.sequence_id]
            is_due = num_done >= self._script.killed_at
            if trigger == self._script.killed_by and is_due and self._count("deaths") <= self._script.max_deaths:
                self._die()
            if trigger == self._script.hung_by and self._count("hangs") == 1:
                threading.Event().wait()
            if trigger == self._script.stopped_by and is_due and self._count("stops") == 1:
                self._stop_in_a_message()
            if trigger == self._script.broken_by:
                raise RuntimeError("the device is broken")

    def _die(self) -> None:
        if threading.current_thread() is not threading.main_thread():  # of a process that is not its own
            raise RuntimeError("died")
        print("about to be killed", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def _stop_in_a_message(self) -> None:
        os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"half of it")
        os.kill(os.getpid(), signal.SIGSTOP)

    def _fail_to_start(self, start: int) -> None:
        script = self._script
        if script.refused_start is not None and start >= script.refused_start:
            raise ModelLoadError("the folder holds no weights: fetch the model again")
        if start == script.short_start:
            raise DeviceMemoryError("out of memory")
        if script.crashed_start is not None and start >= script.crashed_start:
            print("cannot open the device", file=sys.stderr, flush=True)
            os._exit(3)
        if script.hung_start is not None and start >= script.hung_start:
            threading.Event().wait()

    def _count(self, name: str) -> int:
        """How often this has happened in this folder, now included."""
        with (self._folder / name).open("ab") as file:
            file.write(b".")
            return file.tell()
