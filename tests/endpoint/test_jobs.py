"""Many questions: every reply is kept, none is asked for twice, and budgets hold."""

from __future__ import annotations

import json
import threading

import pytest

from pem_composition.endpoint.jobs import Budget, Job, ask, describe, key_of
from pem_composition.endpoint.service import Service
from pem_composition.errors import RunFailed, UsageError

pytest.importorskip("openai")
KEY = "sk-secret-of-the-test"
FAIL = {"error": {"message": "down"}}


@pytest.fixture
def service(server):
    return Service("m", server.url, retries=0)


def jobs(service, count, read=lambda reply: {"reply": reply}):
    out = []
    for i in range(count):
        messages = [{"role": "user", "content": f"question {i}"}]
        out.append(Job(key_of(service, messages), messages, {"row": i}, read))
    return out


def go(service, path, count=5, budget=Budget(), **options):  # noqa: B008
    return ask(jobs(service, count), service, path, budget, **options)


def rows(path):
    return {line["row"]: line["reply"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_question_is_answered_once_whatever_the_order(server, service, tmp_path, parallel):
    path = tmp_path / "replies.jsonl"
    report = go(service, path, parallel=parallel)
    assert rows(path) == {i: f"question {i}" for i in range(5)}
    assert (report.done, report.requests, report.tokens, report.before) == (5, 5, 50, 0)
    again = go(service, path, count=7, parallel=parallel)
    assert (again.done, again.before) == (2, 5) and len(server.requests) == 7
    assert KEY not in path.read_text()


def test_questions_are_under_way_at_once(server, service, tmp_path):
    """Each of three waits until all three have been asked."""
    barrier = threading.Barrier(3, timeout=240)

    def together(messages):
        barrier.wait()
        return messages[-1]["content"]

    server.answer = together
    assert go(service, tmp_path / "r.jsonl", count=3, parallel=3).done == 3


def test_a_failure_keeps_what_is_done_and_a_rerun_goes_on(server, service, tmp_path):
    path = tmp_path / "replies.jsonl"
    good = server.take

    def third_fails(request, key):
        reply = good(request, key)
        return (500, {}, FAIL) if len(server.requests) == 3 else reply

    server.take = third_fails
    with pytest.raises(RunFailed, match=r"the server fails.* 2 of 5 kept in .*replies.jsonl; the"):
        go(service, path)
    assert rows(path) == {0: "question 0", 1: "question 1"}
    report = go(service, path)
    assert (report.before, report.done) == (2, 3) and len(rows(path)) == 5


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((500, {}, FAIL), "the server fails"),
        ((200, {"Content-Type": "application/json"}, b"{not json"), "not a chat reply"),
    ],
)
def test_replies_under_way_are_kept_when_another_fails(server, service, tmp_path, bad, words):
    barrier, path = threading.Barrier(3, timeout=240), tmp_path / "replies.jsonl"
    good = server.take

    def one_fails(request, key):
        reply = good(request, key)
        barrier.wait()
        return bad if request["messages"][-1]["content"] == "question 1" else reply

    server.take = one_fails
    with pytest.raises(RunFailed, match=rf"{words}.* 2 of 3 kept in .*the same command"):
        go(service, path, count=3, parallel=3)
    assert rows(path) == {0: "question 0", 2: "question 2"}


def test_a_line_torn_by_a_crash_is_asked_again(server, service, tmp_path):
    path = tmp_path / "replies.jsonl"
    go(service, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    report = go(service, path)
    assert (report.before, report.done) == (4, 1)
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert {json.loads(line)["row"] for line in lines} == set(range(5))


def test_budgets_stop_and_a_rerun_goes_on(server, service, tmp_path):
    path = tmp_path / "replies.jsonl"
    report = go(service, path, budget=Budget(requests=2))
    assert (report.done, report.left, report.stopped) == (2, 3, "--max_requests")
    assert "stopped by --max_requests with 3 to go" in describe(report)
    report = go(service, path, budget=Budget(tokens=15))
    assert (report.done, report.left, report.stopped) == (2, 1, "--max_tokens")
    report = go(service, path, budget=Budget(requests=1))
    assert (report.done, report.left, report.stopped) == (1, 0, "")
    server.usage = None
    with pytest.raises(UsageError, match=r"--max_tokens: the endpoint does not say.*nothing was"):
        go(service, tmp_path / "other.jsonl", budget=Budget(tokens=15))


def test_a_reply_that_cannot_be_read_is_asked_for_once_more_and_then_left(
    server, service, tmp_path
):
    said = iter(["nonsense", "good", "nonsense", "nonsense"])
    server.answer = lambda messages: next(said)

    def read(reply):
        return {"reply": reply} if reply == "good" else None

    path = tmp_path / "replies.jsonl"
    report = ask(jobs(service, 2, read), service, path, Budget())
    assert (report.done, report.unreadable, report.requests) == (1, 1, 4)
    assert rows(path) == {0: "good"}


def test_a_key_knows_everything_that_decides_a_reply(service):
    ask = [{"role": "user", "content": "a"}]
    keys = {
        key_of(service, ask),
        key_of(service, [{"role": "user", "content": "b"}]),
        key_of(Service("other", service.base_url), ask),
        key_of(Service("m", service.base_url, temperature=0.1), ask),
        key_of(Service("m", service.base_url, reply_tokens=9), ask),
        key_of(Service("m", "http://elsewhere/v1"), ask),
    }
    assert len(keys) == 6
    same = Service("m", f"{service.base_url}/", "OTHER", retries=9, timeout=1.0)
    assert key_of(same, ask) == key_of(service, ask)


def test_what_was_refused_is_asked_again_only_on_request(server, service, tmp_path):
    """A filter that lets a question pass later: its reply counts, and it is refused no more."""
    path, good = tmp_path / "replies.jsonl", server.take

    def refuses(request, key):
        status, headers, reply = good(request, key)
        if request["messages"][-1]["content"] in ("question 1", "question 3"):
            reply["choices"][0]["finish_reason"] = "content_filter"
        return status, headers, reply

    server.take = refuses
    assert (go(service, path).refused, len(server.requests)) == (2, 5)
    assert (go(service, path).refused, len(server.requests)) == (2, 5)
    server.take = good
    report = go(service, path, retry_refused=True)
    assert (report.before, report.done, report.refused, report.requests) == (3, 2, 0, 2)
    assert report.whole and rows(path) == {i: f"question {i}" for i in range(5)}
    again = go(service, path)
    assert (again.before, again.refused, again.requests) == (5, 0, 0)
