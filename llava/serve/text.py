"""Text on its way to a terminal."""

import unicodedata

# Marks that turn the direction of text around: harmless in a sentence, a way to fake one in a terminal.
_BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def clean_text(text: str) -> str:
    """``text`` without what a terminal would obey: control characters (but newline and tab) and bidi controls."""
    return "".join(
        char for char in text if char in "\n\t" or not (unicodedata.category(char) == "Cc" or char in _BIDI_CONTROLS)
    )
