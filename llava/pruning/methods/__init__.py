"""Pruning methods, one a file. Each is a dataclass of its knobs, what it looks at, and what it decides."""

from .cdpruner import CDPruner
from .chain import Chain
from .dart import DART
from .divprune import DivPrune
from .fastv import FastV
from .holov import HoloV
from .pool import Pool
from .pyramiddrop import PyramidDrop
from .random import Random
from .schedule import Schedule
from .scope import Scope
from .shortv import ShortV
from .sparsevlm import SparseVLM
from .st3 import ST3
from .stride import Stride
from .vica import ViCA
from .visionzip import VisionZip
from .visipruner import VisiPruner
from .vispruner import VisPruner
from .vtw import VTW
from .yopo import YOPO

__all__ = [
    "DART",
    "ST3",
    "VTW",
    "YOPO",
    "CDPruner",
    "Chain",
    "DivPrune",
    "FastV",
    "HoloV",
    "Pool",
    "PyramidDrop",
    "Random",
    "Schedule",
    "Scope",
    "ShortV",
    "SparseVLM",
    "Stride",
    "ViCA",
    "VisPruner",
    "VisiPruner",
    "VisionZip",
]
