"""Small helpers that every program of the package shares."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import UserError, clean_text, run_main, to_json

if TYPE_CHECKING:  # the scorers start without torch
    import torch

__all__ = [
    "UserError",
    "clean_text",
    "disable_torch_init",
    "fast_autocast",
    "fast_dtype",
    "processor_name",
    "run_main",
    "to_json",
    "write_whole",
]


def disable_torch_init() -> None:
    """Does nothing, for LLaVA scripts that call it before they load.

    There it replaced ``reset_parameters`` of torch's layers for the whole process, to save time. Here
    :func:`llava.model.builder.load_pretrained_model` builds on the meta device, so that nothing is initialised twice.
    """


def processor_name() -> str:
    """The CPU's name, as far as this system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype with float32's range that this device multiplies fastest.

    bfloat16 where there are instructions for it, else float32: a CPU without them (AVX2 only) computes bfloat16 several
    times slower than float32.
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type != "cpu":
        native = False
    elif platform.machine().lower() in ("x86_64", "amd64"):
        native = torch.cpu._is_avx512_bf16_supported()  # oneDNN says yes to AVX512 without them, too
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def fast_autocast(device: torch.device) -> torch.autocast:
    """A block in which matrix products are computed in :func:`fast_dtype`; in float32 it changes nothing."""
    import torch

    dtype = fast_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def write_whole(path: str | Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it: the file is the old one or the new one, never half of it.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with open(handle, "w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp gives a file to its owner alone; this one has the rights of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
