"""Pruning methods, one a file. Each is a dataclass of its knobs, what it looks at, and what it decides."""

from .cdpruner import CDPruner
from .chain import Chain
from .divprune import DivPrune
from .fastv import FastV
from .pool import Pool
from .pyramiddrop import PyramidDrop
from .random import Random
from .schedule import Schedule
from .shortv import ShortV
from .stride import Stride
from .visipruner import VisiPruner
from .vtw import VTW

__all__ = [
    "VTW",
    "CDPruner",
    "Chain",
    "DivPrune",
    "FastV",
    "Pool",
    "PyramidDrop",
    "Random",
    "Schedule",
    "ShortV",
    "Stride",
    "VisiPruner",
]
