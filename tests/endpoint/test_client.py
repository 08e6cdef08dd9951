"""The endpoint's client against a real server: retries, pauses, and one line for every failure."""

from __future__ import annotations

import socket
import time

import pytest

from pem_composition.endpoint.client import Endpoint, Service
from pem_composition.errors import RunFailed, UsageError

pytest.importorskip("openai")
KEY = "sk-secret-of-the-test"
ASK = [{"role": "user", "content": "hello"}]
FAIL = {"error": {"message": f"went wrong, {KEY}", "type": "server", "code": None}}


def service(server, **changes):
    return Service(**({"model": "m", "base_url": server.url, "retries": 2} | changes))


def test_a_question_and_its_reply(server):
    server.answer = lambda messages: messages[-1]["content"].upper()
    asked = service(server, temperature=0.5, reply_tokens=7)
    assert Endpoint(asked).ask(ASK) == ("HELLO", 10)
    (request,) = server.requests
    assert request["messages"] == ASK and request["model"] == "m"
    assert (request["temperature"], request["max_tokens"]) == (0.5, 7)
    assert server.keys == [f"Bearer {KEY}"]
    server.usage = None
    assert Endpoint(service(server)).ask(ASK).tokens is None
    assert "temperature" not in server.requests[-1]


def test_a_rate_limit_is_waited_for_as_long_as_it_says(server):
    server.script = [(429, {"Retry-After": "1"}, FAIL)]
    begin = time.monotonic()
    assert Endpoint(service(server)).ask(ASK).text == "hello"
    assert time.monotonic() - begin >= 1 and len(server.requests) == 2


def test_a_failing_server_is_asked_again(server):
    server.script = [(500, {"Retry-After": "0.01"}, FAIL), (503, {"Retry-After": "0.01"}, FAIL)]
    assert Endpoint(service(server)).ask(ASK).text == "hello"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (429, RunFailed, "the rate limit holds after 2 tries; found 429"),
        (500, RunFailed, "the server fails after 2 tries; found 500"),
        (400, RunFailed, "the request failed; found 400"),
        (401, UsageError, "refuses the key in OPENAI_API_KEY"),
        (403, UsageError, "refuses the key in OPENAI_API_KEY"),
        (404, UsageError, "no such model or path; found model m; check --model and --base_url"),
    ],
)
def test_a_lasting_failure_is_one_line_without_the_key(server, status, error, words):
    server.script = [(status, {"Retry-After": "0.01"}, FAIL)] * 2
    with pytest.raises(error, match=words) as raised:
        Endpoint(service(server, retries=1)).ask(ASK)
    told = str(raised.value)
    assert KEY not in told and "\n" not in told and told.startswith("127.0.0.1:")
    assert type(raised.value) is error
    assert len(server.requests) == (2 if status in (429, 500) else 1)


def test_a_refused_connection_is_named(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    closed = service(server, base_url=f"http://user:word@127.0.0.1:{port}/v1", retries=0)
    with pytest.raises(RunFailed, match=rf"^127.0.0.1:{port}/v1: cannot be reached") as raised:
        Endpoint(closed).ask(ASK)
    assert "word" not in str(raised.value)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>welcome</html>",
        b"{not json",
        b"",
        {"choices": []},
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": None}}]},
        {"hello": "world"},
    ],
)
def test_a_reply_in_another_form_is_refused(server, body):
    server.script = [(200, {}, body)]
    with pytest.raises(RunFailed, match=r"not a chat reply.*expected choices\[0\]"):
        Endpoint(service(server)).ask(ASK)


def test_what_is_missing_is_named_before_anything_is_asked(server, monkeypatch):
    for url in ("127.0.0.1:80", "ftp://host/v1", "http://host:99999/v1"):
        with pytest.raises(UsageError, match="--base_url: not a URL"):
            Endpoint(service(server, base_url=url))
    with pytest.raises(UsageError, match="OTHER_KEY: no key in the environment; export OTHER_KEY"):
        Endpoint(service(server, key_variable="OTHER_KEY"))
    monkeypatch.setenv("OPENAI_API_KEY", " ")
    with pytest.raises(UsageError, match="OPENAI_API_KEY: no key"):
        Endpoint(service(server))
    assert not server.requests
