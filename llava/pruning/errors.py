"""What pruning refuses, by name and before work starts."""

from llava.utils import UserError


class UnsupportedModelError(UserError):
    """A model that cannot be pruned. Says why, and what to use instead."""


class UnsupportedCallError(UserError):
    """A way of calling a model that pruning cannot honour. Says which, and the remedy."""


class PruningConfigError(UserError):
    """A pruning configuration that cannot be used. Names the key, the value and the allowed range."""
