"""The web chat with a server's model: the answers of a model here, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise

import pytest
from serving_helpers import IMAGES, alone, config_of, picture, shipped

pytest.importorskip("gradio")

from browser import chromium
from PIL import Image
from test_gradio import CONVERSATION, Page, answered, begun, free_port, opened, send, upload
from test_serving_api import KEY, running

from llava.constants import API_KEY_VARIABLE
from llava.inference import GenerationOptions, Turn
from llava.serve import gradio_pruning, remote
from llava.serve.chat import ChatSession
from llava.serve.remote import RemoteModel
from llava.serve.web.page import build_page, launch
from llava.serve.web.show import conversation, in_short
from llava.serve.web.state import WebChat
from llava.serving import Request
from llava.serving.protocol import Defaults
from llava.utils import UserError

QUESTION = "What shape is in the image?"
VTW = '{"method": "vtw", "layer": 6}'


@pytest.fixture(scope="module")
def server():
    with running(defaults=Defaults(config=config_of("shipped"), max_pictures=4)) as running_server:
        yield running_server


@pytest.fixture
def web(server):
    return WebChat(RemoteModel(server.url, KEY), {})


def expected(*turns: Turn, config="shipped", tokens=8):
    return alone(Request(shipped().checkpoint.encode(list(turns)), config_of(config), GenerationOptions(tokens)))


def ask(web, session, question=QUESTION, run="pruned", pruning="", tokens=8):
    """The last status line."""
    return list(web.ask(session, question, run, pruning, tokens, 0))[-1]


def figures(session) -> str:
    return in_short(session.chat.last_answer)


def test_a_conversation_is_that_of_a_model_here(web):
    session = begun(web, IMAGES[0])
    (shown,) = session.shown
    assert shown.image.size == Image.open(IMAGES[0]).size
    partial = []
    for _ in web.ask(session, QUESTION, "pruned", "", 8, 0):
        partial.append(session.exchanges[-1].said[0].text)
    assert all(later.startswith(earlier) for earlier, later in pairwise(partial[:-1]))
    answer = expected(Turn(QUESTION, [picture(0)]))
    assert partial[-1] == answer.text and not session.returned
    saved = f"{answer.flops_saved['executed']:.0%} less computation"
    assert figures(session).startswith(f"kept {answer.kept} of {answer.visual_tokens} visual tokens · {saved}")
    assert f"{answer.flops_saved['executed']:.1%} ({answer.flops_saved['paper']:.1%} as the paper counts)" in (
        conversation(session.exchanges)
    )
    assert shown.kept is None and "a server does not say" in shown.note

    # What was said before goes along, and a picture more.
    web.take_pictures(session, [IMAGES[1]])
    ask(web, session, "Is there a red shape?")
    second = expected(Turn(QUESTION, [picture(0)], said=answer.text), Turn("Is there a red shape?", [picture(1)]))
    assert session.chat.last_answer.text == second.text
    assert figures(session).startswith(f"kept {second.kept} of {second.visual_tokens} ")


def test_configs_are_sent_along(web):
    session = begun(web, IMAGES[2])
    ask(web, session, pruning=VTW)
    answer = expected(Turn(QUESTION, [picture(2)]), config={"method": "vtw", "layer": 6})
    assert session.chat.last_answer.text == answer.text
    assert figures(session).startswith(f"kept {answer.kept} of {answer.visual_tokens} visual tokens")
    assert f"{answer.flops_saved['executed']:.0%} less computation" in figures(session)

    session = begun(web, IMAGES[2])
    ask(web, session, run="dense")
    assert figures(session).startswith("dense: all 144 visual tokens")
    session = begun(web, IMAGES[2])
    ask(web, session, run="compare")
    assert [said.label for said in session.exchanges[0].said] == ["Dense", "Pruned"]


@pytest.mark.parametrize(
    ("pruning", "words"),
    [
        ("{", "the pruning config is no JSON: "),
        ("[1]", "the pruning config is no JSON object"),
        ('"@/etc/hostname"', "the pruning config is no JSON object"),
        ('{"method": "unheard-of"}', "answered with status 400: "),
        ('{"method": "vtw", "layer": 99}', "answered with status 400: "),
    ],
)
def test_a_wrong_config_loses_nothing(web, pruning, words):
    session = begun(web, IMAGES[0])
    status = ask(web, session, pruning=pruning)
    assert status.startswith("Error: ") and words in status and "\n" not in status
    assert (session.exchanges, session.returned) == ([], QUESTION) and session.shown[0].is_new


def test_a_server_that_goes_away(server):
    with running() as other:
        web = WebChat(RemoteModel(other.url + "/v1/", KEY), {})
        session = begun(web, IMAGES[0])
        assert ask(web, session) == "Ready."
    status = ask(web, session, "and now")
    assert status.startswith(f"Error: the server {other.url} cannot be reached (") and "is it running?" in status
    assert len(session.exchanges) == 1 and session.returned == "and now"


def test_stop_hangs_up(server, web, monkeypatch):
    def accept(self, answer, token):
        answer.ids.append(token)
        return "x", "length" if len(answer.ids) >= answer.limit else None

    monkeypatch.setattr("llava.serving.engine.Engine.accept", accept)
    session = begun(web, IMAGES[0])
    steps = web.ask(session, QUESTION, "pruned", "", 512, 0)
    for _ in range(4):
        next(steps)
    session.stop.set()
    list(steps)
    assert figures(session) == "no figures from the server · stopped"
    assert session.chat.last_answer.text.startswith("xx")
    server.settled()


def test_many_at_once_share_the_model(server, web):
    assert web.answers_at_once > 1
    sessions = [begun(web, IMAGES[number]) for number in range(4)]
    threads = [threading.Thread(target=ask, args=(web, session)) for session in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [session.chat.last_answer.text for session in sessions]
    assert texts == [expected(Turn(QUESTION, [picture(number)])).text for number in range(4)]


def test_large_pictures_are_sent_smaller(server, monkeypatch):
    monkeypatch.setattr(remote, "_LARGEST_PNG", 100)
    chat = ChatSession(RemoteModel(server.url, KEY), None)
    chat.add_picture(IMAGES[0])
    assert chat.waiting[0].url.startswith("data:image/jpeg;base64,")
    assert chat.ask(QUESTION).text


# -- the start -------------------------------------------------------------------------------------------------------


@contextmanager
def answering_with(status: int, body: bytes, kind: str = "application/json"):
    """A server that says the same to everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def message_of(url: str, key: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        RemoteModel(url, key)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_wrong_is_said_in_one_line(server):
    assert message_of("127.0.0.1:8000") == "--server is '127.0.0.1:8000'; give a URL such as http://127.0.0.1:8000"
    assert "cannot be reached" in message_of(f"http://127.0.0.1:{free_port()}")
    assert f"wants an API key; give --api-key, or set {API_KEY_VARIABLE}" in message_of(server.url)
    assert "wants another API key" in message_of(server.url, "sk-wrong")
    with answering_with(500, b'{"error": {"message": "out of\\norder"}}') as url:
        assert message_of(url) == f"the server {url} answered with status 500: out of order"
    with answering_with(200, b"<html>A page.</html>", "text/html") as url:
        assert "no OpenAI-compatible server is there" in message_of(url)
    with answering_with(200, b'{"data": []}') as url:
        assert "no OpenAI-compatible server is there" in message_of(url)


def test_openais_key_is_not_given_away(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert "wants an API key" in message_of(server.url)


def test_the_program_loads_no_model(server, monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr("llava.serve.web.page.launch", lambda web, host, port, share: served.append(web) or Page())
    monkeypatch.setattr("llava.inference.open_checkpoint", None)
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    (tmp_path / "config.json").write_text(VTW)
    assert gradio_pruning.main(["--server", server.url, "--pruning-config", f"@{tmp_path}/config.json"]) == 0
    (web,) = served
    assert web.recommended.settings == {"method": "vtw", "layer": 6}
    page = build_page(web).get_config_file()
    (box,) = (each["props"] for each in page["components"] if each["props"].get("elem_id") == "pruning")
    assert json.loads(box["value"]) == web.recommended.settings
    with pytest.raises(UserError, match="--server and --device exclude each other"):
        gradio_pruning.main(["--server", server.url, "--device", "cpu"])


# -- in a browser ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_people_share_one_model(web):
    page = launch(web, "127.0.0.1", free_port())
    try:
        with chromium() as one, chromium() as two:
            for driver, number in ((one, 0), (two, 1)):
                opened(driver, page.local_url)
                upload(driver, IMAGES[number])
            for driver in (one, two):
                send(driver, QUESTION)
            for driver, number in ((one, 0), (two, 1)):
                answered(driver)
                answer = expected(Turn(QUESTION, [picture(number)]), tokens=128)
                said = driver.execute_script(CONVERSATION)
                assert answer.text in said
                assert f"kept {answer.kept} of {answer.visual_tokens} visual tokens" in said
            assert IMAGES[0].name not in two.execute_script(CONVERSATION)
    finally:
        page.close(verbose=False)
