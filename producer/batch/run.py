"""`BatchRun` answers a file of OpenAI Batch lines, each line once, however often it is interrupted and run again."""

import itertools
import json
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from producer.batch.files import BatchInput, BatchOutput
from producer.batch.lines import is_refused
from producer.batch.protocol import BatchOptions, BatchProtocol, FindQueue, cancel_jobs
from producer.contract import JobRequest, keys
from producer.enqueue import Destination, build_request
from producer.errors import BatchFileError
from producer.operations import Protocol
from producer.settings import ProducerSettings
from producer.transport import Transport, run_once
from producer.workers import ModelDirectory


@dataclass(slots=True)
class BatchProgress:
    """The progress of a run. Lines that an earlier run answered count as done (and as failed); its tokens do not
    count."""

    num_lines: int
    num_done: int
    num_failed: int
    num_refused: int = 0
    """Of those that failed: what would fail again, however often it is asked."""
    num_null: int = 0
    """Of those that were refused: rows of a table with a null cell, which a text could stand for."""
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    started_at: float = field(default_factory=time.monotonic)
    first_problem: str | None = None
    """Of this run: which line failed first, and why."""
    idle_queue: str | None = None
    """The queue that the lines wait on, where no live worker drained it when the run began."""

    @property
    def num_retryable(self) -> int:
        return self.num_failed - self.num_refused

    @property
    def speed(self) -> str:
        """Output tokens per second; prompt tokens if only embeddings were asked for."""
        is_generated = bool(self.num_output_tokens) or not self.num_prompt_tokens
        num_tokens, kind = (self.num_output_tokens, "") if is_generated else (self.num_prompt_tokens, "prompt ")
        return f"{num_tokens / max(time.monotonic() - self.started_at, 1e-9):.0f} {kind}tokens/s"


class BatchRun:
    """A run of one input file into one output file. Raises BatchFileError for a file that cannot be used.

    `num_refused`: rows of a table that gave no line of the input, `num_null` of them because of a null cell.
    `earlier_digest`: of an input that has a part of this one's lines, and whose answers count as well.
    """

    def __init__(
        self,
        settings: ProducerSettings,
        source: BatchInput,
        target: BatchOutput,
        options: BatchOptions,
        on_progress: Callable[[BatchProgress], None],
        *,
        num_refused: int = 0,
        num_null: int = 0,
        earlier_digest: str | None = None,
    ) -> None:
        self._settings = settings
        self._options = options
        self._on_progress = on_progress
        self._input = source
        self._output = target
        self._num_refused = num_refused
        self._num_null = num_null
        self._earlier_digest = earlier_digest

    @classmethod
    def of_files(
        cls,
        settings: ProducerSettings,
        source: Path,
        target: Path,
        options: BatchOptions,
        on_progress: Callable[[BatchProgress], None],
        *,
        retries_failed: bool = False,
    ) -> "BatchRun":
        """A run of a file of batch lines into a file of their answers.

        `retries_failed`: lines that an earlier run answered with an error are retried.
        """
        if target.exists() and target.samefile(source):
            raise BatchFileError(f"output {target} is the input as well; name another file")
        if target.exists() and not target.is_file():  # a pipe or a device cannot be resumed, and may have no end
            raise BatchFileError(
                f"output {target} is not a regular file, so a run could not continue from it; name a file"
            )
        output = BatchOutput(target, drops_failed=retries_failed)
        return cls(settings, BatchInput(source), output, options, on_progress)

    def run(self, at_end: Callable[[BatchProgress], None] = lambda progress: None) -> BatchProgress:
        """Answer every line that has no answer yet; one answer is on disk before the next is asked for.

        A KeyboardInterrupt or an error leaves the output intact and the enqueued jobs running. `at_end` is called once
        every line is answered, while the output is still locked.
        """
        with self._output.locked(), closing(self._input):
            self._input.scan()
            done = self._output.mend(self._batch_ids)
            refused = self._num_refused
            progress = BatchProgress(
                self._input.num_lines + refused,
                done.num_lines + refused,
                done.num_failed + refused,
                done.num_refused + refused,
                self._num_null,
            )
            find_queue = self._queue_finder(directory := ModelDirectory())
            protocol = BatchProtocol(
                self._input.lines_without(done), find_queue, batch_id=self._batch_ids[0], options=self._options
            )
            with closing(Transport(self._settings.redis_url, self._settings.s3_endpoint_url)) as transport:
                if progress.num_done < progress.num_lines:
                    progress.idle_queue = transport.run(self._find_idle_queue(find_queue, directory))
                self._on_progress(progress)
                self._answer(transport, protocol, progress)
            at_end(progress)
        return progress

    def cancel(self) -> int:
        """Cancel the jobs that an earlier run left on the queues, and return how many. Enqueues nothing."""
        with self._output.locked(), closing(self._input):
            self._input.scan()
            lines = self._input.lines_without(self._output.mend(self._batch_ids))
            return run_once(self._settings, cancel_jobs(lines, self._batch_ids[0]))

    def _queue_finder(self, directory: ModelDirectory) -> FindQueue:
        """Without a given priority class, use the low one if a live worker drains it: nobody waits for a single line of
        a file."""
        priority_class = self._options.priority_class
        destination = Destination.choose(self._settings.queue, None, priority_class)

        def find(request: JobRequest) -> Protocol[str]:
            queue = yield from destination.find(directory, request)
            low = keys.class_queue(queue, "low")
            is_low = priority_class is None and (yield from directory.is_drained(low, request.model))
            return low if is_low else queue

        return find

    def _find_idle_queue(self, find_queue: FindQueue, directory: ModelDirectory) -> Protocol[str | None]:
        """Raises InvalidJobError for an invalid tenant, or for a model, given for every line, that no live worker
        serves."""
        options = self._options
        queue = yield from find_queue(
            build_request({"prompt": "any", "model": options.model, "tenant": options.tenant})
        )
        return None if (yield from directory.is_drained(queue, None)) else queue

    @property
    def _batch_ids(self) -> list[str]:
        """The batch ids of what is asked, which include the model. The first is this run's own."""
        options = self._options
        replaced = json.dumps([options.model, options.tenant]) if options.model or options.tenant else ""
        digests = [self._input.digest, *([self._earlier_digest] if self._earlier_digest is not None else [])]
        return [f"{digest}:{options.run_id}{replaced}" for digest in digests]

    def _answer(self, transport: Transport, protocol: BatchProtocol, progress: BatchProgress) -> None:
        with closing(transport.iterate(protocol.run())) as rounds, self._output.opened() as write:
            for answer in itertools.chain.from_iterable(rounds):
                write(answer.line)
                progress.num_done += 1
                progress.num_failed += answer.is_failed
                progress.num_refused += is_refused(answer.line)
                progress.first_problem = progress.first_problem or answer.problem
                progress.num_output_tokens += answer.usage.completion_tokens
                progress.num_prompt_tokens += answer.usage.prompt_tokens
                self._on_progress(progress)
