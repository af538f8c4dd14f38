"""Rows read by Hugging Face's `datasets`: Parquet and Arrow files, folders, saved datasets, datasets on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .data_files import SUFFIXES, Row
from .records import DataError

TABLES = (".parquet", ".arrow")
_HUB_ID = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?")


def is_dataset(data: str) -> bool:
    """Return whether `data` is read by `datasets`: a folder, a Parquet or Arrow file, or OWNER/NAME on the hub."""
    path = Path(data)
    if path.suffix.lower() in TABLES or path.is_dir():
        return True
    return path.suffix.lower() not in SUFFIXES and not path.exists() and _HUB_ID.fullmatch(data) is not None


def read_dataset(data: str, split: str | None = None) -> Iterator[Row]:
    """Return the rows of a Parquet or Arrow file, a folder, or a dataset on the hub, in order.

    data: a path, or OWNER/NAME[:CONFIG][@REVISION], which is read from the local cache of `datasets` if present.
    A folder was written by `save_to_disk`, or holds files that `datasets` reads (JSON, CSV, Parquet, Arrow).
    split: name of the split; by default "train", or the only split.
    Columns that are null in a row are left out, also within nested values, because in Arrow all rows have all keys.
    Raises DataError if the data cannot be read; ModuleNotFoundError if `datasets` is not installed.
    """
    import datasets

    with _quiet(datasets):
        try:
            loaded = _load(datasets, data)
        except DataError:
            raise
        except Exception as error:  # its builders raise errors of their own, of pyarrow and of the hub
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            advice = "; `datasets` writes to its cache: set HF_HOME to a writable folder"
            raise DataError(
                f"{data}: must be readable by `datasets` ({type(error).__name__}: {reason})"
                f"{advice if isinstance(error, PermissionError) else ''}"
            ) from error
    table, source = _split_of(datasets, loaded, data, split)
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    media = [name for name, kind in kinds.items() if kind in ("Image", "Audio", "Video", "Pdf")]
    table = table.remove_columns(media)  # without this, reading a row would decode them
    for number, row in enumerate(table, start=1):
        yield Row(f"{source}: row {number}", _without_null(row))


def _load(datasets: Any, data: str) -> Any:
    path = Path(data)
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(data)
        loaded = datasets.load_dataset(data)
        kinds = {part.info.builder_name for part in loaded.values()}
        if "text" in kinds:
            raise DataError(f"{data}: must not be a folder of texts, whose lines would be rows; name one file")
        return loaded
    if path.exists():
        suffix = path.suffix.lower()
        if suffix == ".arrow":
            return datasets.Dataset.from_file(data)
        return datasets.load_dataset("parquet", data_files={"train": data})
    match = _HUB_ID.fullmatch(data)
    if match is None:
        raise DataError(f"{data}: must be a file, a folder or OWNER/NAME on the Hugging Face hub, got no such path")
    return datasets.load_dataset(match["id"], match["config"], revision=match["revision"])


def _split_of(datasets: Any, loaded: Any, data: str, split: str | None) -> tuple[Any, str]:
    """Return (dataset of one split, its name for messages)."""
    if not isinstance(loaded, datasets.DatasetDict):
        if split is not None:
            raise DataError(f"{data}: must have splits for --split {split}, got one dataset without; leave --split out")
        return loaded, data
    names = list(loaded)
    chosen = split or "train"
    if split is None and len(names) == 1:
        chosen = names[0]
    if chosen not in names:
        raise DataError(f"{data}: --split must name one of {names}, got {split or 'none'}")
    return loaded[chosen], f"{data}[{chosen}]"


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    return value


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Disable the progress bars of `datasets`, because the command shows its own."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
