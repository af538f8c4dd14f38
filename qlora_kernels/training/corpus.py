"""A corpus: records for training, and held-out records of the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .data_files import Row, read_file
from .dataset_rows import is_dataset, read_dataset
from .records import DataError, Plain, Record, parse_record, unused_keys


@dataclass(frozen=True)
class Corpus:
    """Records for training, and held-out (unseen) records of the same kind.

    source: for messages.   unused: keys of the rows that are not used.
    """

    source: str
    train: tuple[Record, ...]
    unseen: tuple[Record, ...]
    unused: tuple[str, ...] = ()


def read_corpus(path: Path, unseen_fraction: float) -> Corpus:
    """Read the records of a data file (`data_files.read_file`), and hold out a part of them.

    A row has {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content", ...}, ...], "tools"}.
    unseen_fraction: in [0, 1). Of records, this fraction, spread evenly over the file, and at least one is held out; of
    a text, its end, cut at a paragraph or a space. 0 holds out nothing.
    Raises DataError, with the row's place, for any other row; and if one of the two parts would be empty.
    """
    content = read_file(path)
    if isinstance(content, str):
        return _split_text(str(path), content, unseen_fraction)
    return corpus_of_rows(str(path), content, unseen_fraction)


def read_data(data: str, unseen_fraction: float, split: str | None = None) -> Corpus:
    """Read the corpus at a path or of a name, by `datasets` if `read_corpus` does not support it.

    data, split: as in `dataset_rows.read_dataset`.   unseen_fraction: as in `read_corpus`.
    Raises DataError; ModuleNotFoundError if `datasets` is needed and not installed.
    """
    if is_dataset(data):
        return corpus_of_rows(data, read_dataset(data, split), unseen_fraction)
    if split is not None:
        raise DataError(f"{data}: must be a dataset with splits for --split {split}, got one file; leave --split out")
    return read_corpus(Path(data), unseen_fraction)


def corpus_of_rows(source: str, rows: Iterable[Row], unseen_fraction: float) -> Corpus:
    """Return the corpus of rows from any source, each with its place for messages.   source: name of the corpus."""
    records: list[Record] = []
    unused: set[str] = set()
    for row in rows:
        records.append(parse_record(row.place, row.value))
        unused |= unused_keys(row.value)
    return _split_records(source, records, unseen_fraction, sorted(unused))


def language_reference() -> Corpus:
    """Return Python's language reference, which is part of Python; every eighth topic, by name, is held out."""
    from pydoc_data.topics import topics

    texts = [topics[name].strip() for name in sorted(topics)]
    return _split_records("builtin", [Plain(text) for text in texts if text], 1 / 8)


def _split_text(source: str, text: str, unseen_fraction: float) -> Corpus:
    if unseen_fraction == 0:
        return Corpus(source, (Plain(text.strip(), place=source),), ())
    wanted = round(len(text) * (1 - unseen_fraction))
    paragraph = text.rfind("\n\n", wanted // 2, wanted)
    cut = paragraph if paragraph > 0 else max(text.rfind(space, 0, wanted) for space in " \n")
    train, unseen = text[: max(cut, 0)].strip(), text[max(cut, 0) :].strip()
    if not train or not unseen:
        raise DataError(f"{source}: must be long enough to keep a part unseen, got {len(text)} characters")
    return Corpus(source, (Plain(train, place=source),), (Plain(unseen, place=source),))


def _split_records(
    source: str, records: Sequence[Record], unseen_fraction: float, unused: Sequence[str] = ()
) -> Corpus:
    """Hold out record i if a multiple of 1 / unseen_fraction is between i and i + 1."""
    if not records or (unseen_fraction > 0 and len(records) < 2):
        rule = "at least 2 records, one to train on and one unseen" if unseen_fraction > 0 else "at least 1 record"
        raise DataError(f"{source}: must hold {rule}, got {len(records)}")
    share = min(Fraction(unseen_fraction).limit_denominator(1_000_000), Fraction(999_999, 1_000_000))
    a, b = share.as_integer_ratio()
    unseen = {i for i in range(len(records)) if (i + 1) * a // b > i * a // b}
    if not unseen and unseen_fraction > 0:
        unseen = {len(records) - 1}
    return Corpus(
        source,
        tuple(record for i, record in enumerate(records) if i not in unseen),
        tuple(record for i, record in enumerate(records) if i in unseen),
        tuple(unused),
    )
