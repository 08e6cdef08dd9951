"""The endpoint's client against a real server: retries, pauses, and one line for every failure."""

from __future__ import annotations

import socket
import time

import pytest

from pem_composition.endpoint.client import Endpoint
from pem_composition.endpoint.service import Service
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
    assert Endpoint(asked).ask(ASK) == ("HELLO", 10, "finished")
    (request,) = server.requests
    assert request["messages"] == ASK and request["model"] == "m"
    assert (request["temperature"], request["max_tokens"]) == (0.5, 7)
    assert server.keys == [f"Bearer {KEY}"]
    server.usage = None
    assert Endpoint(service(server)).ask(ASK).tokens is None
    assert "temperature" not in server.requests[-1]


@pytest.mark.slow
def test_a_rate_limit_is_waited_for_as_long_as_it_says(server):
    server.script = [(429, {"Retry-After": "1"}, FAIL)]
    begin = time.monotonic()
    assert Endpoint(service(server)).ask(ASK).text == "hello"
    assert time.monotonic() - begin >= 1 and len(server.requests) == 2


def test_a_failing_server_is_asked_again(server):
    server.script = [(500, {"Retry-After": "0.01"}, FAIL), (503, {"Retry-After": "0.01"}, FAIL)]
    assert Endpoint(service(server)).ask(ASK).text == "hello"
    assert len(server.requests) == 3


@pytest.mark.slow
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
        {"hello": "world"},
    ],
)
def test_a_reply_in_another_form_is_refused(server, body):
    server.script = [(200, {}, body)]
    with pytest.raises(RunFailed, match=r"not a chat reply.*expected choices\[0\]"):
        Endpoint(service(server, retries=0)).ask(ASK)


def said(content, end="stop", **more):
    """A reply with status 200."""
    message = {"role": "assistant", "content": content, **more}
    choice = {"index": 0, "message": message, "finish_reason": end}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "text", "end"),
    [
        (said("7"), "7", "finished"),
        (said("7", None), "7", "finished"),
        (said("There are 3", "length"), "There are 3", "cut"),
        (said("There are 3", "MAX_TOKENS"), "There are 3", "cut"),
        (said(None, "length", reasoning_content="3 things"), "", "cut"),
        (said("", "length"), "", "cut"),
        (said(None, reasoning_content="3 things"), "", "finished"),
        (said("7", reasoning_content="3 things"), "7", "finished"),
        (said("<think>3 things</think>\n\n7"), "7", "finished"),
        (said("<think>\n\n</think>\n\n7"), "7", "finished"),
        (said("3 things, so:</think>7"), "7", "finished"),
        (said("<think>3 things"), "", "finished"),
        (said("<think>3 things", "length"), "", "cut"),
        (said("<think>3</think>\n7\n<think>or 4"), "7", "finished"),
        (said("<THINKING>3</THINKING>7"), "7", "finished"),
        (said("[THINK]3 things[/THINK]7"), "7", "finished"),
        (said("<|channel|>analysis<|message|>3<|end|><|start|>assistant"
              "<|channel|>final<|message|>7"), "7", "finished"),
        (said([{"type": "thinking", "text": "3"}, {"type": "text", "text": "7"}]), "7", "finished"),
        (said(None), "no content", "refused"),
        (said(None, refusal="I cannot help."), "I cannot help.", "refused"),
        (said("", "content_filter"), "content_filter", "refused"),
        (said("Some", "SAFETY"), "SAFETY", "refused"),
        (said(None, "tool_calls", tool_calls=[]), "no content", "refused"),
        ({"error": {"code": "content_filter", "message": "no"}}, None, "refused"),
    ],
)  # fmt: skip
def test_how_a_reply_ends_and_what_is_said_without_the_thoughts(server, body, text, end):
    server.script = [(200, {}, body)]
    reply = Endpoint(service(server)).ask(ASK)
    assert reply.end == end and text in (None, reply.text)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"code": "content_filter", "message": "The response was filtered due to the prompt"}),
        (400, {"code": None, "innererror": {"code": "ResponsibleAIPolicyViolation"}}),
        (400, {"code": "content_policy_violation", "message": "no"}),
        (400, {"code": "invalid_prompt", "message": "your prompt was flagged"}),
        (403, {"code": 403, "message": "needs moderation; your input was flagged"}),
    ],
)
def test_a_filtered_question_is_a_refusal(server, status, error):
    server.script = [(status, {}, {"error": error})]
    assert Endpoint(service(server)).ask(ASK).end == "refused" and len(server.requests) == 1


@pytest.mark.slow
def test_a_body_that_breaks_off_is_asked_for_again(server):
    kind = {"Content-Type": "application/json"}
    server.script = [(200, kind, b'{"id": "1", "choices": [{"ind'), (200, kind, b"")]
    assert Endpoint(service(server)).ask(ASK).text == "hello" and len(server.requests) == 3


@pytest.mark.parametrize("only", ["max_tokens", "max_completion_tokens"])
def test_the_limit_goes_by_the_name_that_the_model_takes(server, only):
    plain = server.take

    def strict(request, key):
        other = ({"max_tokens", "max_completion_tokens"} - {only}).pop()
        answer = plain(request, key)
        told = f"Unsupported parameter: '{other}' is not supported. Use '{only}' instead."
        error = {"message": told, "param": other, "code": "unsupported_parameter"}
        return (400, {}, {"error": error}) if other in request else answer

    server.take = strict
    endpoint = Endpoint(service(server, reply_tokens=9))
    assert [endpoint.ask(ASK).text for _ in range(3)] == ["hello"] * 3
    assert len(server.requests) == 3 + (only != "max_tokens"), "found out once"
    assert server.requests[-1][only] == 9


def test_a_limit_that_is_too_large_is_told_in_the_words_of_the_server(server):
    told = {"error": {"message": "max_tokens is too large: 9999", "code": "invalid_value"}}
    unknown = {"error": {"message": "unknown parameter max_completion_tokens", "code": None}}
    server.script = [(400, {}, told), (400, {}, unknown)]
    with pytest.raises(RunFailed, match=r"the request failed; found 400 .*too large"):
        Endpoint(service(server, reply_tokens=9999)).ask(ASK)


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


def reply(**choice):
    message = {"role": "assistant", "content": "hello"}
    return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice]}


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "Provider returned error", "code": 502}},
        {"error": {"message": "Rate limit exceeded", "code": "429"}},
        reply(finish_reason="error", error={"code": 502, "message": "upstream"}),
    ],
)
def test_an_error_with_status_200_is_asked_again_where_the_next_try_may_work(server, body):
    server.script = [(200, {}, body)]
    assert Endpoint(service(server)).ask(ASK).text == "hello" and len(server.requests) == 2


def test_an_error_with_status_200_that_stays_is_named(server):
    server.script = [(200, {}, {"error": {"message": "no credits", "code": 402}})]
    with pytest.raises(RunFailed, match=r"the request failed; found .*no credits"):
        Endpoint(service(server)).ask(ASK)


LONG = "This model's maximum context length is 2048 tokens. However, you requested 5000 tokens."


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, {"choices": [{"index": 0, "finish_reason": "content_filter"}]}),
        (200, {"choices": [], "prompt_filter_results": [{"hate": {"filtered": True}}]}),
        (400, {"error": {"message": LONG}}),
        (400, {"error": {"message": "the request exceeds the available context size"}}),
    ],
)
def test_a_filter_without_a_message_and_a_question_that_is_too_long_are_refusals(
    server, status, body
):
    server.script = [(status, {}, body)]
    assert Endpoint(service(server)).ask(ASK).end == "refused"


def test_the_first_of_several_choices_and_parts_of_any_name_are_read(server):
    parts = [{"type": "output_text", "text": "8"}, "/10"]
    second = reply(index=1, message={"role": "assistant", "content": "2"})["choices"]
    first = reply(message={"role": "assistant", "content": parts})["choices"]
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    server.script = [(200, {}, {"choices": [*second, *first], "usage": usage})]
    assert Endpoint(service(server)).ask(ASK) == ("8/10", 7, "finished")


def test_what_a_server_says_beside_its_refusal_of_the_key_is_told(server):
    server.script = [(403, {}, {"error": {"message": "country not supported"}})]
    with pytest.raises(UsageError, match=r"found 403 .*country not supported"):
        Endpoint(service(server)).ask(ASK)
