"""`prune(model, config)`: puts a method on transformers' own decoders and takes it off again.

Nothing of the model is replaced. For the time of a `with` block hooks stand at the decoder and its layers:

- The decoder's pre-hook tells a prefill from a decoding step and learns which rows are visual.
- A layer's pre-hook hands it the surviving rows of all samples, packed one behind the other without padding,
  with their original position embeddings, and drops rows where a decision fell in the layer before.
- The registered attention function attends sample by sample.
- Where a method freezes visual rows, hooks at the query and output projections and the MLP leave them out.
- The last layer's hook gives the rows back as a left-padded batch, so that row -1 is each prompt's last.

Decoding steps keep transformers' own layout (one row a sample) and read each layer's ragged cache.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache

from .cache import CacheLease, RaggedLayer, make_ragged
from .decisions import BEFORE_DECODER
from .decode import Decoding
from .errors import PruningConfigError, UnsupportedCallError
from .families import Adapter, adapter_for
from .flops import note_dense
from .generation import Generation, refuse_unsupported
from .method import Method
from .prefill import Fork, Plan, Prefill, Sample
from .rows import Rows
from .tower import TowerWatch, crops_of
from .trace import PruningTrace

ATTENTION_NAME = "visual_token_pruning"

Config = Method | Mapping[str, Any] | str | None
"""A pruning config in any form that `Method.from_any` reads."""


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


@dataclass(frozen=True)
class _ModelCall:
    """What one forward of the whole model says of the decoder's call inside it.

    Attributes:
        visual: bool [batch, rows] from placeholder ids; None where ids cannot tell.
        num_images: how many images there are, where all have equally many rows; None: not known.
        head_rows: rows that go through the output head; 0: all.
    """

    visual: torch.Tensor | None = None
    num_images: int | None = None
    head_rows: int = 1


class PruningRun:
    """What `prune` gives: `traces` of the last prefill, one a prompt, in batch order.

    Attributes:
        rows_left: for each prompt, positions in the unpruned prompt of the rows that came out of its last prefill,
            int64; -1: a row that stands for no patch.
    """

    def __init__(
        self,
        adapter: Adapter,
        methods: Sequence[Method | None],
        visual_mask: torch.Tensor | None,
        lock: Any,
        forks: Sequence[Fork] = (),
        ragged: bool = False,
    ):
        self.traces: list[PruningTrace] = []
        self.rows_left: list[np.ndarray] = []
        self._adapter = adapter
        self._plans = [Plan.of(method, len(adapter.layers)) for method in methods]  # one for all prompts, or one each
        self._forks = forks
        # Where nothing prunes, the model's own kernels run and only traces are kept.
        self._prunes = ragged or len(forks) > 0 or any(method is not None for method in methods)
        watching = [method.name for method in methods if method is not None and method.needs_tower]
        self._tower: TowerWatch | None = None
        if watching:
            layer = adapter.tower_layer(watching[0])
            self._tower = TowerWatch(layer, adapter.projector, adapter.has_class_token)
        self._visual_mask = visual_mask
        self._lock = lock
        self._generation, self._is_generating = Generation(), False
        self._call = _ModelCall()
        self._given: Mapping[str, Any] = {}  # keywords of the call in progress, which say how tiles lie
        self._forward: tuple[Prefill | Decoding | None, int] | None = None  # the one in progress, and its thread
        self._leases: weakref.WeakSet[CacheLease] = weakref.WeakSet()
        self._undo: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        what = ", ".join(
            str(method.to_dict() if method else "dense") for method in (plan.method for plan in self._plans)
        )
        return f"PruningRun({type(self._adapter.model).__name__}, {what}, {len(self.traces)} traces)"

    # -- on and off the model ------------------------------------------------------------------------------------

    def install(self) -> None:
        model: Any = self._adapter.model
        decoder = self._adapter.decoder
        on = self._undo.append
        on(model.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
        on(decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True).remove)
        on(decoder.register_forward_hook(self._after_decoder, always_call=True).remove)
        if self._prunes:
            self._install_on_layers(on)
        if self._tower is not None:
            on(self._tower.install())
        plain_generate = model.generate
        shadowed = "generate" in vars(model)
        model.generate = self._generate(plain_generate)
        on(lambda: setattr(model, "generate", plain_generate) if shadowed else delattr(model, "generate"))

    def _install_on_layers(self, on: Callable[[Callable[[], None]], None]) -> None:
        layers = self._adapter.layers
        plans = [*self._plans, *(fork.plan for fork in self._forks)]
        for number, layer in enumerate(layers):
            on(layer.register_forward_pre_hook(partial(self._before_layer, number), with_kwargs=True).remove)
            if any(plan.treatments[number].present and not plan.treatments[number].update for plan in plans):
                for part in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
                    on(part.register_forward_pre_hook(self._leave_frozen_out).remove)
                    # First of all, so that others' hooks see every row.
                    on(part.register_forward_hook(self._give_frozen_zeros, prepend=True).remove)
        on(layers[-1].register_forward_hook(self._after_last_layer).remove)
        for config in self._adapter.attention_configs:
            on(partial(setattr, config, "_attn_implementation", config._attn_implementation))
            config._attn_implementation = ATTENTION_NAME
        # Compiled code may have been traced without the hooks, and row counts change from prompt to prompt.
        for part, name, eager in self._adapter.compiled_parts():
            on(partial(setattr, part, name, getattr(part, name)))
            setattr(part, name, eager)

    def uninstall(self) -> None:
        """Take everything off. The caches this run filled may be read, but not be continued."""
        while self._undo:
            self._undo.pop()()
        self._forward = None
        for lease in self._leases:
            lease.active = False

    def adopt(self, lease: CacheLease) -> None:
        """Let a ragged cache that was put together elsewhere be continued inside this block."""
        lease.active = True
        self._leases.add(lease)

    # -- around the model ----------------------------------------------------------------------------------------

    def _generate(self, plain_generate: Callable) -> Callable:
        model = self._adapter.model

        def generate(*args: Any, **kwargs: Any) -> Any:
            by_place = inspect.signature(plain_generate).bind_partial(*args).arguments
            given = {"input_ids": args[0] if args else kwargs.get("inputs"), **by_place, **kwargs}
            with self.generating(Generation.of(model, kwargs), given):
                return plain_generate(*args, **kwargs)

        return generate

    @contextmanager
    def generating(self, generation: Generation, given: Mapping[str, Any]) -> Iterator[None]:
        """A `generate` call with the keywords `given`. What pruning cannot honour is refused here, before work."""
        if self._prunes:
            refuse_unsupported(self._adapter.model, given)
            self._adapter.refuse_wrong_copies(generation.copies, given)
        with self._lock:  # another thread may generate inside the same block
            self._generation, self._is_generating, self._given = generation, True, given
            self._forget_pictures()
            try:
                yield
            finally:
                self._generation, self._is_generating, self._given = Generation(), False, {}

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if not self._is_generating:  # else the tower may have run already
            self._forget_pictures()
            self._given = kwargs
        visual = None
        if input_ids is not None and input_ids.shape[1] > 0 and kwargs.get("inputs_embeds") is None:
            visual = self._adapter.visual_mask(input_ids)
        head_rows = kwargs.get("logits_to_keep", 0)
        if not isinstance(head_rows, int):
            head_rows = len(head_rows)
        self._call = _ModelCall(visual, self._adapter.family.images(kwargs), head_rows)
        if self._prunes and kwargs.get("output_attentions"):
            raise UnsupportedCallError("output_attentions is not available with pruning: attention is fused")
        if self._prunes and kwargs.get("labels") is not None and not getattr(module, "labels_follow_rows", False):
            raise UnsupportedCallError("labels cannot be given with pruning: rows they belong to may be gone")

    def _forget_pictures(self) -> None:
        """Those of a call that ended early are not the next one's."""
        if self._tower is not None:
            self._tower.forget()

    # -- around the decoder --------------------------------------------------------------------------------------

    def _before_decoder(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self._forward is not None and self._forward[1] != threading.get_ident():
            raise RuntimeError("another call is running on this model under pruning; wait for it to end")
        call, self._call = self._call, _ModelCall()
        own_mask = kwargs.pop("visual_mask", None)
        ids, embeds = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        entering = embeds if embeds is not None else ids
        assert entering is not None
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            state: Prefill | Decoding | None = self._resume(cache, kwargs, entering.shape[1]) if self._prunes else None
        else:
            given = next((mask for mask in (own_mask, self._visual_mask, call.visual) if mask is not None), None)
            visual = self._visual_rows(given, embeds is not None, *entering.shape[:2])
            state = self._begin(visual, call, kwargs, entering)
        self._forward = state, threading.get_ident()
        return args, kwargs

    def _visual_rows(self, mask: Any, has_embeds: bool, batch: int, width: int) -> np.ndarray:
        """Which rows of the batch are visual, int64 [batch, width], on the host: 0 text, else a number that all rows
        of one image share and those of the next do not.

        `mask`: what says so: an own model's splice, else the block's `visual_mask`, else the ids' placeholders.
        """
        visual = np.zeros((batch, width), dtype=np.int64)
        if mask is None:
            if has_embeds and self._prunes:
                raise UnsupportedCallError(
                    "inputs_embeds was given without visual_mask: say which rows are visual (bool [batch, rows])"
                )
            return visual
        generation = self._generation
        mask = torch.as_tensor(mask)
        if mask.shape[0] != batch and batch == mask.shape[0] * generation.copies:
            mask = mask.repeat_interleave(generation.copies, dim=0)
        if mask.shape[0] != batch or mask.shape[1] > width or (mask.shape[1] < width and not generation.is_assisted):
            raise UnsupportedCallError(
                f"visual_mask has shape {tuple(mask.shape)}; the inputs have {batch} samples of {width} rows"
            )
        visual[:, : mask.shape[1]] = mask.cpu().numpy()
        return visual

    def _begin(
        self, visual: np.ndarray, call: _ModelCall, kwargs: dict[str, Any], entering: torch.Tensor
    ) -> Prefill | None:
        """Set up a prefill. None for a dense one, which needs no more than its traces."""
        batch, width = visual.shape
        padding = _padding(kwargs.get("attention_mask"), batch, width)
        num_drafts = call.head_rows - 1 if self._generation.is_assisted and call.head_rows else 0
        copies = self._generation.copies
        if len(self._plans) not in (1, batch // copies):
            raise UnsupportedCallError(f"{len(self._plans)} pruning configs were given for {batch // copies} prompts")
        # Without a count, a stretch of visual rows is one image.
        rows_per_image = np.count_nonzero(visual) // call.num_images if call.num_images else 0
        samples: list[Sample] = []
        for fork in self._forks:
            if not 0 <= fork.of < batch:
                raise UnsupportedCallError(f"a fork of prompt {fork.of} was asked for; the batch has {batch}")
        for number, (mask, pad) in enumerate(zip(visual, padding, strict=True)):
            which = number // copies if len(self._plans) > 1 else 0
            images = _stretches(mask[pad:], rows_per_image)
            samples.append(self._sample(Rows.of_prompt(mask[pad:], num_drafts), which, images, call))
            samples[-1].original = samples[number - number % copies] if number % copies else None
        self.traces = [sample.trace for sample in samples[::copies]]
        self.rows_left = [np.arange(sample.rows.num_prompt) for sample in samples]
        if not self._prunes:
            heads = self._adapter.decoder.config.num_attention_heads
            for trace in self.traces:
                note_dense(trace, len(self._adapter.layers), heads)
            return None
        _refuse_recomputing(self._adapter.layers)
        state = Prefill(
            samples,
            padding,
            self._lease_cache(kwargs, entering, samples),
            self._adapter.layers,
            self._adapter.first_layer,
            self._adapter.decoder.rotary_emb,
            self._adapter.decoder.norm,
            self._forks,
        )
        self._show_pictures(samples[::copies], copies)
        for name in self._adapter.family.row_kwargs:
            if kwargs.get(name) is not None:
                kwargs[name] = state.pack(kwargs[name])
        return state

    def _show_pictures(self, samples: Sequence[Sample], copies: int) -> None:
        """Give what methods see before the decoder: how crops lie in the rows, and what the tower made of them."""
        if not any(BEFORE_DECODER in sample.plan.looks for sample in samples):
            self._forget_pictures()
            return
        tiles, traces = self._adapter.family.tiles(self._adapter.model, self._given), self.traces
        if not self._is_generating:
            self._given = {}
        if self._tower is not None:
            for sample, pictures in zip(samples, self._tower.take(traces, copies, tiles), strict=True):
                sample.pictures, sample.crops = pictures, [picture.crop for picture in pictures]
        elif tiles is not None:
            for sample, crops in zip(samples, crops_of(traces, tiles) or [], strict=False):
                sample.crops = [crop for crop in crops if len(crop.rows)]

    def _sample(self, rows: Rows, which: int, images: list[tuple[int, int]], call: _ModelCall) -> Sample:
        """One prompt under plan number `which`; one that nothing can be pruned in is dense."""
        plan, num_layers = self._plans[which], len(self._adapter.layers)
        if plan.method is not None and len(rows.visual) and rows.visual[-1] == rows.num_prompt - 1:
            warnings.warn(
                "a prompt ends in a visual row, so nothing after the image can ask for it: it runs dense; "
                "put text after the image",
                stacklevel=2,
            )
            plan = Plan.of(None, num_layers)
        trace = PruningTrace(
            num_rows=rows.num_prompt,
            visual_positions=rows.positions.tolist(),
            image_spans=images,
            score_pairs=[0] * num_layers,
            value_pairs=[0] * num_layers,
            lm_head_rows=call.head_rows,
        )
        return Sample(rows, plan if len(rows.visual) else Plan.of(None, num_layers), trace)

    def _lease_cache(
        self, kwargs: dict[str, Any], entering: torch.Tensor, samples: Sequence[Sample]
    ) -> CacheLease | None:
        """Make the call's cache, or a new one, ready for layers of different lengths; None without a cache."""
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None:
            if not (self._adapter.decoder.config.use_cache if use_cache is None else use_cache):
                return None
            cache = kwargs["past_key_values"] = DynamicCache()
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            raise UnsupportedCallError(
                f"past_key_values is a {type(cache).__name__}{' with offloading' * (type(cache) is DynamicCache)}; "
                "pruning needs an empty DynamicCache: layers hold different numbers of rows"
            )
        if self._forks:
            raise UnsupportedCallError("a forward with forks keeps no cache: call the model with use_cache=False")
        lease = make_ragged(cache)
        self._leases.add(lease)
        lease.renumbered = [sample.plan.renumbers for sample in samples]
        lease.note_positions(kwargs.get("position_ids"), entering.shape[1], entering.device)
        return lease

    def _resume(self, cache: DynamicCache, kwargs: dict[str, Any], width: int) -> Decoding:
        """Set up a decoding step."""
        if not all(isinstance(layer, RaggedLayer) and layer.lease in self._leases for layer in cache.layers):
            raise UnsupportedCallError(
                "past_key_values was filled outside this prune block; prefill the whole prompt inside it"
            )
        lease = cast(RaggedLayer, cache.layers[0]).lease
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = lease.following_positions(width)
        lease.note_positions(kwargs["position_ids"], width)
        return Decoding(cache, self._adapter.decoder.rotary_emb)

    def _after_decoder(self, module: nn.Module, args: tuple, output: Any) -> Any:
        state = self._forward[0] if self._forward is not None else None
        self._forward = None
        if isinstance(state, Prefill):
            self.rows_left = [sample.positions_here() for sample in state.samples]
        if isinstance(state, Prefill) and self._forks:
            self.traces = [sample.trace for sample in state.samples]
        for trace in self.traces if isinstance(state, Prefill) or not self._prunes else []:
            trace.lm_head_rows = min(trace.lm_head_rows or trace.num_rows, (trace.rows_per_layer or [0])[-1])
        hidden_states = getattr(output, "hidden_states", None)
        if hidden_states is None or not isinstance(state, Prefill) or len(state.samples) == 1:
            return output
        # Entry 0 is the input of layer 0, entry i + 1 what layer i gave. The last is already unpacked: transformers
        # puts the normed final state there.
        counts = [state.counts_per_layer[0], *state.counts_per_layer]
        output.hidden_states = tuple(
            entry if entry is None or entry.shape[0] == len(state.samples) else state.unpack(entry, counts[number])
            for number, entry in enumerate(hidden_states)
        )
        return output

    # -- around the layers ---------------------------------------------------------------------------------------

    def _before_layer(
        self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if self._forward is None or self._forward[0] is None or self._forward[1] != threading.get_ident():
            raise RuntimeError("a decoder layer was called while pruning is on, but not through its decoder")
        state = self._forward[0]
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        kwargs["forward_state"] = state
        return (state.enter_layer(number, hidden, kwargs), *rest), kwargs

    def _updated(self) -> torch.Tensor | None:
        return None if self._forward is None or self._forward[0] is None else self._forward[0].updated

    def _leave_frozen_out(self, module: nn.Module, args: tuple) -> Any:
        updated = self._updated()
        return None if updated is None else (args[0][:, updated.to(args[0].device)], *args[1:])

    def _give_frozen_zeros(self, module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
        """A frozen row's query is never read, and its attention and MLP add 0 to its state."""
        updated = self._updated()
        if updated is None:
            return None
        state = self._forward[0] if self._forward else None
        assert isinstance(state, Prefill)
        whole = output.new_zeros(output.shape[0], sum(state.counts), output.shape[-1])
        return whole.index_copy(1, updated.to(output.device), output)

    def _after_last_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._forward is None or self._forward[0] is None:
            return output
        state, last = self._forward[0], len(self._adapter.layers) - 1
        if isinstance(output, tuple):
            return (state.leave(last, output[0]), *output[1:])
        return state.leave(last, output)


def _stretches(numbers: np.ndarray, rows_per_image: int) -> list[tuple[int, int]]:
    """Where images lie, `(first row, behind its last)`: stretches of one number other than 0, each of
    `rows_per_image` where that is known (0: it is not)."""
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [
        (start, min(start + (rows_per_image or stop - first), stop))
        for first, stop in pairwise(bounds)
        if first < stop and numbers[first]
        for start in range(first, stop, rows_per_image or stop - first)
    ]


def _refuse_recomputing(layers: Sequence[Any]) -> None:
    """Gradient checkpointing runs a layer again when the rows that it had are no longer known."""
    if torch.is_grad_enabled() and any(
        getattr(layer, "gradient_checkpointing", False) and layer.training for layer in layers
    ):
        raise UnsupportedCallError(
            "gradient checkpointing runs layers a second time, which pruning does not support; turn it off "
            "(--gradient_checkpointing False): rows that left take no memory either"
        )


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


# -- who is pruning which model --------------------------------------------------------------------------------------


@dataclass
class _Seat:
    """The one place of a model where a block may sit.

    Attributes:
        lock: held while a block is put on or taken off, and during every `generate` of this project's own classes.
        run: the open block, and the thread that opened it.
    """

    lock: Any = field(default_factory=threading.RLock)
    run: tuple[PruningRun, int] | None = None


_seats: weakref.WeakKeyDictionary[nn.Module, _Seat] = weakref.WeakKeyDictionary()


def call_lock(model: nn.Module) -> Any:
    """The lock under which calls that put pruning on a model run, one at a time. Re-entrant."""
    return _seat_of(cast(Any, model).get_decoder()).lock


def _seat_of(decoder: nn.Module) -> _Seat:
    return _seats.setdefault(decoder, _Seat())


def open_run(model: nn.Module) -> PruningRun | None:
    """The run of the block that is open on this model, if one is."""
    seat = _seat_of(cast(Any, model).get_decoder())
    return None if seat.run is None else seat.run[0]


def _method_for(adapter: Adapter, config: Config) -> Method | None:
    """A config as the method that prunes this model; None where it prunes nothing."""
    method: Method | None = Method.from_any(config)
    if method is None:
        return None
    method = adapter.check(method).bind(len(adapter.layers), adapter.model.config._name_or_path)
    return None if method.is_dense else method


def _fork(adapter: Adapter, layer: int, config: Config, prompt: int) -> Fork:
    """A fork that this model can make."""
    if not adapter.first_layer <= layer < len(adapter.layers):
        raise PruningConfigError(
            f"a fork at layer {layer}: this model's prompts can be copied at the inputs of layers "
            f"{adapter.first_layer} to {len(adapter.layers) - 1}"
        )
    method = _method_for(adapter, config)
    if method is not None and method.needs_tower:
        raise PruningConfigError(f"a fork cannot prune by {method.name!r}, which chooses before the decoder")
    return Fork(layer, Plan.of(method, len(adapter.layers)), prompt)


@contextmanager
def prune(
    model: nn.Module,
    config: Config | Sequence[Config] = None,
    *,
    visual_mask: torch.Tensor | None = None,
    forks: Sequence[tuple[int, Config, int]] = (),
    ragged: bool = False,
) -> Iterator[PruningRun]:
    """Prune visual tokens in every call of `model` inside the block.

    Args:
        model: a transformers vision-language model of `supported_models()`, or this project's own; PEFT and
            `torch.compile` wrappers are looked through. A compiled decoder runs uncompiled inside the block.
        config: a method (`PruningConfig`, or any of `llava.pruning.methods`), a mapping, a JSON string or `"@file"`.
            None, or an empty `mode`, is dense: the model's own kernels run untouched, and only traces are kept.
            A list of these has one for each prompt of a batch.
        visual_mask: bool [batch, rows], for calls with `inputs_embeds`, where ids cannot tell which rows are
            visual. Padding is part of the rows. Integers instead (0: text) number the images, so that adjacent ones
            are told apart.
        forks: `(layer, config, prompt)`, by ascending layer: from `layer` on a copy of that prompt of the batch goes
            on under another config, from the states that the prompt has there. Logits and traces of the copies follow
            those of the batch. For forwards with `use_cache=False`.
        ragged: pack dense prompts too and give them a ragged cache, for callers that take it apart (`llava.serving`).

    Yields:
        The run; its `traces` are those of the last prefill, one a prompt, in batch order.

    Leaving a block, also through an exception, leaves nothing on the model. A model has one block at a time.

    Raises:
        PruningConfigError, UnsupportedModelError: before anything is changed.
        UnsupportedCallError: from inside, for a call that cannot be pruned.
        RuntimeError: a block is open on this model.
    """
    adapter = adapter_for(model)
    configs: Sequence[Any] = config if isinstance(config, list | tuple) else [config]
    methods = [_method_for(adapter, each) for each in configs]
    ways = [_fork(adapter, *fork) for fork in forks]
    if any(later.layer < fork.layer for fork, later in pairwise(ways)):
        raise PruningConfigError("forks must be given by ascending layer: logits and traces come out in that order")
    seat = _seat_of(adapter.decoder)
    run = PruningRun(adapter, methods, visual_mask, seat.lock, ways, ragged)
    with seat.lock:
        if seat.run is not None:
            here = seat.run[1] == threading.get_ident()
            raise RuntimeError(
                f"{'a' if here else 'another thread has a'} prune block {'is ' if here else ''}open on this model: "
                f"{seat.run[0]}; leave it first"
            )
        seat.run = run, threading.get_ident()
        try:
            run.install()
        except BaseException:
            run.uninstall()
            seat.run = None
            raise
    try:
        yield run
    finally:
        with seat.lock:
            run.uninstall()
            seat.run = None
