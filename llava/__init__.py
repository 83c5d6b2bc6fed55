"""LLaVA models with training-free pruning of their visual tokens (VisiPruner)."""

__version__ = "0.1.0"
