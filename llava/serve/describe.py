"""What happened to an answer, in words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from llava.constants import SMALL_MODEL
from llava.inference import Answer
from llava.serve.remote import RemoteAnswer


def describe(answer: Answer) -> str:
    """One line: what was pruned, what it saved, and how fast the answer came."""
    parts = [_pruning_in_words(answer)]
    if answer.flops_saved and answer.visual_tokens and answer.config is not None and not answer.config.is_dense:
        saved = answer.flops_saved
        parts.append(f"FLOPs saved {saved['paper']:.1%} (paper), {saved['executed']:.1%} (executed)")
    parts.append(f"first token {_seconds(answer.clock.first_token)}")
    if answer.clock.tokens_per_second is not None:
        parts.append(f"{answer.clock.tokens_per_second:.1f} tokens/s")
    if answer.finish == "length":
        parts.append(f"cut off at {answer.new_tokens} tokens")
    elif answer.finish == "interrupted":
        parts.append("stopped")
    return " · ".join(parts)


def _pruning_in_words(answer: Answer) -> str:
    config, trace, count = answer.config, answer.trace, answer.visual_tokens
    if isinstance(answer, RemoteAnswer) and answer.usage is None:
        return "no figures from the server"
    if not count:
        return "no picture in the conversation, nothing to prune"
    if isinstance(answer, RemoteAnswer) and config is not None:
        return f"kept {answer.kept} of {count} visual tokens"
    if config is None or trace is None or config.is_dense:
        return f"dense: all {count} visual tokens in every layer"
    return config.describe(trace)


def expected_speed(parameters: int) -> str | None:
    """What to expect of pruning's speed in a model too small to show it, in one sentence; None for a larger one."""
    if parameters >= SMALL_MODEL:
        return None
    return (
        f"speed: the clock tells little at {parameters / 1e6:.1f} million parameters, where calls cost more than "
        "visual tokens do; with the shape of a 1-billion-parameter LLaVA (random weights) on one CPU core, prefill is "
        "1.79 × as fast (docs/benchmarks.md)"
    )


def rows_in_words(rows_per_layer: Sequence[int]) -> str:
    """``651 ×10, 85 ×6``: how many layers in a row processed how many rows."""
    return ", ".join(f"{rows} ×{len(list(group))}" for rows, group in groupby(rows_per_layer))


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
