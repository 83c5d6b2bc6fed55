"""Which methods may prune while a model is trained.

A choice of rows has no gradient, and needs none: what is left is trained, at the cost of what is left. The methods here
are those for which ``tests/test_train_pruned.py`` shows that loss and gradients equal those of a run at full length in
which the rows that left are masked out.
"""

from __future__ import annotations

from llava.pruning import Method
from llava.utils import UserError

TRAINABLE = ("visipruner", "random", "stride", "fastv", "pyramiddrop", "divprune", "vtw", "shortv")


def method_for_training(config: str | None) -> Method | None:
    """``--pruning_config`` as the method to train with; ``None``: dense.

    Raises:
        UserError: no such method, wrong knobs, or one that was not shown to be right in training.
    """
    method: Method | None = Method.from_any(config)
    if method is None or method.is_dense:
        return None
    for step in getattr(method, "steps", (method,)):
        if step.name not in TRAINABLE:
            known = ", ".join(TRAINABLE)
            raise UserError(f"--pruning_config: {step.name!r} cannot be trained with; {known} can, and chains of them")
    return method
