"""The method written as plainly as it can be, to judge the engine by: one prompt, full length, no cache.

Every row stays in every layer. Attention weights are formed, softmaxed, and then set to zero where the shallow
stage says so; pruned rows are masked out. Nothing here is shared with `llava.pruning`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv


@dataclass
class NaiveResult:
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    select_layer: int | None = None
    kept: list[int] = field(default_factory=list)
    exit_layer: int | None = None
    present: torch.Tensor | None = None  # bool [layers, prompt rows]


def heads_of(attention: nn.Module, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
    """Queries, keys and values of normed rows `[1, rows, hidden]` after RoPE, every head with its own: the queries
    `[1, heads, rows, head_dim]`, the others `[heads, rows, head_dim]`."""
    shape = (1, normed.shape[1], -1, attention.head_dim)
    query, key = apply_rotary_pos_emb(
        attention.q_proj(normed).view(shape).transpose(1, 2),
        attention.k_proj(normed).view(shape).transpose(1, 2),
        cos,
        sin,
    )
    value = attention.v_proj(normed).view(shape).transpose(1, 2)
    return query, *(repeat_kv(part, attention.num_key_value_groups)[0] for part in (key, value))


def shallow_edit(weights: torch.Tensor, visual: torch.Tensor, num_prompt: int, rule: str) -> torch.Tensor:
    """Zero softmaxed weights `[heads, rows, rows]` of prompt rows; `rule` is `none`, `first` or `half`."""
    weights = weights.clone()
    columns = visual.nonzero().flatten()
    v0 = int(columns[0])
    for row in range(v0, num_prompt):
        if rule == "none":
            if not visual[row]:
                weights[:, row, columns] = 0
        elif rule == "first" or visual[row]:
            mass = weights[:, row, columns].sum(-1)
            weights[:, row, columns] = 0
            if not visual[row]:
                weights[:, row, v0] = mass
        else:
            weights[:, row, columns[: len(columns) // 2]] = 0
    return weights


def naive_generate(
    model: nn.Module, embeds: torch.Tensor, visual: torch.Tensor, config: dict, rule: str, new_tokens: int
) -> NaiveResult:
    """Greedy decoding of one prompt `[N, H]` whose visual rows are `visual`, under a published-style config."""
    result = NaiveResult()
    decoder, mode = model.model, config["mode"]
    num_layers, num_prompt = len(decoder.layers), len(embeds)
    sml = config.get("shallow_mid_layer")
    result.present = torch.ones(num_layers, num_prompt, dtype=torch.bool)
    if "deep" in mode and "middle" not in mode and visual.any():
        result.present[config["mid_deep_layer"] :, visual] = False
        result.exit_layer = config["mid_deep_layer"]
    hidden_all = embeds

    for step in range(new_tokens):
        hidden, rows = hidden_all[None], len(hidden_all)
        cos, sin = decoder.rotary_emb(hidden, position_ids=torch.arange(rows)[None])
        causal = torch.ones(rows, rows, dtype=torch.bool).tril()
        quiet = 0
        for number, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query, key, value = heads_of(attention, normed, cos, sin)
            present = torch.cat([result.present[number], torch.ones(rows - num_prompt, dtype=torch.bool)])
            scores = query[0] @ key.transpose(1, 2) * attention.scaling
            scores = scores.masked_fill(~(causal & present), -torch.inf)
            weights = torch.softmax(scores, dim=-1).nan_to_num()  # a pruned row may see no key at all
            if "shallow" in mode and number < sml and visual.any():
                weights = shallow_edit(weights, visual, num_prompt, rule if number == 0 else "none")
            heads = weights @ value  # [heads, rows, head_dim]

            if step == 0 and "middle" in mode and visual.any() and number > sml:
                here = (visual & result.present[number]).nonzero().flatten()
                asking = [num_prompt - 1]
                if config.get("probe_rows") == "text":
                    asking = [row for row in range(int(visual.nonzero()[0]), num_prompt) if not visual[row]]
                measured = []
                for row in asking:
                    output = heads[:, row].flatten()
                    shares = (weights[:, row, here, None] * value[:, here]).transpose(0, 1).flatten(1)
                    cosines = torch.cosine_similarity(output - shares, output[None], dim=-1)
                    lengths = shares.norm(dim=-1) / (output.norm() if config.get("relative") else 1)
                    measured.append((cosines, lengths))
                cosine = torch.stack([cosines for cosines, _ in measured]).amin(0)
                norm = torch.stack([lengths for _, lengths in measured]).amax(0)
                if result.select_layer is None:
                    if (cosine < config["layer_threshold"]).any():
                        result.select_layer = number
                        if "keep" in config:
                            keep = torch.zeros(len(here), dtype=torch.bool)
                            images = int((visual & ~visual.roll(1)).sum())
                            keep[norm.argsort(descending=True, stable=True)[: config["keep"] * images]] = True
                        else:
                            keep = norm > config["tokens_threshold"]
                        result.kept = here[keep].tolist()
                        result.present[number + 1 :, here[~keep]] = False
                elif "deep" in mode and len(here):
                    quiet += not (cosine < config.get("exit_threshold", 0.999)).any()
                    if quiet == config.get("exit_patience", 2):
                        result.present[number + 1 :, here] = False
                        if number + 1 < num_layers:
                            result.exit_layer = number + 1

            hidden = hidden + attention.o_proj(heads.transpose(0, 1).flatten(1)[None])
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits = model.lm_head(decoder.norm(hidden[0, -1]))
        result.logits.append(logits)
        result.tokens.append(int(logits.argmax()))
        token = torch.tensor([result.tokens[-1]])
        hidden_all = torch.cat([hidden_all, decoder.embed_tokens(token)])
    return result
