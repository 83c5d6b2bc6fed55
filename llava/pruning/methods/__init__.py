"""Pruning methods, one a file. Each is a dataclass of its knobs, what it looks at, and what it decides."""

from .dart import DART
from .fastv import FastV
from .pyramiddrop import PyramidDrop
from .random import Random
from .schedule import Schedule
from .shortv import ShortV
from .sparsevlm import SparseVLM
from .visipruner import VisiPruner
from .vtw import VTW

__all__ = ["DART", "VTW", "FastV", "PyramidDrop", "Random", "Schedule", "ShortV", "SparseVLM", "VisiPruner"]
