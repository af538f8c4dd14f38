"""Data files: reads rows of records, or running text, depending on the file's suffix."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..io.strict_json import JSONRefused, parse_json
from .records import DataError, excerpt

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
"""Suffix -> delimiter of its columns."""
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
SUFFIXES = (*LINES, ".json", *TABLES, *TEXTS)


class Row(NamedTuple):
    """One record of a data file.

    place: the file and the line or record number, for messages.   value: the record as parsed, not yet checked.
    """

    place: str
    value: Any


def read_file(path: Path) -> list[Row] | str:
    """Return the rows of a file of records, or the text of a file of running text.

    The suffix, in any case, determines the format: .jsonl and .ndjson have one JSON value per line; .json has an array
    of values, or one value per line; .csv and .tsv have a header and one record per line; .txt, .text, .md, .markdown
    and .rst are running text. Files are UTF-8, with or without a byte order mark; line ends are LF, CRLF or CR.
    Raises DataError, naming the place, for any other suffix, for a folder, and for content of another format.
    """
    if path.is_dir():
        raise DataError(f"{path}: must be a file, got a folder")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: must end in one of {' '.join(SUFFIXES)}, got {path.suffix or 'no suffix'!r}; convert the data to "
            "JSON lines, or rename a text to .txt to train on it as running text"
        )
    text = _decode(path)
    if not text.strip():
        raise DataError(f"{path}: must hold text, got an empty file")
    if suffix in TEXTS:
        return text
    if suffix in TABLES:
        return list(_table_rows(path, text, TABLES[suffix]))
    if suffix == ".json" and not _is_one_value_a_line(text):
        return _array_rows(path, text)
    return list(_line_rows(path, text))


def _decode(path: Path) -> str:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#04x}") from error
    # Only these end a line. str.splitlines also splits at U+2028, U+2029 and U+0085, which may be inside a JSON string.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            yield Row(place, _parse(place, line))


def _is_one_value_a_line(text: str) -> bool:
    """Whether a .json file is JSON lines, which many programs write with that suffix."""
    first = text.lstrip().partition("\n")[0]
    if first.startswith("["):
        return False
    try:
        parse_json(first)
    except JSONRefused:
        return False
    return True


def _array_rows(path: Path, text: str) -> list[Row]:
    values = _parse(str(path), text)
    if not isinstance(values, list):
        raise DataError(f"{path}: must hold an array of records, or one record a line, got {excerpt(values)}")
    return [Row(f"{path}: record {number}", value) for number, value in enumerate(values, start=1)]


def _parse(place: str, text: str) -> Any:
    try:
        return parse_json(text)
    except JSONRefused as error:
        raise DataError(f"{place}: must be JSON, got {excerpt(text)} ({error})") from error


def _table_rows(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    """Yield one dict of strings for each row, with the header's names as keys."""
    limit = csv.field_size_limit(len(text) + 1)  # a limit of the whole process, 128 KiB by default
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(filter(None, rows))]
        names = [name for name in header if name]  # the name of the index that pandas writes is empty
        if len(set(names)) < len(names):
            raise DataError(f"{path}:{rows.line_num}: must begin with different names, got {excerpt(header)}")
        for cells in rows:
            place = f"{path}:{rows.line_num}"
            if not cells:
                continue  # an empty line
            if len(cells) != len(header):
                raise DataError(f"{place}: must hold {len(header)} cells, as the header does, got {len(cells)}")
            yield Row(place, {name: cell for name, cell in zip(header, cells, strict=True) if name})
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: must be cells with {delimiter!r} between ({error})") from error
    finally:
        csv.field_size_limit(limit)
