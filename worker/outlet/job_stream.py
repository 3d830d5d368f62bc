"""The output of one attempt at one job, as stream entries. Knows the contract's entries; knows nothing of Redis.

Tokens are buffered until a flush encodes them, one entry per choice. An encoded entry never changes, so that it can be
sent again; the list is kept until the job is committed. An attempt that resumes begins with the entries that it found:
if Redis loses them (a fail-over), they are written again like its own.
"""

from engine.outputs import RequestOutput
from producer.contract import Choice, Done, EntryId, FinishReason, Marker, PromptEcho, Usage
from worker.errors import ReplayMismatchError
from worker.logprobs import LogprobWriter
from worker.outlet.choice_output import ChoiceOutput
from worker.outlet.stored_stream import Entry, StoredStream
from worker.parsing.parsed_text import ParsedText
from worker.scripts import EndCommit

MAX_ENTRIES_PER_APPEND = 1000  # bounds one script run when a whole stream is sent again


class JobStream:
    """Turns `RequestOutput`s into stream entries and, at the end, into the result's choices and usage."""

    def __init__(
        self,
        job_id: str,
        attempt: int,
        *,
        publish: bool,
        num_prompt_tokens: int = 0,
        num_choices: int = 1,
        stored: StoredStream | None = None,
        writer: LogprobWriter | None = None,
        prompt: PromptEcho | None = None,
    ) -> None:
        """`stored`: the entries of earlier attempts; this attempt continues after them, or only ends the stream.

        `writer`: for jobs that want log-probabilities. `prompt`: shown before the first choice's output.
        """
        self.job_id = job_id
        self.attempt = attempt
        self.publish = publish
        self.num_prompt_tokens = num_prompt_tokens
        self.refusal: str | None = None
        """Why Redis will never accept its entries: its key holds something else, for example."""
        self.commit: EndCommit | None = None
        """The commit that takes effect together with the done entry."""
        self.record_key: str | None = None
        """RQ's record of the job: a cancel there contests the done entry."""
        self.is_committed = False
        self._choices = [ChoiceOutput() for _ in range(num_choices)]
        self._writer = writer
        if self._choices:
            self._choices[0].prompt = prompt
        self._entries = list(stored.entries) if stored else []
        self._num_inherited = len(self._entries)
        self._num_stored = self._num_inherited
        self._num_sent = self._num_inherited
        self.num_cached_tokens = 0
        self._has_pending = False
        self._is_sealed = False
        if stored is not None:
            self._restore(stored)

    def add(self, output: RequestOutput, parsed: ParsedText | None = None) -> None:
        """Buffer what one choice was given; `parsed`: what its text is, where that is not content alone.

        Ignored once the stream is sealed: its outcome is decided. Of a replay nothing is buffered but an end that was
        not stored. Raises ReplayMismatchError if it disagrees with what is stored.
        """
        if self._is_sealed:
            return
        choice = self._choices[output.index]
        if output.is_replay:
            parsed = parsed or ParsedText(output.text, finish_reason=output.finish_reason)
            if not choice.agrees_with(output.token_ids, parsed):
                raise ReplayMismatchError(self.job_id, output.index)
            choice.num_reasoning_tokens = parsed.num_reasoning_tokens  # an older worker counted none
            choice.finish_reason = parsed.finish_reason or choice.finish_reason
        else:
            assert output.token_offset == len(choice.token_ids), "the engine left out or repeated tokens"
            choice.token_ids.extend(output.token_ids)
            if parsed is not None:
                choice.take(parsed)
            else:
                choice.take_content(output.text, output.finish_reason)
            if self._writer is not None:
                self._take_logprobs(choice, output, self._writer)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self._has_pending = self._has_pending or choice.is_pending

    def _take_logprobs(self, choice: ChoiceOutput, output: RequestOutput, writer: LogprobWriter) -> None:
        """Log-probabilities are kept with their tokens. A replay brings none: they are in the stored entries."""
        if output.logprobs is not None:
            choice.logprobs = choice.logprobs or []
            choice.logprobs += map(writer.write, output.logprobs)
        if output.prompt_logprobs is not None and choice.prompt is not None:
            choice.prompt = writer.with_logprobs(choice.prompt, output.prompt_logprobs)

    def mark(self, marker: Marker) -> None:
        """Make `marker` the attempt's first entry."""
        assert len(self._entries) == self._num_inherited, "an attempt has one marker, before everything else"
        self._append(marker.to_wire())

    def end_choices(self, reason: FinishReason) -> None:
        """End every choice that has not ended yet, with `reason`."""
        for choice in self._choices:
            if choice.finish_reason is None:
                choice.finish_reason = reason
                self._has_pending = True

    def seal(self, done: Done, commit: EndCommit | None = None, *, record_key: str | None = None) -> None:
        """Put the rest and `done` at the stream's end: nothing can follow. Flush until `is_stored`, then commit.

        A `commit` takes effect together with `done`, then `is_committed`. If RQ or other jobs have something to say of
        the job, nothing of either does: then the stream is no longer sealed. If Redis did not answer, `done` is sent
        again without it. `record_key`: RQ's record of the job, where a cancel there contests `done`.
        """
        assert not self._is_sealed, "a stream has one done entry"
        self.encode_pending()
        self._append(done.to_wire())
        self._is_sealed = True
        self.commit, self.record_key = commit, record_key

    def unseal(self) -> None:
        """Take a done entry back that is not stored, with its commit."""
        assert self._is_sealed and not self.is_stored, "what is stored decides"
        self._entries.pop()
        self._is_sealed = False
        self.commit = self.record_key = None

    def encode_pending(self) -> None:
        """Turn what is buffered into entries, one a choice."""
        if not self._has_pending:
            return
        for index, choice in enumerate(self._choices):
            if choice.is_pending:
                self._append(choice.encode(self.job_id, index))
        self._has_pending = False

    def unsent(self) -> tuple[str, list[str], bool]:
        """What to append next: the id it follows (empty: anything), the entries, and whether the last is `done`.

        Entries are flat: id, JSON, id, and so on. Their number is bounded; the rest is for the next call.
        """
        first = self._num_stored
        entries = self._entries[first : first + MAX_ENTRIES_PER_APPEND]
        self._num_sent = first + len(entries)
        expected = self._entries[first - 1].id if first else ""
        flat = [part for entry in entries for part in entry]
        return expected, flat, self._is_sealed and self._num_sent == len(self._entries)

    def acknowledge_sent(self) -> None:
        """What the last call of `unsent` returned is stored, and the commit has taken effect that went with it."""
        self._num_stored = self._num_sent
        self.is_committed = self.commit is not None and self.is_stored

    def acknowledge(self, stored: EntryId | None) -> bool:
        """Nothing was appended, because the stored stream ends with `stored`; what follows it is sent again.

        False: it ends with what is not ours to follow. A newer attempt has fenced this one out, or an older one has
        written behind what this one found.
        """
        place = self._place_of(stored)
        if place is None:
            return False
        self._num_stored = place
        return True

    def _place_of(self, stored: EntryId | None) -> int | None:
        """How many of the entries a stream has that ends with `stored`. Fewer than before: Redis lost the rest."""
        if stored is None:
            return 0
        for place in range(len(self._entries), 0, -1):
            if self._entries[place - 1].id == str(stored):
                return place
        starts_over = not self._num_inherited and stored.attempt < self.attempt
        return 0 if starts_over else None

    @property
    def has_unsent(self) -> bool:
        return self._has_pending or self._num_stored < len(self._entries)

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on behind the entries of an earlier attempt."""
        return self._num_inherited > 0

    @property
    def is_marked(self) -> bool:
        """Whether Redis has the attempt's marker."""
        return self._num_stored > self._num_inherited

    @property
    def has_stored_output(self) -> bool:
        """Whether Redis has anything of this attempt but its marker."""
        return self._num_stored > self._num_inherited + 1

    @property
    def is_sealed(self) -> bool:
        return self._is_sealed

    @property
    def is_stored(self) -> bool:
        """Whether Redis has everything, the done entry included: the job may be committed."""
        return self._is_sealed and self._num_stored == len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Of its entries."""
        return sum(len(entry.wire) for entry in self._entries)

    @property
    def num_unsent_bytes(self) -> int:
        """Roughly what the part that is not stored takes in memory."""
        encoded = sum(len(entry.wire) for entry in self._entries[self._num_stored :])
        pending = sum(choice.num_pending_bytes for choice in self._choices)
        return encoded + pending

    @property
    def num_output_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    @property
    def prompt(self) -> PromptEcho | None:
        return self._choices[0].prompt if self._choices else None

    def token_ids(self) -> list[list[int]]:
        """Each choice's tokens so far."""
        return [list(choice.token_ids) for choice in self._choices]

    @property
    def usage(self) -> Usage:
        num_output = self.num_output_tokens
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=num_output,
            total_tokens=self.num_prompt_tokens + num_output,
            cached_tokens=self.num_cached_tokens,
            reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self._choices),
        )

    def choices(self) -> list[Choice]:
        """The result's choices: exactly what joining the entries gives. Every choice must have ended."""
        return [choice.as_choice(index) for index, choice in enumerate(self._choices)]

    def _restore(self, stored: StoredStream) -> None:
        for chunk in stored.chunks:
            if 0 <= chunk.index < len(self._choices):
                self._choices[chunk.index].restore(chunk)
        if stored.done is not None:
            self.num_cached_tokens = stored.done.usage.cached_tokens
            self._is_sealed = True

    def _append(self, wire: str) -> None:
        seq = len(self._entries) - self._num_inherited
        self._entries.append(Entry(f"{self.attempt}-{seq}", wire))
