"""The page: where everything stands, and which control does what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from llava.pruning import METHODS
from llava.pruning.methods.visipruner import SINKS, STAGES
from llava.serve.web import show
from llava.serve.web.settings import MAX_CONFIG, about, as_text, knobs_of
from llava.serve.web.state import MAX_QUESTION, RUNS, WebChat, WebSession
from llava.serve.web.upload import UploadedFile
from llava.utils import UserError

MAX_UPLOAD = "20mb"
HERE = Path(__file__).parent
TITLE = "Ask about a picture · VisiPruner"

# gradio builds the page piece by piece. Should its end never be reported, it is shown all the same.
UNTIL_BUILT = """<style>
html:not(.is-built) gradio-app { visibility: hidden; animation: built 0s 15s forwards; }
html:not(.is-built)::before { content: "Opening the page …"; position: fixed; inset: 40vh 0 auto; text-align: center;
  font: 1rem system-ui, sans-serif; color: gray; animation: gone 0s 15s forwards; }
@keyframes built { to { visibility: visible; } }
@keyframes gone { to { visibility: hidden; } }
</style>"""

# What happens in the browser alone, at once: nothing that is typed meanwhile can get lost.
ASK = f"(asked, question) => [question, '', {show.status('Waiting for the model …')!r}]"
PUT_BACK = "(question, returned) => question || returned"
EXPORT = """(config) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([(config || '{}') + '\\n'], {type: 'application/json'}));
  link.download = 'pruning_config.json';
  link.click();
  URL.revokeObjectURL(link.href);
}"""
SWITCH_THEME = """() => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('visipruner-theme', dark ? 'dark' : 'light');
}"""


def build_page(web: WebChat) -> gr.Blocks:
    """The page; `web` is what its controls do."""
    name = getattr(web.recommended, "name", "visipruner")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(None, time_to_live=6 * 3600)
        with gr.Row(elem_id="head"):
            with gr.Column(elem_id="about"):
                heading = gr.HTML(show.heading(web.model.checkpoint.name, web.model.placement), elem_id="heading")
                method_told = gr.HTML(show.method(about(name)), elem_id="method-told")
                gr.HTML(show.meanings(), elem_id="meanings")
            with gr.Row(elem_id="tools"):
                clear = gr.Button("New conversation", size="sm", elem_id="clear")
                theme = gr.Button("Light / dark", size="sm", elem_id="theme")
        with gr.Row(elem_id="work"):
            with gr.Column(elem_id="stage"):
                stage = gr.HTML(show.pictures([]), elem_id="shown")
                with gr.Row(elem_id="over"):
                    gr.Checkbox(True, label="Show kept patches", interactive=True, elem_id="toggle")
                    take_back = gr.Button("Take back new picture", size="sm", elem_id="take-back")
            with gr.Column(elem_id="pictures"):
                upload = UploadedFile(
                    label="Add pictures",
                    file_types=["image"],
                    file_count="multiple",
                    type="filepath",
                    height=48,
                    elem_id="upload",
                )
                examples = {}
                with gr.Row(elem_id="examples"):
                    for example, (path, asks) in web.examples.items():
                        examples[example] = gr.Button(asks, icon=path, size="sm", elem_classes="example")
            with gr.Column(elem_id="talk"):
                past = gr.HTML("", elem_id="past")
                current = gr.HTML("", elem_id="current")
            with gr.Column(elem_id="composer"):
                with gr.Row(elem_id="ask"):
                    question = gr.Textbox(
                        placeholder="Ask about the picture",
                        label="Question",
                        show_label=False,
                        container=False,
                        lines=1,
                        max_lines=5,
                        max_length=MAX_QUESTION,
                        autofocus=True,
                        elem_id="question",
                    )
                    send = gr.Button("Ask", variant="primary", elem_id="send")
                with gr.Row(elem_id="how"):
                    ways = [(label, key) for key, label in RUNS.items()]
                    run = gr.Radio(ways, value="pruned", label="Run", show_label=False, container=False, elem_id="run")
                    stop = gr.Button("Stop", size="sm", elem_id="stop")
                status = gr.HTML(show.status("Connecting …"), elem_id="status")
        with gr.Accordion("Settings: method, config, length of answers", open=False, elem_id="settings"):
            config = _config_editor(web, name, method_told)
            with gr.Row():
                max_new_tokens = gr.Slider(1, 512, 128, step=1, label="Longest answer, tokens", elem_id="length")
                temperature = gr.Slider(0, 1.5, 0, step=0.05, label="Temperature (0: always the likeliest word)")
        # On the page, as only such a box can be filled by the browser; the style hides them.
        asked = gr.Textbox(label="asked", max_length=MAX_QUESTION, elem_classes="hidden-box")
        returned = gr.Textbox(label="returned", elem_classes="hidden-box")

        def arrive() -> Iterator[tuple[WebSession | Any, str, str]]:
            state: WebSession | Any = web.new_session()
            for line in web.arrival():
                yield state, show.status(line), show.heading(web.model.checkpoint.name, web.model.placement)
                state = gr.skip()  # what the tab did meanwhile stays

        def answer(state: WebSession | None, *given: Any) -> Iterator[tuple[Any, ...]]:
            state = state or web.new_session()
            drawn: Any = None  # the earlier exchanges and the pictures, as long as they do not change
            for line in web.ask(state, *given):
                if state.is_left:
                    yield (gr.skip(),) * len(outputs)  # gradio shows the last step once more at the end
                    continue
                is_over = line == "Ready." or line.startswith("Error")
                earlier = state.exchanges if is_over else state.exchanges[:-1]
                now = [] if is_over else state.exchanges[-1:]
                skip = drawn is not None and not is_over
                drawn = gr.skip() if skip else (show.conversation(earlier), show.pictures(state.shown))
                yield (
                    state,
                    *((drawn, drawn) if skip else drawn),
                    show.conversation(now, len(earlier) + 1),
                    show.status(line),
                    state.returned,
                )

        def added(state: WebSession | None, paths: Sequence[str] | None) -> tuple[Any, ...]:
            state = state or web.new_session()
            line = web.take_pictures(state, paths or [])
            return state, None, show.pictures(state.shown), show.status(line)

        def taken_back(state: WebSession | None) -> tuple[Any, ...]:
            state = state or web.new_session()
            line = web.take_back(state)
            return state, show.pictures(state.shown), show.status(line)

        def stopped(state: WebSession | None) -> None:
            if state is not None:
                state.stop.set()

        def started_over(state: WebSession | None) -> tuple[Any, ...]:
            if state is not None:
                state.is_left = True
            stopped(state)
            return web.new_session(), "", "", show.pictures([]), show.status("Ready.")

        quietly: dict[str, Any] = {"show_progress": "hidden"}
        page.load(arrive, None, [session, status, heading], concurrency_limit=None, **quietly)
        inputs = [session, asked, run, config, max_new_tokens, temperature]
        outputs = [session, past, stage, current, status, returned]
        gr.on(
            [send.click, question.submit], None, [asked, question], [asked, question, status], js=ASK, **quietly
        ).then(answer, inputs, outputs, concurrency_limit=web.answers_at_once, **quietly).then(
            None, [question, returned], question, js=PUT_BACK, **quietly
        )
        upload.upload(added, [session, upload], [session, upload, stage, status], **quietly)
        take_back.click(taken_back, session, [session, stage, status], **quietly)
        for example, button in examples.items():
            button.click(_example(web, example), session, [session, stage, status, question], **quietly)
        stop.click(stopped, session, None, queue=False, **quietly)
        clear.click(started_over, session, [session, past, current, stage, status], **quietly)
        theme.click(None, None, None, js=SWITCH_THEME, **quietly)
        page.load(None, None, None, js=(HERE / "page.js").read_text(encoding="utf-8"), **quietly)
    page.queue(max_size=64)
    return page


def _example(web: WebChat, name: str) -> Any:
    """What a click on an example does: its picture is there, and its question in the box."""
    path, asks = web.examples[name]

    def chosen(state: WebSession | None) -> tuple[Any, ...]:
        state = state or web.new_session()
        while state.shown and state.shown[-1].is_new:  # another example, or a picture that was not asked about
            web.take_back(state)
        line = web.take_pictures(state, [path])
        return state, show.pictures(state.shown), show.status(line), asks

    return chosen


def _config_editor(web: WebChat, name: str, told: gr.HTML) -> gr.Textbox:
    """The controls of the pruning config; gives the box with its JSON, which is what counts."""
    settings = web.settings
    initial = as_text(web.recommended.to_dict()) if web.recommended.to_dict() else ""
    box: dict[str, Any] = {"max_length": MAX_CONFIG, "lines": 7, "max_lines": 16, "elem_id": "pruning"}
    if settings is None:
        config = gr.Textbox(initial, label="Pruning config (JSON; empty: as the server is set)", **box)
        _import_and_export(config)
        return config
    knobs, layers = settings.knobs, settings.num_layers - 1
    chosen = gr.Dropdown(sorted(METHODS), value=name, label="Method", elem_id="method")
    with gr.Row(elem_id="editor"):
        with gr.Column(visible=name == "visipruner", elem_id="knobs") as controls:
            shown: dict[str, Any] = {
                "mode": gr.CheckboxGroup(
                    list(STAGES), value=list(knobs["mode"]), label="Stages (mode)", elem_id="mode"
                ),
                "shallow_mid_layer": gr.Slider(
                    1, layers, knobs["shallow_mid_layer"], step=1, label="shallow_mid_layer"
                ),
                "layer_threshold": gr.Number(knobs["layer_threshold"], label="layer_threshold", step=0.001),
                "tokens_threshold": gr.Number(knobs["tokens_threshold"], label="tokens_threshold", step=0.01),
                "mid_deep_layer": gr.Slider(
                    1, layers, knobs["mid_deep_layer"], step=1, label="mid_deep_layer (deep without middle)"
                ),
                "exit_threshold": gr.Number(knobs["exit_threshold"], label="exit_threshold", step=0.0001),
                "exit_patience": gr.Number(knobs["exit_patience"], label="exit_patience", precision=0),
                "keep": gr.Textbox(_boxed(knobs["keep"]), label="keep (in place of tokens_threshold; empty: none)"),
                "shallow_sink": gr.Dropdown(
                    [("by the model", ""), *((each, each) for each in SINKS)],
                    value=_boxed(knobs["shallow_sink"]),
                    label="shallow_sink",
                ),
                "probe_rows": gr.Dropdown(["last", "text"], value=knobs["probe_rows"], label="probe_rows"),
                "relative": gr.Checkbox(knobs["relative"], label="relative"),
            }
        with gr.Column(elem_id="json"):
            config = gr.Textbox(initial, label="Pruning config (JSON)", **box)
            note = gr.HTML("", elem_id="config-note")
            _import_and_export(config)
            table = gr.HTML(show.knob_table(knobs_of(name, settings.num_layers)), elem_id="knob-table")

    def written(*values: Any) -> str:
        return settings.written(dict(zip(shown, values, strict=True)))

    def read(text: str) -> tuple[Any, ...]:
        """Set everything beside the box from what it says; as long as that is no config, only a line under it."""
        try:
            method = settings.check(text).name
        except UserError as error:
            return show.status(f"Error: {error}"), *[gr.skip()] * (4 + len(shown))
        values = settings.read(text)
        of_knobs = [_boxed(values[key]) if values and key in values else gr.skip() for key in shown]
        knob_table = show.knob_table(knobs_of(method, settings.num_layers))
        return "", method, show.method(about(method)), gr.Column(visible=values is not None), knob_table, *of_knobs

    quietly: dict[str, Any] = {"show_progress": "hidden", "queue": False}
    everything = list(shown.values())
    gr.on([each.input for each in everything], written, everything, config, **quietly)
    chosen.input(settings.start_of, chosen, config, **quietly)
    config.change(read, config, [note, chosen, told, controls, table, *everything], **quietly)
    return config


def _boxed(value: Any) -> Any:
    """A knob's value for its control: gradio would show no number as 0."""
    return "" if value is None else value


def _import_and_export(config: gr.Textbox) -> None:
    """A file into the box, and the box into a file."""
    with gr.Row(elem_id="files"):
        given = UploadedFile(file_types=[".json"], type="binary", height=48, elem_id="import")
        export = gr.Button("Export this config", size="sm", elem_id="export")

    def imported(content: bytes | None) -> tuple[Any, None]:
        try:
            text = (content or b"").decode()
        except UnicodeDecodeError as error:
            raise gr.Error("that file is no text, so it is no JSON") from error
        return (text if len(text) <= MAX_CONFIG else gr.skip()), None

    given.upload(imported, given, [config, given], show_progress="hidden")
    export.click(None, config, None, js=EXPORT, show_progress="hidden")


def launch(web: WebChat, host: str, port: int, *, share: bool = False) -> gr.Blocks:
    """Serve the page, in threads; `block_thread` of what comes back waits until it is interrupted.

    Raises:
        UserError: the port is taken.
    """
    page = build_page(web)
    # System fonts: a page on a machine without network must not wait for a font server.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=share,
            prevent_thread_lock=True,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=theme,
            css_paths=HERE / "style.css",
            head=UNTIL_BUILT,
            ssr_mode=False,
            quiet=True,
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port") from error
    return page
