"""`prune(model, config)`: carries a policy's decisions out on transformers' own decoders.

Nothing of the model is replaced. For the time of a `with` block hooks stand at the decoder and its layers:

- The decoder's pre-hook tells a prefill from a decoding step and learns which rows are visual.
- A layer's pre-hook hands it the surviving rows of all samples, packed one behind the other without padding,
  with their original position embeddings, and drops rows where a decision fell in the layer before.
- The registered attention function attends sample by sample, and measures what a policy wants to know.
- The last layer's hook gives the rows back as a left-padded batch, so that row -1 is each prompt's last.

Decoding steps keep transformers' own layout (one row a sample) and read each layer's ragged cache.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from llava.utils import UserError

from .adapters import Adapter, adapter_for
from .cache import CacheLease, RaggedLayer, make_ragged
from .config import PruningConfig
from .errors import UnsupportedCallError
from .generation import GenerationOptions
from .passes import Decoding, Prefill, Sample
from .policy import Policy, PolicyFactory, Prompt, visipruner
from .rows import Rows
from .trace import PruningTrace

ATTENTION_NAME = "visual_token_pruning"


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    forward_state: Prefill | Decoding | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that stands in while a `prune` block is open (transformers' interface)."""
    if forward_state is None:
        raise RuntimeError(
            f"{type(module).__name__} was called past the pruning hooks; call the model itself, not its sub-modules"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return forward_state.attend(module.layer_idx, query, key, value, scale), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Causality and padding are in the packed layout; no mask is ever built."""


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


class PruningRun:
    """What `prune` gives: `traces` of the last prefill, one a prompt, in batch order."""

    def __init__(self, adapter: Adapter, policy: PolicyFactory | None, visual_mask: torch.Tensor | None):
        self.traces: list[PruningTrace] = []
        self._adapter = adapter
        self._policy = policy  # None: dense; the model's own kernels run and only traces are kept
        self._visual_mask = visual_mask
        self._expand_size = 1
        self._assisted = False
        self._call_mask: torch.Tensor | None = None
        self._num_images: int | None = None
        self._logits_to_keep = 1
        self._state: Prefill | Decoding | None = None
        self._thread: int | None = None
        self._awaits_head = False
        self._call_lock = threading.RLock()
        self._leases: weakref.WeakSet[CacheLease] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []

    # -- on and off the model -----------------------------------------------------------------------------------

    def install(self) -> None:
        model: Any = self._adapter.model
        decoder = self._adapter.decoder
        on = self._undo.append
        on(model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        on(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True).remove)
        on(decoder.register_forward_hook(self._after_decoder, always_call=True).remove)
        head = model.get_output_embeddings()
        if head is not None:
            on(head.register_forward_pre_hook(self._before_head).remove)
        if self._policy is not None:
            layers = self._adapter.layers
            for number, layer in enumerate(layers):
                on(layer.register_forward_pre_hook(self._layer_hook(number), with_kwargs=True).remove)
            on(layers[-1].register_forward_hook(self._after_last_layer).remove)
            for config in self._adapter.attention_configs:
                on(partial(setattr, config, "_attn_implementation", config._attn_implementation))
                config._attn_implementation = ATTENTION_NAME
            # Compiled code may have been traced without the hooks, and row counts change from prompt to prompt.
            for part, name, eager in self._adapter.compiled_parts():
                on(partial(setattr, part, name, getattr(part, name)))
                setattr(part, name, eager)
        plain_generate = model.generate
        shadowed = "generate" in vars(model)
        model.generate = self._generate(plain_generate)
        on(lambda: setattr(model, "generate", plain_generate) if shadowed else delattr(model, "generate"))

    def uninstall(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._state = self._thread = None

    def close(self) -> None:
        """The caches this run filled may be read, but not be continued."""
        for lease in self._leases:
            lease.active = False

    # -- hooks ------------------------------------------------------------------------------------------------

    def _generate(self, plain_generate: Callable) -> Callable:
        model = self._adapter.model

        def generate(*args: Any, **kwargs: Any) -> Any:
            options = GenerationOptions(model, kwargs)
            if self._policy is not None:
                options.refuse_unsupported()
                given = {"input_ids": args[0], **kwargs} if args else {"input_ids": kwargs.get("inputs"), **kwargs}
                self._adapter.refuse_wrong_copies(options.expand_size, given)
            with self._call_lock:
                self._expand_size, self._assisted = options.expand_size, options.is_assisted
                try:
                    return plain_generate(*args, **kwargs)
                finally:
                    self._expand_size, self._assisted = 1, False

        return generate

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        self._call_mask = None
        if input_ids is not None and input_ids.shape[1] > 0 and kwargs.get("inputs_embeds") is None:
            self._call_mask = self._adapter.visual_mask(input_ids)
        self._num_images = self._adapter.family.images(kwargs)
        keep = kwargs.get("logits_to_keep", 1)
        self._logits_to_keep = keep if isinstance(keep, int) else 1
        if self._policy is not None and kwargs.get("output_attentions"):
            raise UnsupportedCallError("output_attentions is not available with pruning: attention is fused")
        if self._policy is not None and kwargs.get("labels") is not None:
            raise UnsupportedCallError("labels cannot be given with pruning: rows they belong to may be gone")

    def _before_decoder(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self._state is not None and self._thread != threading.get_ident():
            raise RuntimeError("another call is running on this model under pruning; wait for it to end")
        given_mask = kwargs.pop("visual_mask", None)
        cache = kwargs.get("past_key_values")
        embeds = kwargs.get("inputs_embeds")
        ids = kwargs.get("input_ids", args[0] if args else None)
        batch, width = next(given for given in (embeds, ids) if given is not None).shape[:2]

        self._thread = threading.get_ident()
        if cache is not None and cache.get_seq_length() > 0:
            if self._policy is not None:
                self._state = self._resume(cache)
                lease = cache.layers[0].lease
                if kwargs.get("position_ids") is None and lease.last_positions is not None:
                    following = torch.arange(1, width + 1, device=lease.last_positions.device)
                    kwargs["position_ids"] = lease.last_positions + following
                if kwargs.get("position_ids") is not None:
                    self._note_positions(lease, kwargs["position_ids"], width)
            return args, kwargs
        visual = self._visual_rows(given_mask, ids, batch, width)
        use_cache = kwargs.get("use_cache")
        if self._policy is not None and cache is None and (module.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache()
        self._state = self._begin(visual, kwargs.get("attention_mask"), batch, width, cache)
        if self._policy is not None:
            if cache is not None:
                device = next(given for given in (embeds, ids) if given is not None).device
                self._note_positions(cache.layers[0].lease, kwargs.get("position_ids"), width, device)
            for name in self._adapter.family.row_kwargs:
                if kwargs.get(name) is not None:
                    kwargs[name] = self._state.pack(kwargs[name])
        return args, kwargs

    @staticmethod
    def _note_positions(
        lease: CacheLease, position_ids: torch.Tensor | None, width: int, device: torch.device | None = None
    ) -> None:
        """Remember where the next token of a loop by hand goes, which gives no `position_ids` of its own."""
        if position_ids is None:
            lease.last_positions = torch.full((1, 1), width - 1, device=device)
        else:
            lease.last_positions = position_ids[:, -1:] if position_ids.ndim == 2 else None

    def _visual_rows(
        self, given_mask: torch.Tensor | None, ids: torch.Tensor | None, batch: int, width: int
    ) -> np.ndarray:
        """Which rows of the batch are visual, bool [batch, width], on the host."""
        mask = given_mask if given_mask is not None else self._visual_mask
        if mask is None:
            mask, self._call_mask = self._call_mask, None
        if mask is None and ids is not None:
            mask = self._adapter.visual_mask(ids)
            if mask is None:
                mask = torch.zeros_like(ids, dtype=torch.bool)
        if mask is None and self._policy is None:
            mask = torch.zeros(batch, width, dtype=torch.bool)
        if mask is None:
            raise UnsupportedCallError(
                "inputs_embeds was given without visual_mask: say which rows are visual (bool [batch, rows])"
            )
        mask = torch.as_tensor(mask)
        if mask.shape[0] != batch and batch == mask.shape[0] * self._expand_size:
            mask = mask.repeat_interleave(self._expand_size, dim=0)
        if mask.shape[0] != batch or mask.shape[1] > width or (mask.shape[1] < width and not self._assisted):
            raise UnsupportedCallError(
                f"visual_mask has shape {tuple(mask.shape)}; the inputs have {batch} samples of {width} rows"
            )
        visual = np.zeros((batch, width), dtype=bool)
        visual[:, : mask.shape[1]] = mask.cpu().numpy()
        return visual

    def _begin(
        self,
        visual: np.ndarray,
        attention_mask: torch.Tensor | None,
        batch: int,
        width: int,
        cache: DynamicCache | None,
    ) -> Prefill:
        """Set up the samples of a prefill."""
        padding = self._padding(attention_mask, batch, width)
        num_layers = len(self._adapter.layers)
        num_drafts = self._logits_to_keep - 1 if self._assisted else 0
        num_visual = int(visual.sum())
        # Without a count, a stretch of visual rows is one image.
        rows_per_image = num_visual // self._num_images if self._num_images else 0
        samples: list[Sample] = []
        for number, (mask, pad) in enumerate(zip(visual, padding, strict=True)):
            rows = Rows.of_prompt(mask[pad:], num_drafts)
            trace = PruningTrace(
                num_rows=rows.num_prompt,
                visual_positions=rows.positions.tolist(),
                image_spans=[
                    (start, min(start + (rows_per_image or stop - first), stop))
                    for first, stop in rows.runs
                    for start in range(first, stop, rows_per_image or stop - first)
                ],
                score_pairs=[0] * num_layers,
                value_pairs=[0] * num_layers,
            )
            copy = number % self._expand_size
            original = samples[number - copy] if copy else None
            policy = original.policy if original else self._policy_for(rows, num_layers)
            samples.append(Sample(rows, policy, trace, original=original))
        self.traces = [sample.trace for sample in samples[:: self._expand_size]]
        self._awaits_head = True
        state = Prefill(samples, padding, cache, self._adapter.first_layer)
        if self._policy is None:
            self._note_dense(state, num_layers)
        elif cache is not None:
            if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
                raise UnsupportedCallError(
                    f"past_key_values is a {type(cache).__name__}{' with offloading' * (type(cache) is DynamicCache)}; "
                    "pruning needs an empty DynamicCache: layers hold different numbers of rows"
                )
            self._leases.add(make_ragged(cache, num_layers))
        return state

    def _policy_for(self, rows: Rows, num_layers: int) -> Policy:
        if self._policy is None or not len(rows.visual):
            return Policy()
        if rows.visual[-1] == rows.num_prompt - 1:
            warnings.warn(
                "a prompt ends in a visual row, so nothing after the image can ask for it: it runs dense; "
                "put text after the image",
                stacklevel=2,
            )
            return Policy()
        return self._policy(Prompt(num_layers, rows.num_prompt, rows.positions))

    def _note_dense(self, state: Prefill, num_layers: int) -> None:
        """What the model's own kernels do with a prefill: every row in every layer, one full rectangle each."""
        heads = self._adapter.decoder.config.num_attention_heads
        for sample in state.samples:
            sample.trace.rows_per_layer = [sample.rows.count] * num_layers
            pairs = heads * sample.rows.count**2
            sample.trace.score_pairs = [pairs] * num_layers
            sample.trace.value_pairs = [pairs] * num_layers
            sample.trace.visual_rows_read = [len(sample.rows.visual)] * num_layers

    @staticmethod
    def _padding(attention_mask: torch.Tensor | None, batch: int, width: int) -> list[int]:
        """Leading padding rows of every sample."""
        if attention_mask is None:
            return [0] * batch
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
            raise UnsupportedCallError("pruning needs a 2-D attention_mask, [batch, rows]; prepared masks are refused")
        if tuple(attention_mask.shape) != (batch, width):
            raise UnsupportedCallError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; the inputs have {batch} samples of "
                f"{width} rows, image rows included"
            )
        valid = attention_mask.cpu().numpy().astype(bool)
        padding = valid.argmax(axis=1)  # the first row that counts
        if any(not row[pad:].all() for row, pad in zip(valid, padding, strict=True)):
            raise UnsupportedCallError(
                "pruning needs left padding: attention_mask has a 0 behind a 1, or no 1; "
                "set the tokenizer's padding_side to 'left'"
            )
        return padding.tolist()

    def _resume(self, cache: DynamicCache) -> Decoding:
        if not all(isinstance(layer, RaggedLayer) and layer.lease in self._leases for layer in cache.layers):
            raise UnsupportedCallError(
                "past_key_values was filled outside this prune block; prefill the whole prompt inside it"
            )
        return Decoding(cache)

    def _layer_hook(self, number: int) -> Callable:
        def before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            state = self._state
            if state is None or self._thread != threading.get_ident():
                raise RuntimeError("a decoder layer was called while pruning is on, but not through its decoder")
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            kwargs["forward_state"] = state
            return (state.enter_layer(number, hidden, kwargs), *rest), kwargs

        return before_layer

    def _after_last_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state = self._state
        if state is None:
            return output
        last = len(self._adapter.layers) - 1
        if isinstance(output, tuple):
            return (state.leave(last, output[0]), *output[1:])
        return state.leave(last, output)

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state, self._state, self._thread = self._state, None, None
        hidden_states = getattr(output, "hidden_states", None)
        if hidden_states is None or not isinstance(state, Prefill) or len(state.samples) == 1 or self._policy is None:
            return output
        # Entry 0 is the input of layer 0, entry i + 1 what layer i gave. The last is already unpacked: transformers
        # puts the normed final state there.
        counts = [state.counts_per_layer[0], *state.counts_per_layer]
        output.hidden_states = tuple(
            entry if entry is None or entry.shape[0] == len(state.samples) else state.unpack(entry, counts[number])
            for number, entry in enumerate(hidden_states)
        )
        return output

    def _before_head(self, module: nn.Module, args: tuple) -> None:
        if len(self.traces) and args and self._awaits_head:
            self._awaits_head = False
            for trace in self.traces:
                trace.lm_head_rows = min(args[0].shape[1], trace.rows_per_layer[-1])


# The open blocks of each model's decoder, innermost last, and the thread that opened them.
_blocks: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, PruningRun]]] = weakref.WeakKeyDictionary()
_blocks_lock = threading.Lock()
_call_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def call_lock(model: nn.Module) -> threading.RLock:
    """The lock under which this project's own models run one call at a time."""
    with _blocks_lock:
        return _call_locks.setdefault(model, threading.RLock())


@contextmanager
def prune(
    model: nn.Module,
    config: PruningConfig | Mapping[str, Any] | str | None = None,
    *,
    policy: PolicyFactory | None = None,
    visual_mask: torch.Tensor | None = None,
) -> Iterator[PruningRun]:
    """Prune visual tokens in every call of `model` inside the block.

    Args:
        model: a transformers vision-language model of `supported_models()`, or this project's own; PEFT and
            `torch.compile` wrappers are looked through. A compiled decoder runs uncompiled inside the block.
        config: a `PruningConfig`, a mapping, a JSON string or `"@file"`. None, or an empty `mode`, is dense:
            the model's own kernels run untouched, and only traces are kept.
        policy: instead of `config`, another method: called with each `Prompt`, returns its `Policy`.
        visual_mask: bool [batch, rows], for calls with `inputs_embeds`, where ids cannot tell which rows are
            visual. Padding is part of the rows.

    Yields:
        The run; its `traces` are those of the last prefill, one a prompt, in batch order.

    Blocks nest: the innermost rules. Leaving a block, also through an exception, leaves nothing on the model.

    Raises:
        PruningConfigError, UnsupportedModelError: before anything is changed.
        UnsupportedCallError: from inside, for a call that cannot be pruned.
        RuntimeError: another thread has a block open on this model.
    """
    adapter = adapter_for(model)
    if config is not None and policy is not None:
        raise UserError("prune takes a config or a policy, not both")
    num_layers = len(adapter.layers)
    if policy is None:
        checked = PruningConfig.from_any(config)
        if checked is not None and checked.mode:
            checked.validate_for(num_layers)
            adapter.validate(checked)
            policy = visipruner(checked, checked.sink_for(adapter.model.config._name_or_path, num_layers))
    run = PruningRun(adapter, policy, visual_mask)

    thread = threading.get_ident()
    with _blocks_lock:
        blocks = _blocks.setdefault(adapter.decoder, [])
        if any(owner != thread for owner, _ in blocks):
            raise RuntimeError("another thread has a prune block open on this model; wait for it to end")
        if blocks:
            blocks[-1][1].uninstall()
        blocks.append((thread, run))
    try:
        run.install()
        yield run
    finally:
        with _blocks_lock:
            was_innermost = blocks[-1][1] is run  # not where blocks are closed by hand, in another order
            run.uninstall()
            run.close()
            blocks.remove((thread, run))
            if blocks and was_innermost:
                blocks[-1][1].install()
