"""Training-free pruning of visual tokens: methods, the engine that carries them out, its cache and its accounting.

Start reading at `methods/visipruner.py` (what is decided), then `method.py` (what a method may say), `view.py` (what it
may look at), `prefill.py` (one forward, layer by layer) and `hooks.py` (how it is put on a transformers model).
"""

from .decisions import LEAVE, Cause, Keep, Read, Treatment, keep_best
from .errors import PruningConfigError, UnsupportedCallError, UnsupportedModelError
from .families import supported_models
from .hooks import PruningRun, call_lock, open_run, prune
from .method import METHODS, Method, register
from .methods import VisiPruner
from .trace import Decision, PruningTrace
from .view import View

PruningConfig = VisiPruner
"""VisiPruner's knobs, under the name that LLaVA's users know. `PruningConfig.from_any` reads every method."""

__all__ = [
    "LEAVE",
    "METHODS",
    "Cause",
    "Decision",
    "Keep",
    "Method",
    "PruningConfig",
    "PruningConfigError",
    "PruningRun",
    "PruningTrace",
    "Read",
    "Treatment",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "View",
    "VisiPruner",
    "call_lock",
    "keep_best",
    "open_run",
    "prune",
    "register",
    "supported_models",
]
