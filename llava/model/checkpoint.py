"""Checkpoint folders: found (or fetched from the hub), checked, and opened without reading the weights.

Everything that can be wrong with a checkpoint is found here, from headers and indexes alone, so that a bad one
fails at once instead of after minutes of reading.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llava.model.key_mapping import original_name
from llava.model.packaged import PACKAGED_BASES, packaged_folder
from llava.utils import UserError

SAFE_NAME, BIN_NAME = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"

Weights = dict[str, Any]
"""Name → a tensor on disk: a memory-mapped ``torch.Tensor`` or a safetensors slice; ``t[...]`` reads it."""


def resolve_folder(source: str | Path) -> Path:
    """The folder of a checkpoint given as a path, a hub id (``owner/name``), or the name of a model that ships.

    Of a hub model only the small files are fetched here (once; they are cached): see :func:`fetch_weights`.

    Raises:
        UserError: no such folder, and the hub has no such model or cannot be reached.
    """
    if folder := packaged_folder(source):
        return folder
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source} is a file; give the folder that holds the checkpoint")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise UserError(f"model folder {source} does not exist")
    return _fetch(str(source), "*.json", "tokenizer.model")


def base_of(folder: Path, model_base: str | Path | None = None) -> str | Path | None:
    """The base model of a checkpoint's folder: the one given, else the one its adapter names if a package has it."""
    file = folder / "adapter_config.json"
    if model_base is not None or not file.is_file():
        return model_base
    named = read_json(file).get("base_model_name_or_path")
    return named if named in PACKAGED_BASES else None


def fetch_weights(source: str | Path, folder: Path) -> None:
    """Fetch the weights of a hub model into the folder that :func:`resolve_folder` gave; safetensors if it has them."""
    if packaged_folder(source) or Path(source).expanduser().is_dir():
        return
    extras = ("adapter_model.*", "mm_projector.bin", "non_lora_trainables.bin")
    for index_name in (SAFE_NAME + _INDEX, BIN_NAME + _INDEX):
        if (folder / index_name).is_file():
            _fetch(str(source), *sorted(set(_read_index(folder / index_name).values())), *extras)
            return
    _fetch(str(source), SAFE_NAME, *extras)
    if not has_weights(folder):
        _fetch(str(source), BIN_NAME)


def _fetch(repo_id: str, *patterns: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{repo_id!r} is neither a folder here nor a model that the hub gave ({type(error).__name__}); "
            "check the name and the connection, or give a downloaded folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: unreadable, malformed, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {path.parent} a checkpoint folder?") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def _read_index(path: Path) -> dict[str, str]:
    """Weight → file name of a shard index; every name stays inside the index's folder."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path} has no weight_map; the checkpoint is incomplete")
    for name in sorted({str(name) for name in weight_map.values()}):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
            raise UserError(f"{path} names a file outside its folder: {name!r}")
    return {str(key): str(name) for key, name in weight_map.items()}


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a whole model's weights (and not only an adapter or a projector)."""
    names = (SAFE_NAME + _INDEX, SAFE_NAME, BIN_NAME + _INDEX, BIN_NAME)
    return any((folder / name).is_file() for name in names)


def open_weights(folder: Path) -> Weights:
    """All weights of a checkpoint folder, safetensors before ``.bin``, sharded or not; nothing is read yet.

    Raises:
        UserError: no weights, a missing or truncated file, an index that does not fit its shards.
    """
    for name in (SAFE_NAME, BIN_NAME):
        if (folder / (name + _INDEX)).is_file():
            return _open_shards(folder / (name + _INDEX))
        if (folder / name).is_file():
            return open_file(folder / name)
    raise UserError(
        f"{folder} holds no model weights ({SAFE_NAME} or {BIN_NAME}, alone or in shards); an adapter or a projector "
        "alone also needs its base model (--model-base)"
    )


def _open_shards(index: Path) -> Weights:
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(f"{index.parent} lacks {', '.join(absent)}, which {index.name} lists; download it again")
    shards = {name: open_file(index.parent / name) for name in names}
    unkept = sorted(key for key, name in weight_map.items() if key not in shards[name])
    if unkept:
        raise UserError(f"{index} promises weights that its files lack: {name_some(unkept)}")
    merged = {key: tensor for shard in shards.values() for key, tensor in shard.items()}
    return {**merged, **{key: shards[name][key] for key, name in weight_map.items()}}


def open_file(path: Path) -> Weights:
    """Weights of one ``.safetensors`` or ``.bin`` file, memory-mapped.

    Raises:
        UserError: missing, truncated, or not a file of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            return {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        # Only zip files can be mapped; older torch formats are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is truncated or not a file of weights ({_first_line(error)})") from error
    except Exception as error:  # unpickling refuses anything but tensors, with errors of many kinds
        raise UserError(f"{path} holds more than tensors and was not loaded ({_first_line(error)})") from error
    if not isinstance(content, Mapping) or not all(isinstance(t, torch.Tensor) for t in content.values()):
        raise UserError(f"{path} is not a dictionary of tensors")
    return dict(content)


def shape_of(weight: Any) -> tuple[int, ...]:
    """Shape of a weight without reading it."""
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else tuple(weight.get_shape())


def size_in_bytes(weights: Weights) -> int:
    """Upper bound of the bytes on disk, four a number."""
    return 4 * sum(torch.Size(shape_of(weight)).numel() for weight in weights.values())


def check_weights(model: torch.nn.Module, weights: Weights, optional: frozenset[str], source: str) -> None:
    """Every weight of ``model`` is there, in its shape, and nothing else is.

    Args:
        model: on the meta device.
        optional: names that may be absent (tied to others).

    Raises:
        UserError: listing the names, as original checkpoints have them.
    """
    wanted = {original_name(key): tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    given = {original_name(key): shape_of(weight) for key, weight in weights.items()}
    problems = []
    if missing := sorted(wanted.keys() - given.keys() - optional):
        problems.append(f"missing: {name_some(missing)}")
    if unexpected := sorted(given.keys() - wanted.keys()):
        problems.append(f"unexpected: {name_some(unexpected)}")
    wrong = [
        f"{key} {list(given[key])} instead of {list(wanted[key])}"
        for key in sorted(wanted.keys() & given.keys())
        if given[key] != wanted[key]
    ]
    if wrong:
        problems.append(f"wrong shape: {name_some(wrong)}")
    if problems:
        raise UserError(f"the weights of {source} do not fit its config; {'; '.join(problems)}")


def name_some(names: list[str], limit: int = 20) -> str:
    """The names in one line; past ``limit`` only how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
