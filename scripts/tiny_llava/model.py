"""The shipped model's architecture, and the forward pass that trains it.

The model is the project's own `LlavaLlamaForCausalLM` (CLIP tower, MLP projector, LLaMA decoder). Training runs
its modules, not a copy of them: only the order of calls is here, because several questions share one picture's
rows in training.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

from .data import READ, Mentions
from .renderer import LABELS, MAX_ITEMS, PATCH, SIDE
from .tokenizer import TEMPLATE

PIXEL_MEAN = PIXEL_STD = 0.5
CONTEXT_LENGTH = 1024
POINTING_LAYERS = (1, 2, 3)  # their first head learns to look at what a noun phrase names
TEXT_LAYERS = (5,)  # theirs, on the row before the answer, to look at a text that is asked for
READING_LAYER = 4  # what enters it must know what that is
READ_WIDTHS = (MAX_ITEMS + 1, *map(len, READ.values()))  # how many, and what the one is
GLYPH_WEIGHT = 3.0  # of the patch labels, the one that is learned last


def build_config(vocab_size: int) -> LlavaConfig:
    """Config of the shipped model, with what the loader and the chat read from it."""
    return LlavaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        conv_mode=TEMPLATE,
        image_aspect_ratio="pad",
        mm_hidden_size=128,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-1,
        mm_vision_select_feature="patch",
        mm_vision_tower="inside",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "projection_dim": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_act": "quick_gelu",
            "image_size": SIDE,
            "patch_size": PATCH,
        },
    )


class Learner(nn.Module):
    """The model and, for training only, heads that say what stands in a patch and what a noun phrase names."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.llava = LlavaLlamaForCausalLM(build_config(vocab_size))
        self.heads = nn.Linear(self.llava.config.mm_hidden_size, sum(LABELS.values()))
        self.readers = nn.Linear(self.llava.config.hidden_size, sum(READ_WIDTHS) + 2)
        # Plain matmul and softmax: with torch.compile on CPU its backward pass is faster than fused attention's.
        self.llava.set_attn_implementation("eager")

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patch features [B, 144, 128] of uint8 pictures [B, 96, 96, 3]."""
        return self.llava.get_vision_tower()(normalized(pixels))

    def patch_logits(self, features: torch.Tensor) -> torch.Tensor:
        """[B, 144, sum of `LABELS`]."""
        return self.heads(features)

    def answer_logits(
        self,
        context: torch.Tensor,
        valid: torch.Tensor,
        before: torch.Tensor,
        ids: torch.Tensor,
        segments: torch.Tensor,
        places: torch.Tensor,
        blind: Container[int] = (),
        mentions: Mentions | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Logits [B, T, vocabulary] for questions that share a context and do not see each other; further losses.

        `context` [B, C, 128] are projected patches or embedded words, `valid` bool [B, C] which of them count;
        `before` [P] are the ids in front of them; `ids`, `segments` (1, 2, … a question; 0 padding) and `places`
        (position behind the context) are [B, T]. In the layers that `blind` holds, questions do not see the context.

        With `mentions`, the losses are `pointing`, how far the first head of `POINTING_LAYERS` is from looking at the
        patches that a noun phrase names (of `TEXT_LAYERS`, at those of the text), and `reading`, how badly the
        phrase's last row tells, from `READING_LAYER` on, how many things it fits and what the one is.
        """
        model = self.llava.get_decoder()
        batch = context.shape[0]
        embedded = model.embed_tokens(before)[None].expand(batch, -1, -1)
        hidden = torch.cat([embedded, context, model.embed_tokens(ids)], dim=1)
        prefix = before.shape[0]
        shared = torch.cat([valid.new_ones(batch, prefix), valid], dim=1)
        in_front = torch.cat([segments.new_zeros(batch, shared.shape[1]), segments], dim=1)
        seen = torch.cat([shared, segments > 0], dim=1)
        allowed = (in_front[:, None, :] == 0) | (in_front[:, None, :] == in_front[:, :, None])
        allowed = (allowed & seen[:, None, :]).tril()
        sighted = _additive(allowed, hidden.dtype)
        start, end = prefix, prefix + context.shape[1]
        allowed = allowed.clone()
        allowed[:, end:, start:end] = False
        unsighted = _additive(allowed, hidden.dtype)
        ahead = shared.cumsum(1) - 1
        positions = torch.cat([ahead.clamp(min=0), places + ahead[:, -1:] + 1], dim=1)
        angles = model.rotary_emb(hidden, position_ids=positions)
        losses: dict[str, torch.Tensor] = {}
        for number, layer in enumerate(model.layers):
            if mentions is not None and number == READING_LAYER:
                rows = hidden[mentions.where[:, 0], mentions.where[:, 1] + end]
                losses["reading"] = reading_loss(self.readers(F.layer_norm(rows, rows.shape[-1:])), mentions)
            if mentions is not None and mentions.patches is not None and number in (*POINTING_LAYERS, *TEXT_LAYERS):
                looking = mentions.patches.any(1) & (mentions.written == (number in TEXT_LAYERS))
                if looking.any():
                    astray = self._astray(layer, hidden, angles, (start, end), mentions, looking)
                    losses["pointing"] = losses.get("pointing", 0) + astray / len(POINTING_LAYERS)
            mask = unsighted if number in blind else sighted
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=angles)
        return self.llava.lm_head(model.norm(hidden[:, end:])), losses

    def _astray(self, layer, hidden, angles, context: tuple[int, int], mentions, looking) -> torch.Tensor:
        """Cross-entropy between where head 0 of the `looking` rows looks in the context and what it should look at."""
        width = self.llava.config.head_dim
        start, end = context
        sample, row = (mentions.where[looking] + torch.tensor([0, end], device=hidden.device)).unbind(1)
        normed = layer.input_layernorm(hidden)
        rotation, turned = angles
        query = layer.self_attn.q_proj(normed[sample, row])[:, None, None, :width]
        key = layer.self_attn.k_proj(normed[:, start:end])[:, None, :, :width]
        query, _ = apply_rotary_pos_emb(query, query, rotation[sample, row][:, None], turned[sample, row][:, None])
        key, _ = apply_rotary_pos_emb(key, key, rotation[:, start:end], turned[:, start:end])
        scores = (query[:, 0] @ key[:, 0][sample].transpose(1, 2))[:, 0].float() / width**0.5
        there = scores.masked_fill(~mentions.patches[looking], -torch.inf).logsumexp(1)
        return (scores.logsumexp(1) - there).mean()

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Features → rows of the decoder."""
        return self.llava.get_model().mm_projector(features)

    def compile(self) -> None:
        """Compile every layer (alike, so each kind once); anything that is called on the modules stays the same."""
        torch._dynamo.config.recompile_limit = 64  # shapes and frozen parts differ from stage to stage
        tower = self.llava.get_vision_tower()
        for layer in (*tower.encoder.layers, *self.llava.model.layers):
            layer.compile(dynamic=False)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 96, 96, 3] → float [B, 3, 96, 96] as the model's image processor gives it."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens (targets -100 elsewhere)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def reading_loss(logits: torch.Tensor, mentions: Mentions) -> torch.Tensor:
    """How badly [n, widths + 2] tells what `Mentions` says: cross-entropies, and the distance from the centre."""
    *names, centre = logits.float().split([*READ_WIDTHS, 2], dim=-1)
    single = ~mentions.centres.isnan()
    total = F.smooth_l1_loss(2 * centre[single], 2 * mentions.centres[single], reduction="sum")
    total = total / single.sum().clamp(min=1)
    for part, said in zip(names, mentions.labels.unbind(1), strict=True):
        loss = F.cross_entropy(part, said, ignore_index=-100, reduction="sum")
        total = total + loss / (said >= 0).sum().clamp(min=1)
    return total / (len(names) + 1)


def patch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of all patch labels, patches with something on them counting four times.

    The centre of a thing is asked only where there is one.
    """
    something = labels[..., 0] > 0
    weight = torch.where(something, 1.0, 0.25)
    total = logits.new_zeros((), dtype=torch.float32)
    for number, part in enumerate(logits.float().split(list(LABELS.values()), dim=-1)):
        loss = F.cross_entropy(part.flatten(0, 1), labels[..., number].flatten(), reduction="none")
        counts = (something.float() if number >= 4 else weight).flatten()
        total = total + (GLYPH_WEIGHT if number == 2 else 1) * (loss * counts).sum() / counts.sum().clamp(min=1)
    return total / len(LABELS)
