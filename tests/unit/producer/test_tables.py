"""Tables: what is read, and what is written beside the answers."""

import datetime
import json
import struct
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from producer.errors import BatchFileError
from producer.tables.base import EMBEDDED_FIELDS, GENERATED_FIELDS, RowAnswer
from producer.tables.select import is_table, open_table, select_writer

ANSWERS = [RowAnswer("one", "stop", None, 3, 4), RowAnswer(error="bad: no answer")]


def write_table(source: Path, target: Path, answers: list[RowAnswer] = ANSWERS, prefix: str = "") -> None:
    columns = {name: prefix + name for name in GENERATED_FIELDS}
    select_writer(target).write(target, open_table(source), iter(answers), columns)


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def csv_path(tmp_path: Path) -> Path:
    path = tmp_path / "in.csv"
    path.write_text('id,text\n007,"two\nlines, ""quoted"""\n\n8,zwölf\n', encoding="utf-8")
    return path


def test_cells_of_csv_are_text_as_it_stands(csv_path: Path) -> None:
    reader = open_table(csv_path)
    assert reader.columns == ("id", "text")
    rows = [(row.number, row.cells, row.problem) for row in reader.rows()]
    assert rows == [
        (1, {"id": "007", "text": 'two\nlines, "quoted"'}, None),
        (2, {"id": "8", "text": "zwölf"}, None),
    ]
    assert [row.cells for row in reader.rows(["text"])] == [{"text": 'two\nlines, "quoted"'}, {"text": "zwölf"}]


def test_csv_comes_back_as_it_was_with_new_columns(csv_path: Path, tmp_path: Path) -> None:
    write_table(csv_path, tmp_path / "out.csv", prefix="new_")
    assert (tmp_path / "out.csv").read_text() == (
        "id,text,new_response,new_finish_reason,new_error,new_prompt_tokens,new_completion_tokens\n"
        '007,"two\nlines, ""quoted""",one,stop,,3,4\n'
        "8,zwölf,,,bad: no answer,,\n"
    )


def test_vectors_are_numbers_in_every_format(csv_path: Path, tmp_path: Path) -> None:
    vector = [0.100000001, -2.0]  # as many digits as tell numbers of float32 apart
    columns = {name: name for name in EMBEDDED_FIELDS}
    for suffix in ("csv", "jsonl", "parquet"):
        answers = [RowAnswer(embedding=vector, prompt_tokens=3), RowAnswer(error="bad: no answer")]
        target = tmp_path / f"out.{suffix}"
        select_writer(target).write(target, open_table(csv_path), iter(answers), columns)
    assert (tmp_path / "out.csv").read_text().endswith('"[0.100000001, -2.0]",,3\n8,zwölf,,bad: no answer,\n')
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert (first["embedding"], second["embedding"]) == (vector, None)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32())
    assert table["embedding"].to_pylist() == [[struct.unpack("f", struct.pack("f", 0.1))[0], -2.0], None]


def test_rows_that_do_not_fit_the_header_say_so(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\n1\n1,2,3\n1,\xff\xfe\n1,2\n")
    reader = open_table(path)
    assert reader.columns == ("a", "b")
    assert [row.problem for row in reader.rows()] == [
        "invalid_row: the row has 1 cells, the header names 2",
        "invalid_row: the row has 3 cells, the header names 2",
        "invalid_row: column 'b' is not UTF-8",
        None,
    ]
    write_table(path, tmp_path / "out.csv", [RowAnswer(error="x")] * 4)
    assert (tmp_path / "out.csv").read_bytes().splitlines()[3] == b"1,\xff\xfe,,,x,,"
    for suffix in ("jsonl", "parquet"):
        write_table(path, tmp_path / f"out.{suffix}", [RowAnswer(error="x")] * 4)
    assert pq.read_table(tmp_path / "out.parquet")["b"].to_pylist() == [None, "2", "\ufffd\ufffd", "2"]


def test_a_cell_may_be_longer_than_the_librarys_own_limit(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text(f"text\n{'x' * 500_000}\n")
    [row] = open_table(path).rows()
    assert len(row.cells["text"]) == 500_000


def test_tabs_separate_the_cells_of_tsv(tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_text("a\tb\n1,5\t2\n3\t4\n")
    write_table(tmp_path / "in.tsv", tmp_path / "out.tsv")
    assert (tmp_path / "out.tsv").read_text().splitlines()[1] == "1,5\t2\tone\tstop\t\t3\t4"


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    day, nested = datetime.date(2026, 1, 2), pa.array([{"x": [1, 2]}, None])
    exact = pa.array([1, 2], pa.timestamp("ns", "UTC"))
    path = parquet(tmp_path / "in.parquet", text=["a", None], day=[day, day], nested=nested, exact=exact)
    write_table(path, tmp_path / "out.parquet")
    assert [str(row.cells["exact"]) for row in open_table(path).rows(["exact"])] == ["1970-01-01 00:00:00+00:00"] * 2
    out = pq.read_table(tmp_path / "out.parquet")
    assert out.select(["text", "day", "nested", "exact"]).equals(pq.read_table(path))
    assert out["response"].to_pylist() == ["one", None]
    assert out["completion_tokens"].to_pylist() == [4, None]
    assert out.schema.field("prompt_tokens").type == pa.int64()


def test_parquet_becomes_csv_and_json(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    columns = {"text": ["a", None], "day": [day, day], "raw": [b"ok", b"\xff"], "many": [[1.5, float("nan")], []]}
    path = parquet(tmp_path / "in.parquet", **columns)
    write_table(path, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes().splitlines()[1:] == [
        b'a,2026-01-02,ok,"[1.5, NaN]",one,stop,,3,4',
        b",2026-01-02,\xff,[],,,bad: no answer,,",
    ]
    write_table(path, tmp_path / "out.jsonl")
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first == {
        "text": "a",
        "day": "2026-01-02",
        "raw": "ok",
        "many": [1.5, None],
        "response": "one",
        "finish_reason": "stop",
        "error": None,
        "prompt_tokens": 3,
        "completion_tokens": 4,
    }
    assert second["raw"] == "\ufffd" and second["error"] == "bad: no answer"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_without_rows_stays_a_table(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "in.csv").write_text("a,b\n")
    empty = parquet(tmp_path / "in.parquet", a=pa.array([], pa.int32()), b=pa.array([], pa.string()))
    for source in (tmp_path / "in.csv", empty):
        target = tmp_path / f"out-{source.suffix[1:]}.{suffix}"
        write_table(source, target, [])
        assert open_table(target).columns[:3] == ("a", "b", "response")
        assert list(open_table(target).rows()) == []


def test_more_rows_than_a_piece_keep_their_order(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("n\n" + "".join(f"{number}\n" for number in range(2500)))
    answers = [RowAnswer(str(number)) for number in range(2500)]
    write_table(tmp_path / "in.csv", tmp_path / "mid.parquet", answers)
    rows = list(open_table(tmp_path / "mid.parquet").rows())
    assert [row.number for row in rows] == list(range(1, 2501))
    assert all(row.cells["n"] == row.cells["response"] == str(row.number - 1) for row in rows)


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    def refused(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BatchFileError, match=name) as error:
            open_table(tmp_path / name)
        return str(error.value)

    assert "has no header" in refused("empty.csv", b"")
    assert "not UTF-8" in refused("latin.csv", "größe\n1\n".encode("latin-1"))
    assert "several columns 'a'" in refused("twice.csv", b"a,b,a\n")
    assert "cannot be read as Parquet" in refused("text.parquet", b"a,b\n")
    assert "a table is a" in refused("table.xlsx", b"")
    with pytest.raises(BatchFileError, match="a table becomes a"):
        select_writer(tmp_path / "out.xlsx")
    assert is_table(Path("A.CSV")) and is_table(Path("a.pq")) and not is_table(Path("a.jsonl"))


def test_without_pyarrow_parquet_names_the_extra_and_csv_works(
    csv_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(BatchFileError, match=r"needs: pip install 'promptmill\[tables\]'"):
        open_table(tmp_path / "in.parquet")
    with pytest.raises(BatchFileError, match=r"needs: pip install 'promptmill\[tables\]'"):
        select_writer(tmp_path / "out.parquet")
    write_table(csv_path, tmp_path / "out.csv")
