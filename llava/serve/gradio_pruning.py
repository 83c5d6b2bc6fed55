"""Chat about pictures in the browser, with visual tokens pruned (extra ``web``).

``python -m llava.serve.gradio_pruning`` listens on this machine alone. With ``--server URL`` it loads no model and asks
the server's, as others do. What users type and what the model says is shown as text, never as HTML; pictures are
uploaded or chosen from a folder, never fetched from a URL.
"""

from __future__ import annotations

import html
import json
import os
import queue
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from llava.errors import missing_extra, tell

try:
    import gradio as gr
except ImportError as missing:
    raise SystemExit(tell(missing_extra("web", "the web chat", missing))) from missing

from llava.images import load_image
from llava.inference import Answer, GenerationOptions, LoadedModel, LoadOptions, open_checkpoint
from llava.model.recommended import PUBLISHED
from llava.options import Parser, add_model_options, add_pruning_option, from_arguments
from llava.pruning import Method, VisiPruner
from llava.pruning.methods.visipruner import STAGES
from llava.serve.chat import ChatModel, ChatSession
from llava.serve.describe import describe
from llava.serve.remote import API_KEY_VARIABLE, RemoteConfig, RemoteModel
from llava.utils import UserError, run_main
from llava.visualize.draw import overlay_kept
from llava.visualize.patches import kept_in_words, kept_rows, patch_maps

MAX_UPLOAD = "20mb"
MAX_PIXELS = 25_000_000
MAX_QUESTION = 4_000
MAX_REMOTE_ANSWERS = 32
EXAMPLE_PICTURES = Path(__file__).parent.parent / "assets" / "images"
RUNS = {"pruned": "Pruned", "dense": "Dense", "compare": "Compare both"}

CSS = """
.gradio-container { max-width: 75rem !important; margin: 0 auto !important; }
@media (max-width: 640px) { .gradio-container { padding: .5rem !important; } }
"""


class PictureFile(gr.File):
    """A file that was uploaded. Unlike gradio's own it takes no URL for the server to fetch."""

    is_template = True  # drawn by gradio as the class it extends

    def move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        if url_or_file_path is not None and "://" in str(url_or_file_path):
            raise gr.Error("pictures are not fetched from URLs; upload the file")
        return super().move_resource_to_block_cache(url_or_file_path)


@dataclass
class WebSession:
    """One browser tab: its conversation, what it shows, and the switch that stops its answer."""

    chat: ChatSession
    messages: list[dict[str, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


class WebChat:
    """What the page's controls do. Holds the model; everything of a user is in the `WebSession`.

    Attributes:
        model: here, or a server's.
        examples: pictures by name.
        recommended: pruning config that the page begins with.
    """

    def __init__(self, model: ChatModel, examples: dict[str, Path]) -> None:
        self.model = model
        self.examples = examples
        self.recommended = model.checkpoint.pruning_config()

    @property
    def answers_at_once(self) -> int:
        """A model here answers one after the other; a server has a queue of its own."""
        return MAX_REMOTE_ANSWERS if isinstance(self.model, RemoteModel) else 1

    def new_session(self) -> WebSession:
        """For every page that opens."""
        return WebSession(ChatSession(self.model, self.recommended))

    def take_picture(self, session: WebSession | None, source: str | Path | None) -> tuple[WebSession, Any, str]:
        """Put a picture to the next question. Returns the session, the picture to show, and a status line."""
        session = session or self.new_session()
        if source is None:
            session.chat.waiting = []
            return session, None, ""
        try:
            image = load_image(Path(source), max_pixels=MAX_PIXELS)
            picture = replace(self.model.checkpoint.read_picture(image), source=Path(source).name)
        except UserError as error:
            # The path on the server is nobody's business.
            return session, None, f"Error: {str(error).replace(str(source), Path(source).name)}"
        session.chat.waiting = [picture]
        return session, image, "Ask something about this picture."

    def ask(
        self,
        session: WebSession | None,
        question: str,
        run: str,
        stages: Sequence[str],
        shallow_mid_layer: float | None,
        layer_threshold: float | None,
        tokens_threshold: float | None,
        mid_deep_layer: float | None,
        max_new_tokens: float,
        temperature: float,
        pruning: str = "",
    ) -> Iterator[tuple[WebSession, list[dict[str, str]], str, Any, str]]:
        """Answer a question. Yields session, messages, what stays in the question box, kept patches, status line.

        A server's model has `pruning` (JSON; empty: the server's own) in place of the knobs. After any
        error the conversation is as it was, and the question is back in its box.
        """
        session = session or self.new_session()
        before = list(session.messages)
        kept: Any = gr.skip()
        try:
            self._prepare(
                session,
                question,
                run,
                self._config(
                    run, stages, shallow_mid_layer, layer_threshold, tokens_threshold, mid_deep_layer, pruning
                ),
                GenerationOptions(max_new_tokens=int(max_new_tokens), temperature=float(temperature)),
            )
            names = ", ".join(picture.source for picture in session.chat.waiting)
            asked = {"role": "user", "content": f"[{names}]\n{question}" if names else question}
            session.messages = [*before, asked]
            yield session, _shown(session.messages), "", kept, "Working …"
            for text in self._stream(session, question, run):
                session.messages = [*before, asked, *text]
                yield session, _shown(session.messages), "", kept, "Answering …"
            answer = session.chat.last_answer
            assert answer is not None  # the stream ended without an error
            picture, words = self._kept_picture(session, answer)
            yield session, _shown(session.messages), "", picture, describe(answer) + words
        except UserError as error:
            session.messages = before
            yield session, _shown(before), question, kept, f"Error: {error}"
        except Exception as error:  # the page must stay usable whatever a model or a driver does
            warnings.warn(f"an answer failed: {type(error).__name__}: {error}", stacklevel=1)
            session.messages = before
            failed = f"Error: the answer failed ({type(error).__name__}); the conversation is as it was. Try again."
            yield session, _shown(before), question, kept, failed

    def _config(
        self,
        run: str,
        stages: Sequence[str],
        shallow_mid_layer: float | None,
        layer_threshold: float | None,
        tokens_threshold: float | None,
        mid_deep_layer: float | None,
        pruning: str,
    ) -> Method | RemoteConfig | None:
        if run == "dense":
            return None
        if isinstance(self.recommended, RemoteConfig):
            return self.model.checkpoint.pruning_config(pruning)
        if not isinstance(self.recommended, VisiPruner):
            return self.recommended  # the page has controls for VisiPruner's knobs alone
        numbers = {
            "shallow_mid_layer": _whole(shallow_mid_layer),
            "layer_threshold": layer_threshold,
            "tokens_threshold": tokens_threshold,
            "mid_deep_layer": None if "middle" in stages else _whole(mid_deep_layer),
        }
        # Keys that the page has no control for stay as they are recommended.
        known = {key: value for key, value in self.recommended.to_dict().items() if key not in numbers}
        given = {key: value for key, value in numbers.items() if value is not None}
        return self.model.checkpoint.pruning_config({**known, **given, "mode": list(stages)})

    @staticmethod
    def _prepare(session: WebSession, question: str, run: str, config: Any, options: GenerationOptions) -> None:
        if run not in RUNS:
            raise UserError(f"{run!r} is no way to run; choose one of {', '.join(RUNS)}")
        if not question.strip():
            raise UserError("the question is empty; type one")
        if len(question) > MAX_QUESTION:
            raise UserError(f"the question has {len(question):,} characters; the limit is {MAX_QUESTION:,}")
        if not session.chat.turns and not session.chat.waiting:
            raise UserError("there is no picture yet; upload one, or choose one of the examples")
        session.chat.config, session.chat.options = config, options
        session.stop = threading.Event()

    @staticmethod
    def _stream(session: WebSession, question: str, run: str) -> Iterator[list[dict[str, str]]]:
        """The assistant's messages as they grow. Raises what the model raised."""
        pieces: queue.Queue[str | None] = queue.Queue()
        outcome: list[Any] = []

        def work() -> None:
            try:
                if run == "compare":
                    outcome.append(session.chat.compare(question, session.stop))
                else:
                    outcome.append(session.chat.ask(question, pieces.put, session.stop))
            except BaseException as error:
                outcome.append(error)
            finally:
                pieces.put(None)

        thread = threading.Thread(target=work, name="answer", daemon=True)
        thread.start()
        try:
            text = ""
            while (piece := pieces.get()) is not None:
                text += piece
                yield [{"role": "assistant", "content": text}]
        finally:
            # Also when the browser went away: nobody waits for the rest.
            session.stop.set()
            thread.join()
        result = outcome[0]
        if isinstance(result, BaseException):
            raise result
        if run == "compare":
            words = "the same answer" if result.agree else "different answers"
            yield [
                _message(f"Dense: {result.dense.text}", result.dense),
                _message(f"Pruned ({words}): {result.pruned.text}", result.pruned),
            ]
        else:
            yield [_message(result.text, result)]

    def _kept_picture(self, session: WebSession, answer: Answer) -> tuple[Image.Image | None, str]:
        """The conversation's newest picture with what was kept of it, and what is to say where that cannot be drawn."""
        pictures = [picture for turn in session.chat.turns for picture in turn.pictures]
        if not pictures:
            return None, ""
        newest = pictures[-1]
        if answer.trace is None or not answer.visual_tokens:
            return newest.image, ""
        patches = patch_maps(self.model.checkpoint, session.chat.last_prompt())[-1]
        # Pictures are spliced in order, so the newest one's rows are the last.
        kept = kept_rows(answer.trace)[-len(patches.boxes) :]
        if not patches.is_known:
            return newest.image, f" · {kept_in_words(kept)}"
        return overlay_kept(newest.image, patches, kept), ""


def _whole(value: float | None) -> Any:
    """A number box's content as an int where it is one; else as it is, for the config to refuse."""
    return int(value) if value is not None and float(value).is_integer() else value


def _shown(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages for gradio's chat, which takes them for HTML even where it is told not to take them for Markdown."""
    return [{**message, "content": html.escape(message["content"], quote=False)} for message in messages]


def _message(text: str, answer: Answer) -> dict[str, str]:
    return {"role": "assistant", "content": f"{text or '(no answer)'}\n\n— {describe(answer)}"}


def build_page(web: WebChat) -> gr.Blocks:
    """The page; `web` is what its controls do."""
    config = web.recommended
    with gr.Blocks(title="Chat about pictures, pruned", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        session = gr.State(None, time_to_live=6 * 3600)
        gr.Markdown(f"# Chat about pictures\n{_plain(web.model.checkpoint.name)} · {web.model.placement}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                upload = PictureFile(
                    label="Upload a picture", file_types=["image"], type="filepath", height=160, elem_id="upload"
                )
                example = gr.Dropdown(list(web.examples), value=None, label="or choose an example", elem_id="example")
                shown = gr.Image(
                    label="The picture",
                    interactive=False,
                    type="pil",
                    format="png",
                    height=260,
                    buttons=["fullscreen"],
                    elem_id="shown",
                )
                kept = gr.Image(
                    label="Kept patches, last answer",
                    interactive=False,
                    type="pil",
                    format="png",
                    height=260,
                    buttons=["download", "fullscreen"],  # gradio's "share" would publish
                    elem_id="kept",
                )
            with gr.Column(scale=3, min_width=280):
                messages = gr.Chatbot(
                    label="Conversation",
                    height=430,
                    render_markdown=False,
                    sanitize_html=True,
                    feedback_options=None,
                    buttons=["copy"],
                    elem_id="conversation",
                )
                status = gr.Textbox(label="Status", interactive=False, lines=2, elem_id="status")
                question = gr.Textbox(
                    label="Question", placeholder="What is in the picture?", max_length=MAX_QUESTION, elem_id="question"
                )
                with gr.Row():
                    send = gr.Button("Ask", variant="primary", elem_id="send")
                    stop = gr.Button("Stop", elem_id="stop")
                    clear = gr.Button("New conversation", elem_id="clear")
                run = gr.Radio([(name, key) for key, name in RUNS.items()], value="pruned", label="Run", elem_id="run")
                with gr.Accordion("Pruning and decoding", open=False):
                    is_ours, is_remote = isinstance(config, VisiPruner), isinstance(config, RemoteConfig)
                    knobs = config if isinstance(config, VisiPruner) else PUBLISHED
                    pruning = gr.Textbox(
                        json.dumps(config.to_dict()) if is_remote and config.settings is not None else "",
                        label="Pruning config (JSON; empty: as the server is set)",
                        max_length=MAX_QUESTION,
                        visible=is_remote,
                        elem_id="pruning",
                    )
                    if not is_ours and not is_remote:
                        gr.Markdown(f"Method: `{json.dumps(config.to_dict())}`")
                    stages = gr.CheckboxGroup(
                        list(STAGES), value=list(knobs.mode), label="Stages (mode)", visible=is_ours
                    )
                    with gr.Row(visible=is_ours):
                        shallow_mid_layer = gr.Number(knobs.shallow_mid_layer, label="shallow_mid_layer")
                        layer_threshold = gr.Number(knobs.layer_threshold, label="layer_threshold", step=0.001)
                    with gr.Row(visible=is_ours):
                        tokens_threshold = gr.Number(knobs.tokens_threshold, label="tokens_threshold", step=0.01)
                        mid_deep_layer = gr.Number(knobs.mid_deep_layer, label="mid_deep_layer (deep without middle)")
                    with gr.Row():
                        max_new_tokens = gr.Slider(1, 512, 128, step=1, label="Longest answer, tokens")
                        temperature = gr.Slider(0, 1.5, 0, step=0.05, label="Temperature (0: greedy)")

        numbers = [stages, shallow_mid_layer, layer_threshold, tokens_threshold, mid_deep_layer]
        inputs = [session, question, run, *numbers, max_new_tokens, temperature, pruning]
        outputs = [session, messages, question, kept, status]
        page.load(web.new_session, None, session, show_progress="hidden")
        # Everyone else waits in line.
        asked = [send.click, question.submit]
        gr.on(asked, web.ask, inputs, outputs, concurrency_limit=web.answers_at_once, show_progress="hidden")

        def upload_changed(state: WebSession | None, path: str | None) -> tuple[WebSession, Any, str]:
            return web.take_picture(state, path)

        def example_chosen(state: WebSession | None, name: str | None) -> tuple[WebSession, Any, str]:
            return web.take_picture(state, web.examples.get(name) if name else None)

        def stop_answer(state: WebSession | None) -> None:
            if state is not None:
                state.stop.set()

        def start_over(state: WebSession | None) -> tuple[Any, ...]:
            if state is not None:
                state.stop.set()
            return web.new_session(), [], None, None, None, None, ""

        pictured = [session, shown, status]
        upload.upload(upload_changed, [session, upload], pictured, show_progress="hidden")
        upload.clear(upload_changed, [session, upload], pictured, show_progress="hidden")
        example.input(example_chosen, [session, example], pictured, show_progress="hidden")
        stop.click(stop_answer, session, None, queue=False, show_progress="hidden")
        everything = [session, messages, upload, example, shown, kept, status]
        gr.on([clear.click, messages.clear], start_over, session, everything)
    page.queue(max_size=64)
    return page


def _plain(name: str) -> str:
    """A name for a Markdown line, with nothing left that means anything in Markdown or HTML."""
    return "".join(char if char.isalnum() or char in "-. " else "\\" + char for char in name if char not in "<>")


def example_pictures(folder: Path | None = EXAMPLE_PICTURES) -> dict[str, Path]:
    """The pictures of a folder by name."""
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    if folder is None or not folder.is_dir():
        return {}
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}


def launch(web: WebChat, host: str, port: int, *, share: bool = False, block: bool = True) -> gr.Blocks:
    """Serve the page; with `block` until it is interrupted.

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
            prevent_thread_lock=not block,
            max_file_size=MAX_UPLOAD,
            footer_links=[],
            theme=theme,
            css=CSS,
            ssr_mode=False,
            quiet=not block,
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --port") from error
    return page


def _text_of(given: str | None) -> str | None:
    """A config from the command line, its file read where it names one."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--pruning-config {given}: the file cannot be read") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Raises `UserError` on bad input, before weights are read where possible."""
    parser = Parser(description="Chat about pictures in the browser, with visual tokens pruned.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--share", action="store_true", help="publish the page through gradio's servers")
    parser.add_argument(
        "--server", metavar="URL", help="ask the model of a server, such as python -m llava.serve.api, and load none"
    )
    parser.add_argument("--api-key", help=f"the server's (default: ${API_KEY_VARIABLE}, which `ps` does not show)")
    add_pruning_option(parser)
    add_model_options(parser)
    args = parser.parse_args(argv)
    if not 0 < args.port < 65536:
        raise UserError(f"--port is {args.port}; it must be from 1 to 65535")
    if args.server is not None:
        for name in ("model_path", "model_base", "conv_mode", *(each.name for each in fields(LoadOptions))):
            if getattr(args, name) != parser.get_default(name):
                raise UserError(f"--server and --{name.replace('_', '-')} exclude each other: the server has the model")
        model: ChatModel = RemoteModel(args.server, args.api_key or os.environ.get(API_KEY_VARIABLE))
        config = model.checkpoint.pruning_config(_text_of(args.pruning_config))
    else:
        checkpoint = open_checkpoint(args.model_path, args.model_base, args.conv_mode)
        config = checkpoint.pruning_config(args.pruning_config)
        model = LoadedModel(checkpoint, from_arguments(LoadOptions, args))
    web = WebChat(model, example_pictures())
    web.recommended = config
    launch(web, args.host, args.port, share=args.share)
    return 0


if __name__ == "__main__":
    run_main(main)
