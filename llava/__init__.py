"""LLaVA models with training-free pruning of their visual tokens (VisiPruner)."""
