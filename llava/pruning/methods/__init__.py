"""Pruning methods, one a file. Each is a dataclass of its knobs, what it looks at, and what it decides."""

from .fastv import FastV
from .holov import HoloV
from .pyramiddrop import PyramidDrop
from .random import Random
from .schedule import Schedule
from .scope import Scope
from .shortv import ShortV
from .visionzip import VisionZip
from .visipruner import VisiPruner
from .vispruner import VisPruner
from .vtw import VTW

__all__ = [
    "VTW",
    "FastV",
    "HoloV",
    "PyramidDrop",
    "Random",
    "Schedule",
    "Scope",
    "ShortV",
    "VisPruner",
    "VisiPruner",
    "VisionZip",
]
