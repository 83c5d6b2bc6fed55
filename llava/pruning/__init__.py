"""Training-free pruning of visual tokens: the method, its attention, its cache and its accounting.

Start reading at `policy.py` (what is decided), then `probe.py` (what it is decided from), `attention.py` (what is
computed), `passes.py` (one forward, layer by layer) and `engine.py` (how it is put on a transformers model).
"""

from .adapters import supported_models
from .config import PruningConfig, PruningConfigError
from .engine import PruningRun, call_lock, prune
from .errors import UnsupportedCallError, UnsupportedModelError
from .policy import Cause, Decision, Policy, Prompt, Reading, VisiPruner
from .probe import Probe
from .trace import PruningTrace

__all__ = [
    "Cause",
    "Decision",
    "Policy",
    "Probe",
    "Prompt",
    "PruningConfig",
    "PruningConfigError",
    "PruningRun",
    "PruningTrace",
    "Reading",
    "UnsupportedCallError",
    "UnsupportedModelError",
    "VisiPruner",
    "call_lock",
    "prune",
    "supported_models",
]
