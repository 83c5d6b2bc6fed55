"""A chain: methods one after the other, each on what those before it have left."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

from ..decisions import Read, Treatment
from ..errors import PruningConfigError
from ..knobs import refuse
from ..method import Method, register
from ..trace import PruningTrace


@register("chain")
@dataclass(frozen=True)
class Chain(Method):
    """`steps` act one after the other; all decisions of a step fall behind later layers than those of the one before.

    To a step, the rows that the steps before it have left are all that the prompt has: shares are shares of them, and
    only its own decisions stand in its trace. Rows are numbered anew behind the layers of the steps that do so, and
    keep these numbers in the others. What layers do with the image (text that reads none of it, rows that are not
    updated or sit a layer out) adds up.

    Attributes:
        steps: two methods or more, in JSON their configs.

    Raises:
        PruningConfigError: fewer steps, one that cannot be used; with a model, steps whose layers overlap.
    """

    steps: tuple[Method, ...]

    def __post_init__(self):
        if not isinstance(self.steps, list | tuple) or len(self.steps) < 2 or None in self.steps:
            refuse("steps", self.steps, "a list of two or more methods")
        object.__setattr__(self, "steps", tuple(Method.from_any(step) for step in self.steps))

    @property
    def needs_tower(self):  # type: ignore[override]
        return any(step.needs_tower for step in self.steps)

    @property
    def renumbers(self):
        return any(step.renumbers for step in self.steps)

    @property
    def is_dense(self):  # type: ignore[override]
        return all(step.is_dense for step in self.steps)

    # -- the method ----------------------------------------------------------------------------------------------

    def treatments(self, num_layers):
        together = zip(*(step.treatments(num_layers) for step in self.steps), strict=True)
        return [_both(treatments) for treatments in together]

    def looks_behind(self, num_layers):
        return {layer for step in self.steps for layer in step.looks_behind(num_layers)}

    def decides_behind(self, num_layers):
        return {layer for step in self.steps for layer in step.decides_behind(num_layers)}

    def renumbers_behind(self, layer, num_layers):
        number = self._step_behind(num_layers)(layer)
        return number is not None and self.steps[number].renumbers_behind(layer, num_layers)

    def measure(self, view):
        number = self._step_behind(len(view.trace.score_pairs))(view.layer)
        if number is None:
            return None
        own_view = copy(view)
        own_view.trace = own = self._trace_of(number, view.trace)
        measured = self.steps[number].measure(own_view)
        view.trace.projection_flops = own.projection_flops
        return measured

    def decide(self, layer, measured, trace):
        number = self._step_behind(len(trace.score_pairs))(layer)
        return None if number is None else self.steps[number].decide(layer, measured, self._trace_of(number, trace))

    def describe(self, trace):
        return "; then ".join(
            step.describe(self._trace_of(number, trace)) for number, step in enumerate(self.steps) if not step.is_dense
        )

    # -- which step is whose -------------------------------------------------------------------------------------

    def _step_behind(self, num_layers: int) -> Callable[[int], int | None]:
        """Behind a layer → the number of the step that acts there; None: no step does."""
        owners = {layer: n for n, step in enumerate(self.steps) for layer in step.decides_behind(num_layers)}
        return owners.get

    def _trace_of(self, number: int, trace: PruningTrace) -> PruningTrace:
        """The trace as step `number` sees it."""
        step_behind = self._step_behind(len(trace.score_pairs))
        owners = [step_behind(decision.layer) for decision in trace.decisions]
        before = [one for one, owner in zip(trace.decisions, owners, strict=True) if owner is None or owner < number]
        own = [one for one, owner in zip(trace.decisions, owners, strict=True) if owner == number]
        there = before[-1].positions.tolist() if before else trace.visual_positions
        return replace(trace, visual_positions=there, decisions=own)

    # -- its knobs -----------------------------------------------------------------------------------------------

    def validate_for(self, num_layers, first_layer=0):
        last, acting = None, None
        for step in self.steps:
            layers = step.validate_for(num_layers, first_layer).decides_behind(num_layers)
            if layers and last is not None and min(layers) <= last:
                raise PruningConfigError(
                    f"pruning config of 'chain': step {step.name!r} may decide behind layer {min(layers)}, but "
                    f"{acting!r} before it up to layer {last}; a step must begin behind the last layer of the one "
                    "before (-1: before the decoder)"
                )
            last, acting = (max(layers), step.name) if layers else (last, acting)
        self._check_absence(num_layers, first_layer)  # `treatments` refuses what does not go together
        return self

    def bind(self, num_layers, model_path):
        return replace(self, steps=tuple(step.bind(num_layers, model_path) for step in self.steps))

    def for_question(self, question):
        return replace(self, steps=tuple(step.for_question(question) for step in self.steps))

    def to_dict(self):
        return {"method": self.name, "steps": [step.to_dict() for step in self.steps]}


def _both(treatments: tuple[Treatment, ...]) -> Treatment:
    """What a layer does with the image where it has several `treatments`."""
    reads = {one.read for one in treatments} - {Read.ALL}
    present = all(one.present for one in treatments)
    if len(reads) > present:  # text beside absent rows shares out what it would lose to hidden ones
        raise PruningConfigError(
            "pruning config of 'chain': two steps differ in what text reads of the image in one layer; leave one out"
        )
    return Treatment(next(iter(reads), Read.ALL), all(one.update for one in treatments), present)
