"""Which format a file has: its suffix says so. Formats that need PyArrow are imported when they are used."""

from pathlib import Path

from producer.errors import BatchFileError
from producer.tables.base import TableReader, TableWriter
from producer.tables.csv_table import CsvReader, CsvWriter
from producer.tables.jsonl_writer import JsonLinesWriter

CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_SUFFIXES = (".parquet", ".pq")
JSONL_SUFFIXES = (".jsonl", ".ndjson")


def is_table(path: Path) -> bool:
    return path.suffix.lower() in (*CSV_DELIMITERS, *PARQUET_SUFFIXES)


def open_table(path: Path) -> TableReader:
    """Raises BatchFileError: another suffix, a file that cannot be read, columns of the same name."""
    suffix = path.suffix.lower()
    if suffix in CSV_DELIMITERS:
        reader: TableReader = CsvReader(path, CSV_DELIMITERS[suffix])
    elif suffix in PARQUET_SUFFIXES:
        _need_pyarrow(path)
        from producer.tables.parquet_table import ParquetReader

        reader = ParquetReader(path)
    else:
        raise BatchFileError(f"input {path}: a table is a .csv, .tsv or .parquet file")
    repeated = sorted({name for name in reader.columns if reader.columns.count(name) > 1})
    if repeated:
        raise BatchFileError(f"input {path} has several columns {repeated[0]!r}; rename them")
    return reader


def select_writer(path: Path) -> TableWriter:
    """Raises BatchFileError."""
    suffix = path.suffix.lower()
    if suffix in CSV_DELIMITERS:
        return CsvWriter(CSV_DELIMITERS[suffix])
    if suffix in JSONL_SUFFIXES:
        return JsonLinesWriter()
    if suffix in PARQUET_SUFFIXES:
        _need_pyarrow(path)
        from producer.tables.parquet_table import ParquetWriter

        return ParquetWriter()
    raise BatchFileError(f"output {path}: a table becomes a .csv, .tsv, .parquet or .jsonl file")


def _need_pyarrow(path: Path) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise BatchFileError(f"{path}: Parquet needs: pip install 'promptmill[tables]' ({error})") from error
