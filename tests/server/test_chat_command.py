"""A conversation in the terminal, with a running server."""

import contextlib
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from expertgate.server.chat_command import _answer
from expertgate.server.cli import main
from tests.server.running import environment


def talk(server, said, *options, key=None):
    return subprocess.run(
        [sys.executable, "-m", "expertgate.server.cli", "chat", "--url", server.url, *options],
        env={**environment(), "EXPERTGATE_KEY": key or server.keys["dave"]},
        input=said,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_answers_and_says_who_spoke(server):
    said = "hi\n/experts public\ngo on\n/experts news\nand now?\n\n"
    done = talk(server, said, "--experts", "-code", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"toy at {server.url}")
    lines = [line for line in done.stderr.splitlines() if line]
    assert lines == ["[public, math]", "[public]", 'not granted to you: "news"']


def test_a_wrong_key_or_no_server_is_one_line(server):
    done = talk(server, "", key="eg-wrong")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    done = talk(server, "", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "is the server running?" in done.stderr


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("text/html", b"<html>"),
        ("application/json", b'{"data": []}'),
        ("application/json", b"{}"),
        ("application/json", b"[]"),
        ("application/json", b"{"),
    ],
)
def test_a_server_of_another_kind_is_one_line(capsys, kind, page):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_): ...

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        status = main(["chat", "--url", url, "--key", "eg-any"])
        other.shutdown()
    said = f"expertgate: what answers at {url} serves no model; is it the server?\n"
    assert (status, capsys.readouterr().err) == (1, said)


def test_a_conversation_without_an_answer_ends_with_status_1(server):
    done = talk(server, "hi\nhi\n", "--experts", "news")
    assert (done.returncode, done.stderr) == (1, 'not granted to you: "news"\n' * 2)


def test_a_slip_is_one_line_and_no_message(server):
    done = talk(server, "/expert public\n/experts caf\u00e9\n\n", "--url", f"{server.url}/v1/")
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.splitlines()
        == ["the only command is /experts NAMES, as in /experts public"] * 2
    )
    for option, value in (
        ("--url", "127.0.0.1:1"),
        ("--experts", "caf\u00e9"),
        ("--key", "\u00e9"),
    ):
        done = talk(server, "hi\n", option, value)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert option in done.stderr


def answering(*texts):
    """A server that answers so, by two experts."""

    def chunk(text, **more):
        choices = [SimpleNamespace(delta=SimpleNamespace(content=text))] if text else []
        return SimpleNamespace(choices=choices, model_extra=more)

    def create(**_):
        used = chunk("", experts={"effective": ["public", "math"]})
        return contextlib.nullcontext([*map(chunk, texts), used])

    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def test_answers_stand_in_lines_of_their_own_and_who_spoke_beside_them(capsys):
    assert _answer(answering("so ", "it is"), "toy", [], None, 4, 0.0) == "so it is"
    assert capsys.readouterr() == ("so it is\n", "[public, math]\n")


def test_an_answer_orders_the_terminal_nothing(capsys):
    said = "caf\u00e9\n\t\x1b]52;c;aGk=\x07 \r\x9b2J\x7f \u200d"
    assert _answer(answering(*said), "toy", [], None, 4, 0.0) == said
    shown = "caf\u00e9\n\t\\x1b]52;c;aGk=\\x07 \\r\\x9b2J\\x7f \u200d\n"
    assert capsys.readouterr().out == shown
