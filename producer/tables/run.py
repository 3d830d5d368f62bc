"""`TableRun` answers each row of a table with the code that answers a file of batch lines.

The rows become batch lines in an unnamed temporary file, whose digest identifies the requests. Answers are appended to
a journal beside the output, so that an interrupted run can be resumed. Once every row has an answer, the output is
written as a whole, in the input's order, and the journal is removed, unless it has errors: those rows can be retried.
"""

import hashlib
import itertools
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from producer.batch.files import BatchInput, BatchOutput, writing
from producer.batch.lines import encode_line
from producer.batch.protocol import BatchOptions
from producer.batch.run import BatchProgress, BatchRun
from producer.contract.embedding import decode_vector
from producer.errors import BatchFileError, InvalidJobError
from producer.openai.embeddings import EMBEDDINGS_URL, shortened
from producer.openai.request import CHAT_URL, COMPLETIONS_URL, request_from_body
from producer.settings import ProducerSettings
from producer.tables.base import EMBEDDED_FIELDS, GENERATED_FIELDS, NewColumns, Row, RowAnswer, TableReader
from producer.tables.prompt_template import NullCellError, PromptTemplate, UnusableRowError
from producer.tables.select import open_table, select_writer
from producer.whole_file import whole_file

JOURNAL_SUFFIX = ".journal"
_ROW_ID = "row-"  # + the row's number: the custom_id of its line


@dataclass(frozen=True, slots=True)
class TableOptions:
    """`fields`: each request's sampling parameters, or the fields of an embedding. `is_raw`: no chat template is
    applied. `embeds`: a row's answer is the embedding of its prompt. `prefix`: of the new columns' names."""

    prompt: str
    system: str | None = None
    is_raw: bool = False
    embeds: bool = False
    null_text: str | None = None
    prefix: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        if self.embeds:
            return EMBEDDINGS_URL
        return COMPLETIONS_URL if self.is_raw else CHAT_URL

    @property
    def new_columns(self) -> NewColumns:
        return {name: self.prefix + name for name in (EMBEDDED_FIELDS if self.embeds else GENERATED_FIELDS)}


class RowLines:
    """Turns rows into batch lines. Raises InvalidJobError for templates and parameters that are invalid for every row.

    Set by `write`: `num_unusable` is the number of rows without a line, `num_null` of them because of a null cell;
    `digest_without_null` is the digest of the lines without a null cell, which a run without `null_text` has.
    """

    def __init__(self, reader: TableReader, options: TableOptions) -> None:
        self._reader = reader
        self._options = options
        columns, null_text = reader.columns, options.null_text
        self._prompt = PromptTemplate(options.prompt, columns, flag="--prompt", null_text=null_text)
        system = options.system or ""
        self._system = PromptTemplate(system, columns, flag="--system", null_text=null_text)
        self.num_unusable = 0
        self.num_null = 0
        self._columns = tuple(dict.fromkeys((*self._prompt.columns, *self._system.columns)))
        request_from_body(options.url, self._body("a prompt", "a system message"), completion_max_tokens=None)

    def write(self, file: BinaryIO) -> None:
        """Write a line for each row that gives a prompt. Counts the rows that give none, and computes
        `digest_without_null`."""
        digest = hashlib.sha256()
        for row in self._reader.rows(self._columns):
            try:
                line = encode_line(self._line(row))
            except UnusableRowError as error:
                self.num_unusable += 1
                self.num_null += isinstance(error, NullCellError)
                continue
            file.write(line)
            if None not in row.cells.values():
                digest.update(line)
        self.digest_without_null = digest.hexdigest()

    def problems(self) -> Iterator[str | None]:
        """For each row, why it gives no prompt; None if it gives one."""
        for row in self._reader.rows(self._columns):
            try:
                self._line(row)
                yield None
            except UnusableRowError as error:
                yield str(error)

    def _line(self, row: Row) -> dict[str, Any]:
        if row.problem is not None:
            raise UnusableRowError(row.problem)
        prompt = self._prompt.render(row.cells)
        if not prompt:
            raise UnusableRowError("empty_prompt: the row gives an empty prompt")
        body = self._body(prompt, self._system.render(row.cells))
        return {"custom_id": f"{_ROW_ID}{row.number}", "method": "POST", "url": self._options.url, "body": body}

    def _body(self, prompt: str, system: str) -> dict[str, Any]:
        if self._options.embeds:
            return {"input": prompt, "encoding_format": "base64", **self._options.fields}
        if self._options.is_raw:
            return {"prompt": prompt, **self._options.fields}
        messages = [{"role": "user", "content": prompt}]
        if self._options.system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return {"messages": messages, **self._options.fields}


class TableRun:
    """One table in, one table out. Raises BatchFileError and InvalidJobError before anything is enqueued."""

    def __init__(
        self,
        settings: ProducerSettings,
        source: Path,
        target: Path,
        table_options: TableOptions,
        options: BatchOptions,
        on_progress: Callable[[BatchProgress], None],
        *,
        retries_failed: bool = False,
    ) -> None:
        """`retries_failed`: rows whose answer is an error are retried."""
        self._settings = settings
        self._source, self._target = source, target
        self._options = replace(options, completion_max_tokens=None)  # the flags decide, not OpenAI's default
        self._on_progress = on_progress
        self._retries_failed = retries_failed
        self._new_columns = table_options.new_columns
        self._journal = target.with_name(target.name + JOURNAL_SUFFIX)
        self._writer = select_writer(target)
        self._check_target()
        self._reader = open_table(source)
        self._check_columns()
        self._lines = RowLines(self._reader, table_options)

    def run(self) -> BatchProgress:
        """Answer every row that has no answer yet. A KeyboardInterrupt, or an error, leaves the journal as it is."""
        with self._batch() as batch:
            return batch.run(at_end=self._finish)

    def cancel(self) -> int:
        """Cancel the jobs that an earlier run left on the queues, and return how many. Enqueues nothing."""
        with self._batch() as batch:
            return batch.cancel()

    @contextmanager
    def _batch(self) -> Iterator[BatchRun]:
        with self._spooled() as spool:
            yield BatchRun(
                self._settings,
                BatchInput(self._source, spool),
                BatchOutput(self._journal, journal_of=self._target, drops_failed=self._retries_failed),
                self._options,
                self._on_progress,
                num_refused=self._lines.num_unusable,
                num_null=self._lines.num_null,
                earlier_digest=self._lines.digest_without_null,
            )

    @contextmanager
    def _spooled(self) -> Iterator[BinaryIO]:
        """The lines in a temporary file beside the output, where there must be room for as much anyway."""
        with writing(self._target), tempfile.TemporaryFile(dir=self._target.parent, prefix=".promptmill-") as spool:
            self._lines.write(spool)
            spool.flush()
            kept = os.fdopen(os.dup(spool.fileno()), "rb")
        with kept:
            yield kept

    def _finish(self, progress: BatchProgress) -> None:
        """Write the output, whole or not at all. Then remove the journal, unless some row can be retried, or asked with
        a text for null cells."""
        with writing(self._target):
            with whole_file(self._target) as partial, self._journal.open("rb") as journal:
                self._writer.write(partial, self._reader, self._answers(journal), self._new_columns)
            if not (progress.num_retryable or progress.num_null):
                self._journal.unlink()

    def _answers(self, journal: BinaryIO) -> Iterator[RowAnswer]:
        """One answer per row, in the table's order; the journal has them in the order of their arrival."""
        offsets = _offsets_by_row(journal)
        for number, problem in enumerate(self._lines.problems(), start=1):
            if problem is not None:
                yield RowAnswer(error=problem)
                continue
            journal.seek(offsets[number] - 1)
            yield _row_answer(json.loads(journal.readline()))

    def _check_target(self) -> None:
        if not self._target.exists():
            return
        if self._target.samefile(self._source):
            raise BatchFileError(f"output {self._target} is the input as well; name another file")
        if not self._journal.exists():
            done = ", with no failed row that could be asked again" if self._retries_failed else ""
            raise BatchFileError(f"output {self._target} exists already{done}; remove it, or name another file")

    def _check_columns(self) -> None:
        taken = sorted({*self._new_columns.values()} & set(self._reader.columns))
        if taken:
            rule = f"--prefix: the input has a column {taken[0]!r}; name a TEXT that goes before the new columns' names"
            raise InvalidJobError(rule, param="--prefix")


def _offsets_by_row(journal: BinaryIO) -> "array[int]":
    """For each row, the offset of its answer in the journal plus 1, or 0: 8 bytes a row."""
    offsets = array("Q", [0])
    offset = 0
    for raw in journal:
        custom_id = json.loads(raw).get("custom_id")
        if custom_id is not None:
            number = int(custom_id.removeprefix(_ROW_ID))
            offsets.extend(itertools.repeat(0, number + 1 - len(offsets)))
            offsets[number] = offset + 1
        offset += len(raw)
    return offsets


def _row_answer(line: Mapping[str, Any]) -> RowAnswer:
    if line["error"] is not None:
        return RowAnswer(error=f"{line['error']['code']}: {line['error']['message']}")
    body = line["response"]["body"]
    if line["response"]["status_code"] >= 400:
        return RowAnswer(error=f"{body['error']['code']}: {body['error']['message']}")
    usage = body["usage"]
    if "data" in body:
        vector = shortened(decode_vector(body["data"][0]["embedding"]))
        return RowAnswer(embedding=vector, prompt_tokens=usage["prompt_tokens"])
    choice = body["choices"][0]
    return RowAnswer(
        response=choice["text"] if "text" in choice else choice["message"]["content"],
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )
