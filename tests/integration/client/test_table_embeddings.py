"""`promptmill run --embed`: each row of a table with the embedding of its prompt. A real Redis, and a fake engine."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from producer.tables.select import open_table
from tests.fakes.command_line import Invoke
from tests.fakes.fake_embeddings import expected_vector
from tests.fakes.fake_tokenizer import FakeTokenizer
from tests.fakes.worker_runs import WorkerThread


def vector_of(text: str, dimensions: int | None = None) -> list[float]:
    return [float(number) for number in expected_vector(FakeTokenizer().encode(text), dimensions)]


def test_each_row_of_parquet_has_its_vector(promptmill: Invoke, worker_thread: WorkerThread, tmp_path: Path) -> None:
    source, target = tmp_path / "in.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table({"text": ["the mill", None, "a river"], "n": [1, 2, 3]}), source)
    asked = ("--prompt", "about {text}", "--embed", "--model", "fake", "--prefix", "e_")
    done = promptmill("run", source, target, *asked)
    assert done.exit_code == 1 and "2 answered, 1 failed" in done.stderr and "prompt tokens/s" in done.stderr
    table = pq.read_table(target)
    assert table.column_names == ["text", "n", "e_embedding", "e_error", "e_prompt_tokens"]
    first, null, last = table.to_pylist()
    assert first["e_embedding"] == vector_of("about the mill") and last["e_embedding"] == vector_of("about a river")
    assert first["e_prompt_tokens"] == len(FakeTokenizer().encode("about the mill")) and first["e_error"] is None
    assert null["e_embedding"] is None and null["e_error"].startswith("null_cell")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_vector_is_a_json_array_where_a_format_has_no_numbers(
    promptmill: Invoke, worker_thread: WorkerThread, tmp_path: Path, suffix: str
) -> None:
    source, target = tmp_path / "in.csv", tmp_path / f"out.{suffix}"
    source.write_text("text\nthe mill\na river\n")
    assert promptmill("run", source, target, "--prompt", "{text}", "--embed", "--dimensions", 3).exit_code == 0
    if suffix == "csv":
        found = [json.loads(row.cells["embedding"]) for row in open_table(target).rows()]
    else:
        found = [json.loads(line)["embedding"] for line in target.read_text().splitlines()]
    assert found == [pytest.approx(vector_of(text, 3), rel=2**-24) for text in ("the mill", "a river")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.csv", target.name]


def test_what_an_embedding_cannot_be_asked_for_is_refused(promptmill: Invoke, tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("text\nx\n")

    def refused(*flags: object) -> str:
        result = promptmill("run", source, target, "--prompt", "{text}", *flags)
        assert result.exit_code == 2 and not target.exists()
        return result.stderr

    assert "temperature: has no meaning with task 'embed'" in refused("--embed", "--temperature", 0)
    assert "leave out --raw and --system" in refused("--embed", "--system", "x")
    assert "leave out --raw and --system" in refused("--embed", "--raw")
    assert "add --embed" in refused("--dimensions", 3)
