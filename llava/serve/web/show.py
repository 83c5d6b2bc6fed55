"""A conversation and its pictures as HTML. Whatever users, files and models say goes through `text`."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from llava.inference import Answer
from llava.serve.remote import RemoteAnswer
from llava.serve.web.settings import About
from llava.serve.web.state import Exchange, Said, Shown

LARGEST_SIDE = 1024  # pixels of a picture as it is shown

# gradio takes values for templates, too.
_TEMPLATE_MARKS = str.maketrans({"{": "&#123;", "}": "&#125;", "$": "&#36;", "`": "&#96;", "\\": "&#92;"})

MEANINGS = (
    (
        "Visual tokens kept",
        "A picture becomes a few hundred visual tokens, one for each patch of it. Those that are kept go through the "
        "rest of the model; the others are gone from there on.",
    ),
    (
        "Computation saved",
        "How much less is computed to read pictures and question (the prefill) than without pruning, as it was carried "
        "out, the cost of choosing included. “As the paper counts” looks at visual tokens alone.",
    ),
    (
        "First token",
        "Seconds from the question to the first word. In a model of a few million parameters choosing takes about as "
        "long as it saves; in one of billions, computation that is saved becomes time that is saved.",
    ),
    (
        "Trace",
        "A JSON file with everything that was decided: which patches were kept, in which layer, and what was measured.",
    ),
)


def text(raw: object) -> str:
    """Anything as text for HTML, with nothing left that means something in it."""
    return html.escape(str(raw)).translate(_TEMPLATE_MARKS)


# -- the top of the page ---------------------------------------------------------------------------------------------


def heading(model: str, placement: str) -> str:
    """The page's name, and which model answers where."""
    where = f" · {text(placement)}" if placement else ""
    return f"<h1>Ask about a picture</h1><p class='soft'>{text(model)}{where}</p>"


def method(told: About) -> str:
    """A method in two sentences, with a link to its paper."""
    words = re.sub(r"&#96;(.*?)&#96;", r"<code>\1</code>", text(told.words))
    link = f" <a href='{told.link}' target='_blank' rel='noopener'>The paper</a>" if told.link else ""
    return f"<p>{words}{link}</p>"


def meanings() -> str:
    """What the numbers below an answer mean, folded."""
    rows = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in MEANINGS)
    return f"<details><summary>What the numbers mean</summary><dl>{rows}</dl></details>"


def knob_table(knobs: Sequence[tuple[str, str, str]]) -> str:
    """A method's knobs."""
    if not knobs:
        return "<p class='soft'>This method has no knobs.</p>"
    rows = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in knobs)
    head = "<tr><th>knob</th><th>may be</th><th>default</th></tr>"
    return f"<div class='wide'><table>{head}{rows}</table></div>"


def status(line: str) -> str:
    """One line about what is going on."""
    kind = "error" if line.startswith("Error") else "busy" if line.endswith("…") else "calm"
    return f"<p role='status' class='{kind}'>{text(line)}</p>"


# -- pictures --------------------------------------------------------------------------------------------------------


def pictures(shown: Sequence[Shown]) -> str:
    """The conversation's pictures, the newest first and largest; kept patches lie over each, to be switched on."""
    if not shown:
        return "<div class='empty'><p>No picture yet</p><p class='soft'>Add one, or start from an example.</p></div>"
    return f"<div class='pictures'>{''.join(_picture(one) for one in reversed(shown))}</div>"


def _picture(one: Shown) -> str:
    over = f"<img class='kept' src='{data_url(one.kept)}' alt='its kept patches'>" if one.kept else ""
    note = f" <span class='soft'>{text(one.note)}</span>" if one.note else ""
    return (
        f"<figure class='{'new' if one.is_new else 'asked'}'><div class='frame'>"
        f"<img src='{data_url(one.image)}' alt='{text(one.name)}'>{over}</div>"
        f"<figcaption><b>{text(one.name)}</b>{note}</figcaption></figure>"
    )


def data_url(image: Image.Image) -> str:
    """A picture as a WebP in the page itself, so that nothing of it is left on the server's disk."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    written = io.BytesIO()
    image.save(written, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(written.getvalue()).decode()}"


# -- the conversation ------------------------------------------------------------------------------------------------


def conversation(exchanges: Sequence[Exchange], first: int = 1) -> str:
    """Questions and answers. `first`: the number of the first of them."""
    return "".join(_exchange(one, number) for number, one in enumerate(exchanges, first))


def _exchange(exchange: Exchange, number: int) -> str:
    names = "".join(f"<span class='name'>{text(name)}</span>" for name in exchange.pictures)
    answers = "".join(_said(said, number) for said in exchange.said)
    agreement = ""
    if len(exchange.said) == 2 and all(said.answer for said in exchange.said):
        same = exchange.said[0].text == exchange.said[1].text
        agreement = f"<p class='agreement'>{'The same answer.' if same else 'Different answers.'}</p>"
    return (
        f"<article><div class='question'>{names}<p>{text(exchange.question)}</p></div>"
        f"<div class='answers of-{len(exchange.said)}'>{answers}</div>{agreement}</article>"
    )


def _said(said: Said, number: int) -> str:
    label = f"<h3>{said.label}</h3>" if said.label else ""
    if said.answer is None:
        words = f"<p>{text(said.text)}<span class='waiting'></span></p>"
        return f"<section class='answer growing'>{label}{words}</section>"
    words = text(said.text) or "<i>(no answer: the model ended at once)</i>"
    rows = "".join(f"<dt>{text(name)}</dt><dd>{value}</dd>" for name, value in _figures(said.answer))
    name = f"answer-{number}{'-' + said.label.lower() if said.label else ''}.json"
    trace = f"<a class='trace' download='{name}' href='{_json_url(said.answer.to_dict())}'>Trace (JSON)</a>"
    details = f"<details><summary>{text(in_short(said.answer))}</summary><dl>{rows}</dl>{trace}</details>"
    return f"<section class='answer'>{label}<p>{words}</p>{details}</section>"


def in_short(answer: Answer) -> str:
    """The one figure that matters, for the line that unfolds the others."""
    parts = [_kept(answer)]
    if _is_pruned(answer) and answer.flops_saved:
        parts.append(_less(answer.flops_saved["executed"]))
    parts.extend(_end(answer))
    return " · ".join(parts)


def _figures(answer: Answer) -> Iterator[tuple[str, str]]:
    """Name and value, the value as HTML."""
    visual = _kept(answer)
    if answer.config is not None and answer.trace is not None and _is_pruned(answer):
        visual = answer.config.describe(answer.trace)  # the same, and where
    yield "Visual tokens", text(visual)
    if _is_pruned(answer) and answer.flops_saved:
        saved = answer.flops_saved
        yield "Computation saved", f"{saved['executed']:.1%} ({saved['paper']:.1%} as the paper counts)"
    clock = answer.clock
    first = f"{clock.first_token * 1000:.0f} ms" if clock.first_token < 1 else f"{clock.first_token:.2f} s"
    yield "First token", f"after {first}"
    if clock.tokens_per_second is not None:
        yield "Then", f"{clock.tokens_per_second:.1f} tokens a second"
    if answer.config is not None and (settings := answer.config.to_dict()):
        yield "Config", f"<code>{text(json.dumps(settings, ensure_ascii=False))}</code>"


def _is_pruned(answer: Answer) -> bool:
    return answer.config is not None and not answer.config.is_dense and bool(answer.visual_tokens)


def _kept(answer: Answer) -> str:
    if isinstance(answer, RemoteAnswer) and answer.usage is None:
        return "no figures from the server"
    if not answer.visual_tokens:
        return "no picture, nothing to prune"
    if not _is_pruned(answer):
        return f"dense: all {answer.visual_tokens} visual tokens"
    return f"kept {answer.kept} of {answer.visual_tokens} visual tokens"


def _less(saved: float) -> str:
    return f"{saved:.0%} less computation" if saved >= 0 else f"{-saved:.0%} more computation"


def _end(answer: Answer) -> list[str]:
    if answer.finish == "interrupted":
        return ["stopped"]
    return [f"cut off at {answer.new_tokens} tokens"] if answer.finish == "length" else []


def _json_url(value: Any) -> str:
    written = json.dumps(value, ensure_ascii=False).encode()
    return f"data:application/json;base64,{base64.b64encode(written).decode()}"
