"""Reads files that hold many documents: JSONL, Parquet and ArrayRecord."""

import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from kimi_jax.core.errors import DataError

_PARQUET_ROWS_AT_ONCE = 1024
_ARRAY_RECORDS_AT_ONCE = 1024


def decode_utf8(raw: bytes, where: str) -> str:
    """Returns the text of `raw`.

    Args:
      raw: UTF-8.
      where: file, or file and line, for the error.

    Raises:
      DataError: not valid UTF-8; the message has the line and the byte.
    """
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where} is not valid UTF-8: {error.reason}, byte 0x{raw[error.start]:02x} at offset "
            f"{error.start}, line {line}; convert it to UTF-8 or leave it out"
        ) from error


def read_jsonl(
    file: pathlib.Path, name: str, text_field: str, option: str
) -> Iterator[tuple[str, str]]:
    """Yields (name:line, text) of a file with one JSON object per line, plain or gzip.

    Raises:
      DataError: a line is malformed; the message has its number.
    """
    number = 0
    opener = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rb") as lines:
        try:
            for number, raw in enumerate(lines, start=1):  # noqa: B007 - the handler below reads it
                if raw.strip():
                    where = f"{file} line {number}"
                    yield f"{name}:{number}", _line_text(raw, text_field, where, option)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{file} is not a whole gzip file after line {number}: {error}") from (
                error
            )


def _line_text(raw: bytes, text_field: str, where: str, option: str) -> str:
    try:
        record = json.loads(decode_utf8(raw, where))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}; each line must be "
            "one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{where} is a JSON {type(record).__name__}; it must be an object")
    if text_field not in record:
        raise DataError(
            f"{where} has no field {text_field!r}, only {', '.join(map(repr, record)) or 'none'}; "
            f"set {option}.text_field"
        )
    return _checked_text(record[text_field], text_field, where, option)


def _checked_text(value: Any, text_field: str, where: str, option: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: field {text_field!r} is {type(value).__name__}, not a string; set "
            f"{option}.text_field"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {text_field!r} is not valid Unicode: {error.reason} at character "
            f"{error.start}"
        ) from error
    return value


def read_parquet(
    file: pathlib.Path, name: str, text_field: str, option: str
) -> Iterator[tuple[str, str]]:
    """Yields (name:row, text) of a Parquet file, rows counted from 1.

    Raises:
      DataError: the file is malformed, or the column is missing or not text.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise DataError(
                    f"{file} has no column {text_field!r}, only "
                    f"{', '.join(map(repr, names)) or 'none'}; set {option}.text_field"
                )
            for batch in table.iter_batches(_PARQUET_ROWS_AT_ONCE, columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    text = value.as_py()
                    where = f"{file} row {number}"
                    yield f"{name}:{number}", _checked_text(text, text_field, where, option)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise DataError(f"{file} is malformed after row {number}: {error}") from error


def read_array_record(file: pathlib.Path, name: str) -> Iterator[tuple[str, str]]:
    """Yields (name:record, text) of an ArrayRecord file, records counted from 1.

    Raises:
      DataError: the file is malformed, or a record is not UTF-8.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(file))
        num_records = reader.num_records()
        for start in range(0, num_records, _ARRAY_RECORDS_AT_ONCE):
            stop = min(start + _ARRAY_RECORDS_AT_ONCE, num_records)
            for number, raw in enumerate(reader.read(start, stop), start=start + 1):
                yield f"{name}:{number}", decode_utf8(raw, f"{file} record {number}")
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"{file} is not a readable ArrayRecord file: {error}") from error
