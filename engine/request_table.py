"""The requests under way, and which of their sequences the child should be running.

Everything here happens on the supervisor's thread, except `reserve`. Knows neither the pipe nor the clock.

A request has failed ("poison") once the child worked on one and the same of its choices at three deaths in a row,
without a new token for that choice in between: what others got, of other requests or of its own (the embeddings of its
other inputs, say), proves nothing. One that only waited in the child is not to blame, unless the child died before it
worked on any. Its batch-mates must not fail with it: after its second such death a request is a suspect. A new child is
given the suspects first, one at a time, each when the suspected choices of the one before have got a token or have
ended, and everything else after them: a death while a suspect is on trial is its own.
"""

import logging
from collections import deque
from collections.abc import Iterator
from itertools import count

import numpy as np
from numpy.typing import NDArray

from engine.messages import AddSequence, Begun, StepOutput
from engine.outputs import ErrorKind
from engine.request import Choice, Ending, Request

MAX_DEATHS = 3  # in a row, without a new token for one and the same choice
_SUSPECT_DEATHS = 2

_log = logging.getLogger(__name__)


class RequestTable:
    """Requests by id, open choices by sequence id. What happens is delivered through each request's callback."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._open_choices: dict[int, Choice] = {}
        self._fresh_choices: dict[Choice, None] = {}  # of these, those with tokens to deliver, in their order
        self._reserved_ids: set[str] = set()
        self._sequence_ids = count()
        self._forgotten: list[int] = []
        self._suspects: deque[Request] = deque()
        self._others: deque[Request] = deque()  # that wait for a child, and for the suspects
        self._lone_suspect: Request | None = None
        self._has_child_begun = False  # to work on anything

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def is_child_busy(self) -> bool:
        """Whether the child knows a sequence, and so owes a message."""
        return any(request.is_running for request in self._requests.values())

    def reserve(self, request_id: str) -> bool:
        """Whether the id was free; it is taken until the request ends. Callers on several threads hold a lock."""
        if request_id in self._reserved_ids:
            return False
        self._reserved_ids.add(request_id)
        return True

    def add(self, request: Request) -> None:
        """Takes a request in and replays what its choices came with; those that are complete end here. The others wait
        for `start_more`."""
        self._requests[request.request_id] = request
        for choice in request.open_choices:
            choice.sequence_id = next(self._sequence_ids)
            self._open_choices[choice.sequence_id] = choice
        for choice in [choice for choice in request.open_choices if choice.to_replay]:
            if choice in request.open_choices:  # else the callback of a choice before it failed
                self._replay(choice)
        request.lead = request.open_choices[0] if request.open_choices else None
        self._others.append(request)

    def start_more(self) -> Iterator[AddSequence]:
        """What a child that is ready may be given now, and is at risk with from here on: the next suspect, once the one
        before has proved harmless or has ended; after the last one everything that waits, in order of arrival."""
        if self._is_on_trial:
            return
        self._lone_suspect = None
        while self._suspects:
            request = self._suspects.popleft()
            if request.open_choices:
                self._lone_suspect = request
                yield from _start(request)
                return
        while self._others:
            request = self._others.popleft()
            if request.open_choices:
                yield from _start(request)

    @property
    def _is_on_trial(self) -> bool:
        lone = self._lone_suspect
        return lone is not None and lone.num_deaths > 0

    def take_forgotten(self) -> list[int]:
        """The sequences that ended here while the child was running them."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def apply(self, step: StepOutput) -> None:
        """Hands every token to its choice; ends are delivered, and what goes on is with the next `deliver`.

        Tokens of a choice that ended while they were on their way are dropped.
        """
        for sequence_id, num_cached_tokens in step.cached_tokens.items():
            choice = self._open_choices.get(sequence_id)
            if choice is not None and not choice.had_begun:  # it may have tokens that its grammar forced
                choice.num_cached_tokens = num_cached_tokens
                if choice is choice.request.lead:
                    choice.request.num_cached_tokens = num_cached_tokens
        if step.prompt_logprobs is not None:
            for entry, sequence_id in enumerate(step.prompt_logprobs.rows.tolist()):
                if (choice := self._open_choices.get(sequence_id)) is not None:
                    choice.accept_prompt(step.prompt_logprobs, entry)
        logprobs = {} if step.logprobs is None else step.logprobs.entry_of_row()
        entries = zip(step.sequence_ids.tolist(), step.token_ids.tolist(), step.finish_codes.tolist(), strict=True)
        for row, (sequence_id, token_id, code) in enumerate(entries):
            if (choice := self._open_choices.get(sequence_id)) is not None:
                if logprobs and choice.request.params.max_tokens != 0:
                    choice.accept_logprob(token_id, step.logprobs, logprobs.get(row))
                self._accept(choice, token_id, code)
        for sequence_id, vector in step.embeddings.items():
            self._accept_embedding(sequence_id, vector)
        for sequence_id, error in step.errors.items():
            self._end_by_child(sequence_id, Ending("error", error, "refused"))
        for sequence_id, error in step.grammar_errors.items():
            self._end_by_child(sequence_id, Ending("error", error, "grammar"))

    @property
    def has_fresh(self) -> bool:
        """Whether there is something to deliver."""
        return bool(self._fresh_choices)

    def deliver(self) -> None:
        """Calls back with the new tokens of each choice that goes on."""
        for choice in list(self._fresh_choices):
            if choice in self._fresh_choices:  # else a callback before it failed, and ended its request
                self._deliver(choice, None)

    def note_begun(self, begun: Begun) -> None:
        """What the child works on from now on, and what it does not any more."""
        self._has_child_begun = True
        for sequence_ids, is_at_risk in ((begun.sequence_ids, True), (begun.waiting, False)):
            for sequence_id in sequence_ids:
                if (choice := self._open_choices.get(sequence_id)) is not None:
                    choice.is_at_risk = is_at_risk

    def abort(self, request_id: str) -> None:
        """Ends a request's open choices; an unknown id is passed over."""
        if request_id in self._requests:
            self._end_all(self._requests[request_id], Ending("cancelled"))

    def fail_all(self, error: str, kind: ErrorKind) -> None:
        for request in list(self._requests.values()):
            self._end_all(request, Ending("error", error, kind))

    def note_death(self, reason: str) -> None:
        """The child is gone: nothing runs, and what ran too often without a new token has failed."""
        poison = Ending(
            "error", f"the engine died {MAX_DEATHS} times in a row while this request ran: {reason}", "poison"
        )
        running = [request for request in self._requests.values() if request.is_running]
        choices = [choice for request in running for choice in request.open_choices]
        for choice in choices:
            choice.num_deaths += choice.is_at_risk or not self._has_child_begun
            choice.is_at_risk = False
        for request in running:
            request.is_running = False
            if request.num_deaths >= MAX_DEATHS:
                self._end_all(request, poison)
        self._lone_suspect, self._has_child_begun = None, False
        self._suspects = deque(r for r in self._requests.values() if r.num_deaths >= _SUSPECT_DEATHS)
        self._others = deque(r for r in self._requests.values() if r.num_deaths < _SUSPECT_DEATHS)
        self._forgotten.clear()

    def _accept(self, choice: Choice, token_id: int, code: int) -> None:
        choice.num_deaths = 0
        if choice.request.params.max_tokens == 0:  # its one token only says that the prompt is computed
            self._end_by_child(choice.sequence_id, Ending("length"))
            return
        reason = choice.accept(token_id, code)
        if reason is None:
            self._fresh_choices[choice] = None
            return
        self._close(choice, is_known_to_child=not code)
        self._deliver(choice, Ending(reason))

    def _accept_embedding(self, sequence_id: int, vector: NDArray[np.float32]) -> None:
        choice = self._open_choices.get(sequence_id)
        if choice is None or choice.request.pooling is None:
            return
        self._close(choice, is_known_to_child=False)
        embedding = choice.request.pooling.finish(vector)
        self._deliver(choice, Ending("stop"), embedding=embedding)

    def _replay(self, choice: Choice) -> None:
        reason = choice.replay()
        if reason is not None:
            self._close(choice, is_known_to_child=False)
        self._deliver(choice, Ending(reason) if reason else None, is_replay=True)

    def _end_by_child(self, sequence_id: int, ending: Ending) -> None:
        choice = self._open_choices.get(sequence_id)
        if choice is not None:
            self._close(choice, is_known_to_child=False)
            choice.release()
            self._deliver(choice, ending)

    def _end_all(self, request: Request, ending: Ending) -> None:
        while request.open_choices:
            choice = request.open_choices[0]
            self._close(choice, is_known_to_child=request.is_running)
            choice.release()
            self._deliver(choice, ending)

    def _close(self, choice: Choice, *, is_known_to_child: bool) -> None:
        request = choice.request
        del self._open_choices[choice.sequence_id]
        self._fresh_choices.pop(choice, None)
        request.open_choices.remove(choice)
        if is_known_to_child:
            self._forgotten.append(choice.sequence_id)
        if not request.open_choices:
            request.lead = None  # which refers to the request: a cycle would keep both, and the callback's job
            del self._requests[request.request_id]
            self._reserved_ids.discard(request.request_id)

    def _deliver(
        self,
        choice: Choice,
        ending: Ending | None,
        *,
        is_replay: bool = False,
        embedding: NDArray[np.float32] | None = None,
    ) -> None:
        """Calls back. A request whose callback fails is dropped: nobody listens to it any more."""
        self._fresh_choices.pop(choice, None)
        request = choice.request
        try:
            request.on_output(choice.output(ending, is_replay=is_replay, embedding=embedding))
        except BaseException:  # asyncio's CancelledError, a SystemExit: the thread serves the other requests, too
            _log.exception("action=output_callback_failed request_id=%s", request.request_id)
            while request.open_choices:
                self._close(request.open_choices[0], is_known_to_child=request.is_running)


def _start(request: Request) -> Iterator[AddSequence]:
    request.is_running = True
    for choice in request.open_choices:
        choice.had_begun = choice.has_begun
    yield from request.messages()
