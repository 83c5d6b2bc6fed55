"""From tokens to text, piece by piece: nothing that is given out is ever taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF_A_CHARACTER = "\ufffd"


class AnswerText:
    """The text of one answer as it grows. White space around it is left out, as are special tokens.

    Args:
        tokenizer: not used by any other thread meanwhile.
        stops: texts that end the answer and are no part of it.

    Attributes:
        stopped: whether one of `stops` came.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._context = self._read = (
            0  # tokens from `_context` on are decoded again, for the sake of those from `_read`
        )
        self._held = ""
        self._has_begun = False
        self.stopped = False

    def push(self, token: int) -> str:
        """Take up a token; gives the text that is sure to be part of the answer now."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._read])
        text = self._decode(self._ids[self._context :])
        if len(text) <= len(before) or text.endswith(_HALF_A_CHARACTER):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return self._release(text[len(before) :])

    def finish(self) -> str:
        """What was held back, at the answer's end."""
        before = self._decode(self._ids[self._context : self._read])
        rest = self._decode(self._ids[self._context :])[len(before) :] if not self.stopped else ""
        self._context = self._read = len(self._ids)
        out = self._release(rest)
        held, self._held = self._held.rstrip(), ""
        return out + (held if self._has_begun else held.lstrip())

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return self._begun(text[: min(found)].rstrip())
        # Kept back: what may be the beginning of a stop, and white space that may be the last.
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        sure = text[: len(text) - keep].rstrip()
        self._held = text[len(sure) :]
        return self._begun(sure)

    def _begun(self, text: str) -> str:
        if not self._has_begun:
            text = text.lstrip()
            self._has_begun = bool(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
