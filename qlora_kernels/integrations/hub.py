"""Find a model by its Hugging Face hub id in the local cache, and download it from the hub if that is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..io.json_file import read_json_object
from .model_structure import CONFIG, ModelError

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
"""Files to download: weights, configuration and tokenizer. The package never reads pickled weights or code."""
_ELSEWHERE = ["*/*"]
"""Files not to download: subfolders of a repository hold weights for other libraries (onnx/, original/)."""
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def is_hub_id(model: str) -> bool:
    """Return whether `model` has the form of a hub id: NAME or OWNER/NAME, optionally followed by @REVISION."""
    return _ID.fullmatch(model) is not None and ".." not in model and "--" not in model


def hub_folder(model: str, *, weights: bool = True) -> Path:
    """Return the folder in the local Hugging Face cache that holds a model's files.

    model: id on the hub, OWNER/NAME or OWNER/NAME@REVISION.   weights: whether more than config.json is needed.
    A model whose files are all in the cache is taken from there without asking the hub. The others are downloaded,
    unless HF_HUB_OFFLINE is set. Raises ModelError with a one-line message if the model is in neither place.
    """
    from huggingface_hub import constants, snapshot_download

    match = _ID.fullmatch(model)
    if match is None:
        raise ModelError(f"{model}: must be an id on the Hugging Face hub, OWNER/NAME or OWNER/NAME@REVISION")
    wanted: dict[str, Any] = {"repo_id": match["id"], "revision": match["revision"]}
    wanted |= {"allow_patterns": _FILES if weights else [CONFIG], "ignore_patterns": _ELSEWHERE}
    try:
        folder, reason = _folder(snapshot_download, weights, local_files_only=True, **wanted)
        if not reason:
            return folder
    except ModelError as error:
        reason = str(error)
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{model}: must be an existing path or a model in the Hugging Face cache {constants.HF_HUB_CACHE}, got a "
            f"name of which {reason}; HF_HUB_OFFLINE is set: unset it to download the model, or give a folder"
        )
    try:
        folder, missing = _folder(snapshot_download, weights, **wanted)
    except ModelError as error:
        raise ModelError(
            f"{model}: must be an existing path, a model in the Hugging Face cache or one on the hub; {error}"
        ) from error
    if missing:
        raise ModelError(f"{model}: must be a model with {CONFIG} and safetensors, got a repository of which {missing}")
    return folder


def _folder(download: Callable[..., str], weights: bool, **wanted: Any) -> tuple[Path, str]:
    """Return (folder of the snapshot, text about its missing files). Raises ModelError if there is no snapshot."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(download(**wanted))
    except LocalEntryNotFoundError as error:
        if wanted.get("local_files_only"):
            raise ModelError("no file is in the cache") from error
        raise ModelError(f"the hub is not reached: {_first_line(error.__cause__ or error)}") from error
    except Exception as error:  # errors of huggingface_hub, its HTTP client or the network
        raise ModelError(_first_line(error)) from error
    return folder, _missing(folder, weights)


def _missing(folder: Path, weights: bool) -> str:
    """Return message text that names the files missing from a model's folder, or "" if none is missing."""
    if not (folder / CONFIG).is_file():
        return f"{CONFIG} is missing"
    if not weights:
        return ""
    files = {_WEIGHTS}
    if (folder / _INDEX).is_file():
        shards = read_json_object(folder / _INDEX).get("weight_map")
        files = {str(shard) for shard in shards.values()} if isinstance(shards, dict) else {_INDEX}
    lost = sorted(name for name in files if not (folder / name).is_file())
    return f"{lost[0]} is missing" if lost else ""


def _first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, at most 300 characters; without text, its class name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
