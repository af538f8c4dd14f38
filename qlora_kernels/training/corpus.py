"""A corpus: records to train on, and records of the same kind that stay unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .data_files import Row, read_file
from .records import DataError, Plain, Record, parse_record, unused_keys


@dataclass(frozen=True)
class Corpus:
    """Records to train on, and records of the same kind that training never sees.

    source: for messages.   unused: keys of the rows that nothing reads.
    """

    source: str
    train: tuple[Record, ...]
    unseen: tuple[Record, ...]
    unused: tuple[str, ...] = ()


def read_corpus(path: Path, unseen_fraction: float) -> Corpus:
    """The records of a data file (`data_files.read_file`), split in two.

    A row holds {"text"}, {"prompt", "completion"} or {"messages": [{"role", "content", ...}, ...], "tools"}.
    unseen_fraction: in [0, 1): of the records, spread evenly over the file, at least one of them; of a text, its end,
    cut at a paragraph or a space. 0 keeps nothing unseen.
    Raises DataError, with the row's place, for anything else; and where nothing is left for one of the two parts.
    """
    content = read_file(path)
    if isinstance(content, str):
        return _split_text(str(path), content, unseen_fraction)
    return corpus_of_rows(str(path), content, unseen_fraction)


def corpus_of_rows(source: str, rows: Iterable[Row], unseen_fraction: float) -> Corpus:
    """The corpus of rows from anywhere, each with its place for messages.   source: the name of all of them."""
    records: list[Record] = []
    unused: set[str] = set()
    for row in rows:
        records.append(parse_record(row.place, row.value))
        unused |= unused_keys(row.value)
    return _split_records(source, records, unseen_fraction, sorted(unused))


def language_reference() -> Corpus:
    """Python's language reference, which comes with Python itself: every eighth topic, by name, stays unseen."""
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
    """Record i is unseen where the multiples of `unseen_fraction` pass a whole number between i and i + 1."""
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
