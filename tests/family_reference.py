"""Full-length runs of unpatched transformers models, to compare pruned ones with.

Nothing is dropped here. What a pruned run drops is hidden by a 4-D mask of its own in every layer, and what the
shallow stage says is done as the published code does it: weights of an eager attention set to zero after the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from naive import shallow_edit
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from llava.pruning import Method, PruningConfig, PruningTrace, prune

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@dataclass
class Hidden:
    """What one prompt's pruned run was made of.

    Attributes:
        padding: leading padding rows in the batch.
        num_rows: rows of the prompt.
        visual: bool [num_rows].
        gone: bool [layers, num_rows], rows that have left before a layer.
    """

    padding: int
    num_rows: int
    visual: torch.Tensor
    gone: torch.Tensor

    @classmethod
    def from_trace(cls, trace: PruningTrace, width: int, num_layers: int) -> Hidden:
        visual = torch.zeros(trace.num_rows, dtype=torch.bool)
        visual[trace.visual_positions] = True
        gone = torch.zeros(num_layers, trace.num_rows, dtype=torch.bool)
        for decision in trace.decisions:
            dropped = visual.clone()
            dropped[decision.positions] = False
            gone[decision.layer + 1 :] |= dropped
        return cls(width - trace.num_rows, trace.num_rows, visual, gone)

    def mask(self, layer: int, queries: int, keys: int) -> torch.Tensor:
        """What each of the last `queries` rows of `keys` sees in `layer`, bool [queries, keys]."""
        row = torch.arange(keys - queries, keys)[:, None]
        column = torch.arange(keys)
        seen = (column <= row) & (column >= self.padding)
        gone = torch.zeros(keys, dtype=torch.bool)
        gone[self.padding : self.padding + self.num_rows] = self.gone[layer]
        # Hidden and padding rows go on by themselves; nobody reads them.
        return (seen & ~gone) | (column == row)


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.layers


@contextmanager
def states_restored(model: nn.Module, hidden: Sequence[Hidden], layers: Sequence[int]) -> Iterator[None]:
    """Give visual rows of an unpatched model's prompts their old states back behind each of `layers`."""

    def restore(module, args, kwargs, output):
        entering = args[0] if args else kwargs["hidden_states"]
        if entering.shape[1] == 1:
            return None
        leaving = (output[0] if isinstance(output, tuple) else output).clone()
        for number, prompt in enumerate(hidden):
            rows = prompt.padding + prompt.visual.nonzero()[:, 0]
            leaving[number, rows] = entering[number, rows]
        return (leaving, *output[1:]) if isinstance(output, tuple) else leaving

    hooks = [_decoder_layers(model)[layer].register_forward_hook(restore, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@contextmanager
def masks_hide(model: nn.Module, hidden: Sequence[Hidden], copies: int = 1) -> Iterator[None]:
    """Give every decoder layer of an unpatched model a 4-D mask that hides the pruned rows."""

    def hook(layer: int):
        def before(module, args, kwargs):
            queries = (args[0] if args else kwargs["hidden_states"]).shape[1]
            past = kwargs["past_key_values"].get_seq_length(layer)
            seen = torch.stack([prompt.mask(layer, queries, past + queries) for prompt in hidden])
            seen = seen.repeat_interleave(copies, dim=0)[:, None]
            blocked = torch.finfo(torch.float32).min
            kwargs["attention_mask"] = torch.zeros(seen.shape).masked_fill(~seen, blocked)
            return args, kwargs

        return before

    hooks = [
        layer.register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, layer in enumerate(_decoder_layers(model))
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


_shallow: dict = {}


def _zeroing_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention; during prefill, in layers below `shallow_mid_layer`, edited after the softmax."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
    layer, config = module.layer_idx, _shallow["config"]
    if query.shape[2] > 1 and layer < config.shallow_mid_layer:
        for sample, prompt in enumerate(_shallow["hidden"]):
            if prompt.visual.any():
                own = weights[sample, :, prompt.padding :, prompt.padding :]
                rule = config.shallow_sink if layer == 0 else "none"
                own.copy_(shallow_edit(own, prompt.visual, prompt.num_rows, rule))
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("zeroing_reference", _zeroing_attention)
AttentionMaskInterface.register("zeroing_reference", lambda *args, **kwargs: None)


_noted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def _noting_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention that notes the weights and the values of every layer of a prefill."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = torch.softmax(query @ key.transpose(2, 3) * scaling + attention_mask, dim=-1)
    if query.shape[2] > 1:
        _noted[module.layer_idx] = weights, value
    return (weights @ value).transpose(1, 2), weights


AttentionInterface.register("noting_reference", _noting_attention)
AttentionMaskInterface.register("noting_reference", lambda *args, **kwargs: None)


@contextmanager
def _attending(model: nn.Module, implementation: str) -> Iterator[None]:
    """Let the model's decoder attend by a registered implementation."""
    decoder = model.get_decoder()
    configs = {id(c): c for c in (decoder.config, *(layer.self_attn.config for layer in decoder.layers))}
    before = [(c, c._attn_implementation) for c in configs.values()]
    for c in configs.values():
        c._attn_implementation = implementation
    try:
        yield
    finally:
        for c, name in before:
            c._attn_implementation = name


@contextmanager
def attention_noted(model: nn.Module) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Layer -> weights [batch, heads, rows, rows] and values [batch, heads, rows, head_dim] of a prefill inside."""
    with _attending(model, "noting_reference"):
        try:
            yield _noted
        finally:
            _noted.clear()


@contextmanager
def shallow_zeroed(
    model: nn.Module, config: PruningConfig, hidden: Sequence[Hidden], copies: int = 1
) -> Iterator[None]:
    """Let the model's decoder attend eagerly, as the published code does in the shallow stage."""
    _shallow.update(config=config, hidden=[prompt for prompt in hidden for _ in range(copies)])
    with _attending(model, "zeroing_reference"):
        try:
            yield
        finally:
            _shallow.clear()


@dataclass(frozen=True)
class Recorder(Method):
    """Drops nothing, notes VisiPruner's measures of every layer from `first` on; text reads what `shallow` lets it."""

    shares: dict[int, dict]
    first: int
    shallow: Method = Method()  # noqa: RUF009 (frozen)
    probe_rows: str = "last"

    def treatments(self, num_layers):
        return self.shallow.treatments(num_layers)

    def looks_behind(self, num_layers):
        return range(self.first, num_layers)

    def measure(self, view):
        return view.shares(view.text[view.num_prefix :] if self.probe_rows == "text" else None)

    def decide(self, layer, measured, trace):
        if measured is not None:
            self.shares[layer] = measured


def between(values) -> float:
    """A number in the widest gap of the middle third, so that rounding moves nothing across it."""
    ordered = sorted(float(value) for value in values)
    third = len(ordered) // 3
    gaps = list(pairwise(ordered))[third : len(ordered) - third]
    low, high = max(gaps, key=lambda gap: gap[1] - gap[0])
    return (low + high) / 2


def thresholds_for(model: nn.Module, inputs: dict, shallow_mid_layer: int, sink: str | None) -> dict[str, float]:
    """Thresholds with which this single prompt keeps half of its rows, and loses them one layer after the earliest.

    Read from the model's own probe, so that every family decides something. `sink`: layer 0's rule, with the shallow
    stage; None: without it.
    """
    shallow = PruningConfig(
        mode=("shallow",) if sink else (), shallow_mid_layer=shallow_mid_layer, shallow_sink=sink or "first"
    )
    recorder = Recorder({}, shallow_mid_layer + 1, shallow)
    with prune(model, recorder), torch.no_grad():
        model(**inputs)
    smallest = {layer: float(shares["cosine"].min()) for layer, shares in recorder.shares.items()}
    first, second = shallow_mid_layer + 1, shallow_mid_layer + 2
    # Select in the second eligible layer where the numbers allow it, else in the first.
    select = second if smallest[first] - smallest[second] > 1e-3 else first
    layer_threshold = (smallest[first] + smallest[second]) / 2 if select == second else (smallest[first] + 1) / 2
    tokens_threshold = between(recorder.shares[select]["norm"])

    # With these, the kept rows' cosines behind the selection say which exit threshold makes which layers quiet.
    config = PruningConfig(
        mode=(*shallow.mode, "middle", "deep"),
        shallow_sink=sink,
        shallow_mid_layer=shallow_mid_layer,
        layer_threshold=layer_threshold,
        tokens_threshold=tokens_threshold,
        exit_threshold=1e-6,
        exit_patience=99,
    )
    with prune(model, config) as run, torch.no_grad():
        model(**inputs)
    (trace,) = run.traces
    last = max(trace.smallest_cosine)
    behind = sorted(value for layer, value in trace.smallest_cosine.items() if select < layer < last)
    exit_threshold = behind[-2] - 1e-4
    return {
        "layer_threshold": layer_threshold,
        "tokens_threshold": tokens_threshold,
        "exit_threshold": min(max(exit_threshold, 1e-3), 0.9999),
    }
